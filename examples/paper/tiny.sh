#!/usr/bin/env bash
# Train the tiny policy of the study on film reviews, without a GPU; with `reward` also the reward model that
# tests/benchmarks/overhead.py needs. Makes runs/quickstart, once: four minutes for the policy, three for the other.
#
#   examples/paper/tiny.sh [reward]
set -euo pipefail
cd "$(dirname "$0")/../.."
work="$PWD/runs/quickstart"
models="$work/models"
. examples/quickstart/stack.sh
mkdir -p "$models"

train() { # train NAME MODULE FLAGS...: run a training command of OpenRLHF on all cores; makes $models/NAME
    local name=$1
    shift
    OMP_NUM_THREADS=$cores RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$(free_port) \
        python -m "$@" --ds.zero_stage 0 --ds.param_dtype fp32 --ds.attn_implementation eager --data.max_len 48 \
        --train.batch_size 32 --train.micro_batch_size 32 --ckpt.output_dir "$models/$name.partial" 2>&1 |
        python examples/quickstart/watch.py "$work/$name.log"
    mv "$models/$name.partial" "$models/$name"
}

if [ ! -e "$work/data/ready" ]; then
    echo "== the review corpus"
    python examples/paper/tiny.py "$work/data"
    touch "$work/data/ready"
fi
if [ ! -e "$models/policy" ]; then
    echo "== the policy: supervised fine-tuning on the reviews (log: runs/quickstart/policy.log)"
    train policy openrlhf.cli.train_sft --model.model_name_or_path "$work/data/untrained" --data.dataset \
        "$work/data/sft.jsonl" --data.input_key prompt --data.output_key response --data.input_template '{}' \
        --train.max_epochs 6 --adam.lr 2e-3
fi
if [ "${1:-}" = reward ] && [ ! -e "$models/reward" ]; then
    echo "== the reward model: pairs of liked and disliked reviews (log: runs/quickstart/reward.log)"
    train reward openrlhf.cli.train_rm --model.model_name_or_path "$models/policy" --data.dataset \
        "$work/data/pairs.jsonl" --train.max_epochs 2 --adam.lr 3e-4
fi

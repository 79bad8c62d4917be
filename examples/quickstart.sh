#!/usr/bin/env bash
# Align a small language model with two conflicting rewards on the real OpenRLHF, Ray, DeepSpeed and vLLM; no GPU needed.
#
#   examples/quickstart.sh [STEPS]        (default 50)
#
# Sentiment is a reward model trained on human ratings of film reviews, length counts tokens. The first run installs
# everything into .venv and trains the policy and the reward model in runs/quickstart; later runs reuse both.
set -euo pipefail
cd "$(dirname "$0")/.."

steps=${1:-50}
prompts_per_step=16
work="$PWD/runs/quickstart"
models="$work/models"
out="$work/run"

patches/make_venv.sh
cores=$(nproc) # before cpu.env, whose OMP_NUM_THREADS nproc would obey
export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$PWD/.venv/cache/torch_extensions" PYTHONWARNINGS=ignore
set -a
. examples/cpu.env
set +a

# -- data, policy and reward model, once ------------------------------------------------------------------------------
train() { # train NAME MODULE FLAGS...: one of the host's own training commands, on every core; makes $models/NAME
    local name=$1
    shift
    OMP_NUM_THREADS=$cores RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$(free_port) \
        python -m "$@" --ds.zero_stage 0 --ds.param_dtype fp32 --ds.attn_implementation eager --data.max_len 48 \
        --train.batch_size 32 --train.micro_batch_size 32 --ckpt.output_dir "$models/$name.partial" 2>&1 |
        python examples/quickstart/watch.py "$work/$name.log"
    mv "$models/$name.partial" "$models/$name"
}
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

mkdir -p "$models"
if [ ! -e "$work/data/ready" ]; then
    echo "== the review corpus"
    python examples/quickstart/prepare.py "$work/data"
    touch "$work/data/ready"
fi
if [ ! -e "$models/policy" ]; then
    echo "== the policy: supervised fine-tuning on the reviews (about four minutes; log: runs/quickstart/policy.log)"
    train policy openrlhf.cli.train_sft --model.model_name_or_path "$work/data/untrained" --data.dataset \
        "$work/data/sft.jsonl" --data.input_key prompt --data.output_key response --data.input_template '{}' \
        --train.max_epochs 2 --adam.lr 2e-3
fi
if [ ! -e "$models/reward" ]; then
    echo "== the reward model: pairs of liked and disliked reviews (about three minutes; log: runs/quickstart/reward.log)"
    train reward openrlhf.cli.train_rm --model.model_name_or_path "$models/policy" --data.dataset \
        "$work/data/pairs.jsonl" --train.max_epochs 2 --adam.lr 3e-4
fi

# -- a Ray of our own, stopped by its process id whatever happens -----------------------------------------------------
ray_port=$(free_port)
ray_folder=$(mktemp -d /tmp/pama.XXXXXX) # short: Ray keeps sockets in it, whose paths may have 107 characters
# Eight logical GPUs: the host asks for one per model, and Ray only counts them.
ray start --head --block --port="$ray_port" --num-gpus=8 --num-cpus=16 --include-dashboard=false \
    --temp-dir="$ray_folder" >"$work/ray.log" 2>&1 &
ray=$!
trap 'kill $ray 2>/dev/null; wait $ray 2>/dev/null || true; rm -rf "$ray_folder"' EXIT
export RAY_ADDRESS="127.0.0.1:$ray_port"
for try in $(seq 60); do
    ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1 && break
    if [ "$try" = 60 ] || ! kill -0 $ray 2>/dev/null; then
        tail -n 20 "$work/ray.log" >&2
        echo "examples/quickstart.sh: Ray did not start (log: $work/ray.log)" >&2
        exit 1
    fi
    sleep 1
done

# -- the run: OpenRLHF's own command, plus --loss and one --pama.objective per reward ---------------------------------
echo "== $steps steps of PPO with two objectives (starting takes about a minute; log: runs/quickstart/run.log)"
rm -rf "$out"
time python -m openrlhf.cli.train_ppo_ray \
    --loss pama \
    --pama.objective "sentiment=rm:$models/reward" \
    --pama.objective "length=builtin:length,scale=20,max=1.5" \
    --actor.model_name_or_path "$models/policy" \
    --data.prompt_dataset "$work/data/prompts.jsonl" --data.input_key prompt --data.max_len 64 \
    --data.max_samples $((steps * prompts_per_step)) \
    --rollout.batch_size $prompts_per_step --rollout.n_samples_per_prompt 4 --rollout.micro_batch_size 32 \
    --rollout.max_new_tokens 40 --train.batch_size 32 --train.micro_batch_size 16 \
    --algo.advantage.estimator reinforce_baseline \
    --algo.kl.use_loss --algo.kl.estimator k2 --algo.kl.init_coef 0.01 \
    --actor.adam.lr 1e-3 --actor.lr_scheduler constant_with_warmup --actor.lr_warmup_ratio 0.1 \
    --actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1 --reward.num_gpus_per_node 1 \
    --vllm.num_engines 1 --vllm.enforce_eager --vllm.gpu_memory_utilization 0.1 --vllm.sync_backend gloo \
    --ds.zero_stage 2 --ds.param_dtype fp32 --ds.attn_implementation eager \
    --ckpt.output_dir "$out/model" --ckpt.path "$out/checkpoints" --logger.tensorboard_dir "$out/logs" 2>&1 |
    python examples/quickstart/watch.py "$work/run.log" "$steps"

pama report "$out/logs" --png "$out/curves.png"
echo "model   $out/model"

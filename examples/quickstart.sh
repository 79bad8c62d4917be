#!/usr/bin/env bash
# Align a small language model with two conflicting rewards on OpenRLHF, Ray, DeepSpeed and vLLM, without a GPU.
#
#   examples/quickstart.sh [STEPS]        (default 50)
#
# Sentiment is a reward model trained on human ratings of film reviews; length counts tokens. The first run installs
# the stack into .venv and trains the policy and the reward model in runs/quickstart; later runs reuse them.
set -euo pipefail
cd "$(dirname "$0")/.."

steps=${1:-50}
prompts_per_step=16
. examples/quickstart/stack.sh
out="$work/run"

make_policy
if [ ! -e "$models/reward" ]; then
    echo "== the reward model: pairs of liked and disliked reviews (about three minutes; log: runs/quickstart/reward.log)"
    train reward openrlhf.cli.train_rm --model.model_name_or_path "$models/policy" --data.dataset \
        "$work/data/pairs.jsonl" --train.max_epochs 2 --adam.lr 3e-4
fi
start_ray

# -- the run: the stock OpenRLHF command, plus --loss and one --pama.objective per reward ------------------------------
echo "== $steps steps of PPO with two objectives (start-up takes about a minute; log: runs/quickstart/run.log)"
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

pama report "$out/logs" --out "$out"
echo "model   $out/model"

#!/usr/bin/env bash
# One policy that follows the weights it is given: SmolLM2 with two rewards that conflict, without a GPU.
#
#   examples/steerable.sh [STEPS [FLAGS]]        (default 30; SEED=1 examples/steerable.sh for another seed)
#
# FLAGS come last in the training command, and override its flags; OUT chooses another folder. Task, policy and rewards
# are those of examples/quickstart.sh: shorten a sentence, `coverage` of its content words against `brevity`. Here every
# prompt says how much each of them counts, and its responses are trained with these weights.
set -euo pipefail
cd "$(dirname "$0")/.."

steps=${1:-30}
flags=("${@:2}")
seed=${SEED:-0}
prompts_per_step=8 # of 2,244
if [[ ! $steps =~ ^[1-9][0-9]{0,2}$ ]] || ((steps > 280)); then
    echo "$0: STEPS must be a whole number from 1 to 280, found $steps" >&2
    exit 2
fi
work=runs/smollm2
models=$work/models
out=${OUT:-runs/steerable/$steps-steps/seed-$seed}
. examples/quickstart/stack.sh

make_smollm2
export OMP_NUM_THREADS=$cores # the phases of a step follow each other, so each gets all cores
start_ray
rm -rf "$out"/{model,checkpoints,logs,run.log,report.html,held_out.jsonl} "$out"/*.png
mkdir -p "$out"
head -n 24 "$models/held_out.jsonl" >"$out/held_out.jsonl"

echo "== $steps steps of PPO, each prompt with its own weights (40 s each, two evaluations; log: $out/run.log)"
python -m openrlhf.cli.train_ppo_ray \
    --loss linear \
    --pama.objective "coverage=py:examples/quickstart/rewards.py:coverage" \
    --pama.objective "brevity=builtin:length,unit=words,scale=-10" \
    --pama.preferences grid:5 \
    --pama.preference_template $'{prompt}\n\nImportance of completeness: {coverage:.0%}. Importance of brevity: {brevity:.0%}.' \
    --eval.dataset "$out/held_out.jsonl" --eval.steps $(((steps + 1) / 2)) --eval.n_samples_per_prompt 1 \
    --eval.temperature 1 --pama.log_rollouts all \
    --actor.model_name_or_path "$models/policy" \
    --data.prompt_dataset "$models/train.jsonl" --data.input_key messages --data.label_key label \
    --data.apply_chat_template --data.max_len 160 --data.max_samples $((steps * prompts_per_step)) \
    --rollout.batch_size $prompts_per_step --rollout.n_samples_per_prompt 4 --rollout.micro_batch_size 16 \
    --rollout.max_new_tokens 24 --train.batch_size 16 --train.micro_batch_size 16 --train.seed "$seed" \
    --algo.advantage.estimator reinforce_baseline \
    --algo.kl.use_loss --algo.kl.estimator k2 --algo.kl.init_coef 0.02 \
    --actor.adam.lr 5e-5 --actor.lr_scheduler constant_with_warmup --actor.lr_warmup_ratio 0.1 \
    --train.colocate_actor_ref --actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1 --reward.num_gpus_per_node 1 \
    --vllm.num_engines 1 --vllm.enforce_eager --vllm.gpu_memory_utilization 0.1 --vllm.sync_backend gloo \
    --ds.zero_stage 0 --ds.param_dtype fp32 --ds.attn_implementation sdpa \
    --ckpt.output_dir "$out/model" --ckpt.path "$out/checkpoints" --logger.tensorboard_dir "$out/logs" \
    "${flags[@]}" 2>&1 |
    python examples/quickstart/watch.py "$out/run.log" "$steps"

echo "== one held-out prompt, answered with five preferences"
pama rollouts "$out/logs" --evaluation --limit 5
pama report "$out/logs" --out "$out"
cat <<EOF

$out/model             the trained policy
$out/preferences.png   the front of its answers, coloured by weight
$out/report.html       everything on one page
EOF

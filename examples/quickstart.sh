#!/usr/bin/env bash
# Align a language model with two rewards that conflict, on OpenRLHF, Ray, DeepSpeed and vLLM, without a GPU.
#
#   examples/quickstart.sh [STEPS [FLAGS]]        (default 16; SEED=1 examples/quickstart.sh for another seed)
#
# FLAGS come last in the training command, and override its flags: examples/quickstart.sh 16 --loss linear. Its folders
# are needed afterwards: OUT, and no flag, chooses another.
#
# The policy is SmolLM2-135M-Instruct, from 4-bit weights; it is to shorten a sentence. `coverage` is the share of the
# sentence's content words in the answer, `brevity` is minus its words / 10, and `sentiment`, a model trained on human
# ratings, is logged only. The first run installs the stack into .venv and makes the models in runs/smollm2; later runs
# reuse them.
set -euo pipefail
cd "$(dirname "$0")/.."

steps=${1:-16}
flags=("${@:2}")
seed=${SEED:-0}
prompts_per_step=8 # of 2,244
if [[ ! $steps =~ ^[1-9][0-9]{0,2}$ ]] || ((steps > 280)); then
    echo "$0: STEPS must be a whole number from 1 to 280, found $steps" >&2
    exit 2
fi
work=runs/smollm2
models=$work/models
out=${OUT:-$work/$steps-steps/seed-$seed}
. examples/quickstart/stack.sh

make_smollm2
export OMP_NUM_THREADS=$cores # the phases of a step follow each other, so each gets all cores
start_ray

objectives=( # without role=monitor, sentiment is trained on, too
    --pama.objective "coverage=py:examples/quickstart/rewards.py:coverage"
    --pama.objective "brevity=builtin:length,unit=words,scale=-10"
    --pama.objective "sentiment=hf:$models/sentiment,text=response,role=monitor,on_failure=mask"
)

# The stock OpenRLHF command, plus --loss and one --pama.objective per reward.
echo "== $steps steps of PPO with two objectives (40 s each, after a minute of start-up; log: $out/run.log)"
rm -rf "$out"/{model,checkpoints,logs,run.log,answers.jsonl,scored.jsonl,score.log,report.html} "$out"/*.png
mkdir -p "$out"
python -m openrlhf.cli.train_ppo_ray \
    --loss pama "${objectives[@]}" --pama.log_rollouts all \
    --actor.model_name_or_path "$models/policy" \
    --data.prompt_dataset "$models/train.jsonl" --data.input_key messages --data.label_key label \
    --data.apply_chat_template --data.max_len 128 --data.max_samples $((steps * prompts_per_step)) \
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

echo "== start policy and trained policy, on prompts that were not trained on (about a minute)"
python examples/quickstart/compare.py sample "$models/policy" "$out/model" "$models/held_out.jsonl" "$out/answers.jsonl"
pama score "$out/answers.jsonl" "${objectives[@]}" --tokenizer "$models/policy" --out "$out/scored.jsonl" \
    >"$out/score.log" 2>&1 || { cat "$out/score.log" >&2 && exit 1; }
python examples/quickstart/compare.py show "$out/scored.jsonl"
pama report "$out/logs" --out "$out"
cat <<EOF

$out/model         the trained policy
$out/paths.png     its way through the rewards
$out/report.html   everything on one page
.venv/bin/pama rollouts $out --best coverage   what it wrote while it was trained
EOF

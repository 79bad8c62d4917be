#!/usr/bin/env bash
# One GPU with 24 GB: a 0.6B policy and two reward models of the same size.
#
#   HELPFUL=... HARMLESS=... examples/one_gpu.sh [FLAGS]
#   examples/one_gpu.sh --pama.plan 1x1     print the placement; starts nothing
#
# Not run on such a machine yet. Each reward model is a folder or hub name of an OpenRLHF value-head model with the
# tokenizer of the policy (openrlhf.cli.train_rm trains them). FLAGS come last and override the flags below.
set -euo pipefail

policy=${POLICY:-Qwen/Qwen3-0.6B}
helpful=${HELPFUL:-your-org/qwen3-0.6b-helpful}
harmless=${HARMLESS:-your-org/qwen3-0.6b-harmless}
prompts=${PROMPTS:-OpenRLHF/prompt-collection-v0.1}

# GPU memory, at 0.6 G parameters (bf16: 2 bytes each = 1.2 GB per model):
#   always       policy, reference and two reward models            4 × 1.2  =  4.8 GB
#   generating   vLLM, 0.4 of 24 GB (weights 1.2, the rest KV)               =  9.6 GB, none while it sleeps
#   training     bf16 gradients (2 bytes each)                               =  1.2 GB
#   logits       2 responses × 1,024 tokens × 152 k words, fp32 and bf16     =  1.9 GB, plus the same in the backward pass
# Adam's fp32 copy and moments (12 bytes per parameter, 7.2 GB) are in CPU memory: --ds.adam_offload.
flags=(
    # All on one GPU: vLLM, policy and reference use a share of 0.2 each, the reward models share another 0.2.
    --train.colocate_all --vllm.num_engines 1 --vllm.enable_sleep --vllm.gpu_memory_utilization 0.4
    --actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1 --reward.num_gpus_per_node 1
    # One GPU has nothing to partition, so ZeRO-2, with the optimizer offloaded instead of --ds.enable_sleep.
    --ds.zero_stage 2 --ds.adam_offload --actor.gradient_checkpointing_enable

    # 64 prompts × 4 responses; the mean of a group of 4 is the baseline instead of a critic. Two updates per rollout.
    --rollout.batch_size 64 --rollout.n_samples_per_prompt 4 --rollout.micro_batch_size 4
    --train.batch_size 128 --train.micro_batch_size 2
    --data.max_len 1024 --rollout.max_new_tokens 512
    --algo.advantage.estimator reinforce_baseline
    --algo.kl.use_loss --algo.kl.estimator k2 --algo.kl.init_coef 0.001
    --actor.adam.lr 1e-6

    --data.prompt_dataset "$prompts" --data.input_key context_messages --data.apply_chat_template
    --ckpt.output_dir ./runs/one_gpu/model --ckpt.path ./runs/one_gpu/checkpoints
    --logger.tensorboard_dir ./runs/one_gpu/logs
)

python -m openrlhf.cli.train_ppo_ray --actor.model_name_or_path "$policy" "${flags[@]}" \
    --loss pama \
    --pama.objective "helpful=rm:$helpful" \
    --pama.objective "harmless=rm:$harmless" \
    "$@"

#!/usr/bin/env bash
# One node with 8 × H100 (80 GB): an 8B policy and three 8B reward models, each role on separate GPUs.
#
#   HELPFUL=... HARMLESS=... CONCISE=... examples/h100x8_separate.sh [FLAGS]
#   examples/h100x8_separate.sh --pama.plan 1x8     print the placement; starts nothing
#
# Not run on such a machine yet. No model sleeps or is offloaded to CPU memory, so a step has fewer phases than with
# h100x8_colocated.sh, but GPUs are idle while others work. Each reward model is a folder or hub name of an OpenRLHF
# value-head model with the tokenizer of the policy (openrlhf.cli.train_rm trains them). FLAGS come last and override
# the flags below.
set -euo pipefail

policy=${POLICY:-meta-llama/Llama-3.1-8B-Instruct}
helpful=${HELPFUL:-your-org/llama-3.1-8b-helpful}
harmless=${HARMLESS:-your-org/llama-3.1-8b-harmless}
concise=${CONCISE:-your-org/llama-3.1-8b-concise}
prompts=${PROMPTS:-OpenRLHF/prompt-collection-v0.1}

# Memory per GPU, at 8 G parameters:
#   4 GPUs   policy with ZeRO-3: 16 bytes per parameter (bf16 weights and gradients, Adam's fp32 copy and moments),
#            2 G parameters on each = 32 GB; reference, 2 bytes per parameter = 4 GB; 44 GB for activations
#   1 GPU    three reward models in bf16, 3 × 16 GB = 48 GB; gpus=0.33 each, so that Ray puts them on one GPU
#   3 GPUs   vLLM: 0.9 of 80 GB, weights 16 GB, the rest KV
flags=(
    --actor.num_gpus_per_node 4 --ref.num_gpus_per_node 4 --train.colocate_actor_ref
    --vllm.num_engines 3 --vllm.tensor_parallel_size 1 --vllm.gpu_memory_utilization 0.9
    --ds.zero_stage 3 --actor.gradient_checkpointing_enable

    # 128 prompts × 8 responses = 1,024; in 64 micro-batches of 16, all on the one rank of each reward model.
    # Two updates per rollout, 128 responses per policy GPU.
    --rollout.batch_size 128 --rollout.n_samples_per_prompt 8 --rollout.micro_batch_size 16
    --train.batch_size 512 --train.micro_batch_size 8
    --data.max_len 2048 --rollout.max_new_tokens 1024
    --algo.advantage.estimator reinforce_baseline
    --algo.kl.use_loss --algo.kl.estimator k2 --algo.kl.init_coef 0.001
    --actor.adam.lr 5e-7

    --data.prompt_dataset "$prompts" --data.input_key context_messages --data.apply_chat_template
    --ckpt.output_dir ./runs/h100x8/model --ckpt.path ./runs/h100x8/checkpoints
    --logger.tensorboard_dir ./runs/h100x8/logs
)

python -m openrlhf.cli.train_ppo_ray --actor.model_name_or_path "$policy" "${flags[@]}" \
    --loss pama \
    --pama.objective "helpful=rm:$helpful,gpus=0.33" \
    --pama.objective "harmless=rm:$harmless,gpus=0.33" \
    --pama.objective "concise=rm:$concise,gpus=0.33" \
    "$@"

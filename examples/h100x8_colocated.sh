#!/usr/bin/env bash
# One node with 8 × H100 (80 GB): an 8B policy and three 8B reward models, with every model on every GPU.
#
#   HELPFUL=... HARMLESS=... CONCISE=... examples/h100x8_colocated.sh [FLAGS]
#   examples/h100x8_colocated.sh --pama.plan 1x8     print the placement; starts nothing
#
# Not run on such a machine yet. Each reward model is a folder or hub name of an OpenRLHF value-head model with the
# tokenizer of the policy (openrlhf.cli.train_rm trains them). FLAGS come last and override the flags below.
set -euo pipefail

policy=${POLICY:-meta-llama/Llama-3.1-8B-Instruct}
helpful=${HELPFUL:-your-org/llama-3.1-8b-helpful}
harmless=${HARMLESS:-your-org/llama-3.1-8b-harmless}
concise=${CONCISE:-your-org/llama-3.1-8b-concise}
prompts=${PROMPTS:-OpenRLHF/prompt-collection-v0.1}

# Memory per GPU, at 8 G parameters; ZeRO-3 spreads each DeepSpeed model over the 8 GPUs (1 G parameters on each):
#   always       policy and reference, bf16 (2 bytes)                2 × 2   =  4 GB
#   training     gradients (2 bytes), Adam's fp32 copy and moments (12)      = 14 GB, in CPU memory while it sleeps
#   generating   vLLM, 0.6 of 80 GB (weights 16, the rest KV)                = 48 GB, almost none while it sleeps
# The 3 × 2 GB of the reward models are in CPU memory (offload=true, needs ZeRO-3) and are fetched layer by layer.
# Activations have 80 - 4 - 14 = 62 GB during training. CPU memory: 8 × (14 + 6) GB and the sleeping weights of vLLM,
# 8 × 16 GB: about 290 GB on the node.
flags=(
    # All on the same 8 GPUs: vLLM, policy and reference use a share of 0.2 each, the reward models share another 0.2.
    --train.colocate_all
    --actor.num_gpus_per_node 8 --ref.num_gpus_per_node 8 --reward.num_gpus_per_node 8
    # OpenRLHF needs one vLLM GPU per policy rank; an 8B model fits one H100, so 8 engines and no tensor parallelism.
    --vllm.num_engines 8 --vllm.tensor_parallel_size 1 --vllm.gpu_memory_utilization 0.6
    # One sleeps while the other works.
    --vllm.enable_sleep --ds.enable_sleep
    --ds.zero_stage 3 --actor.gradient_checkpointing_enable

    # 128 prompts × 8 responses = 1,024; in micro-batches of 16, 8 per GPU. Two updates per rollout, of 64 per GPU.
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
    --pama.objective "helpful=rm:$helpful,offload=true" \
    --pama.objective "harmless=rm:$harmless,offload=true" \
    --pama.objective "concise=rm:$concise,offload=true" \
    "$@"

#!/usr/bin/env bash
# One GPU with 48 GB, or with 80 GB: LoRA on a 7B policy with the paper's rank and rewards (harmless, and long).
#
#   POLICY=... HARMLESS=... examples/lora_7b.sh [FLAGS]           (GPU_GB=80 examples/lora_7b.sh for the larger card)
#   examples/lora_7b.sh --pama.plan 1x1     print the placement; starts nothing
#
# Not run on such a machine yet. The paper (arXiv 2508.07768) has r = 64, α = 128, dropout 0.05, Adam at 1e-5, batches of
# 32, and one value head per objective on the policy. A critic of 7B that is trained in full does not fit beside the
# policy, so the baseline is the mean of a prompt's responses here, and the KL is a loss.
# The policy needs a chat template, so the default is the chat model. FLAGS come last and override the flags below.
set -euo pipefail

policy=${POLICY:-meta-llama/Llama-2-7b-chat-hf}
harmless=${HARMLESS:-Ray2333/gpt2-large-harmless-reward_model}
prompts=${PROMPTS:-OpenRLHF/prompt-collection-v0.1}

# GPU memory in GB, at 6.74 G parameters (bf16: 2 bytes each = 13.5 GB). Adapters with r = 64 on all linear layers have
# 160 M parameters, 64 × (inputs + outputs) for every matrix: 5.0 M in each of 32 layers.
#   always       policy, which with its adapters off is the reference too                         13.5
#                adapters: weights and gradients 2 × 2 bytes, Adam's fp32 copy, moments and
#                gradients 16                                                                      3.2
#                the reward model of 0.8 G parameters, in fp32 as it is saved                      3.1
#   generating   vLLM's share (weights 13.5, the rest KV at 0.5 MB per token), none while it sleeps
#                  48 GB: 0.5 = 24, KV for 20,000 tokens      80 GB: 0.6 = 48, KV for 66,000 tokens
#   training     one response of 1,024 tokens: logits 0.2, checkpoints of 32 layers 0.3, one layer again 1
#   sending      one matrix at a time: 11,008 × 4,096 in fp32, three times                         0.5
# So at most 19.8 + 24 = 44 GB, or 19.8 + 48 = 68 GB. --pama.plan prints the first three from the models' config.json.
case ${GPU_GB:-48} in
    48) share=0.5 micro_batch=1 ;;
    80) share=0.6 micro_batch=4 ;;
    *) echo "$0: GPU_GB must be 48 or 80, found $GPU_GB" >&2 && exit 2 ;;
esac

flags=(
    # All on one GPU: vLLM and the policy use a share of 0.2 each, the reward model another.
    --train.colocate_all --vllm.num_engines 1 --vllm.enable_sleep --vllm.gpu_memory_utilization "$share"
    --actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1 --reward.num_gpus_per_node 1
    --ds.zero_stage 2 --actor.gradient_checkpointing_enable
    --ds.lora.rank 64 --ds.lora.alpha 128 --ds.lora.dropout 0.05

    # 32 prompts × 4 responses; the mean of a group of 4 is the baseline instead of a critic. Four updates per rollout.
    --rollout.batch_size 32 --rollout.n_samples_per_prompt 4 --rollout.micro_batch_size 4
    --train.batch_size 32 --train.micro_batch_size "$micro_batch"
    --data.max_len 1024 --rollout.max_new_tokens 512
    --algo.advantage.estimator reinforce_baseline
    --algo.kl.use_loss --algo.kl.estimator k2 --algo.kl.init_coef 0.01
    --actor.adam.lr 1e-5

    --data.prompt_dataset "$prompts" --data.input_key context_messages --data.apply_chat_template
    --ckpt.output_dir ./runs/lora_7b/model --ckpt.path ./runs/lora_7b/checkpoints
    --logger.tensorboard_dir ./runs/lora_7b/logs
)

python -m openrlhf.cli.train_ppo_ray --actor.model_name_or_path "$policy" "${flags[@]}" \
    --loss pama \
    --pama.objective "harmless=hf:$harmless,text=pair" \
    --pama.objective "length=builtin:length,preset=hh" \
    "$@"

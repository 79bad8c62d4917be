"""Cost of the combination: PAMA on advantages against exact MGDA on K gradients, for real model shapes.

    python tests/benchmarks/exact_mgda.py [--device cuda] [--model gpt2|qwen2.5-1.5b] [--responses 8] [--tokens 128]

Random model weights; one batch of B responses with A tokens. Exact MGDA needs one backward pass of the PPO loss
``−mean(ratio · A_i)`` per objective, and torchjd's solver on the Gramian of the K gradients. PAMA needs one call of
``aggregate``, which returns one (B, A) tensor. The forward pass before and the update after are not timed; with PAMA
the update needs one more backward pass. The rounds are interleaved; times are medians.
"""

import argparse
import platform
import statistics
import time

import torch
from torchjd.aggregation import MGDAWeighting
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, Qwen2Config

from pama_plugin import aggregate

CONFIGS = {
    "gpt2": lambda: GPT2Config(),  # 124 M parameters
    "qwen2.5-1.5b": lambda: Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="gpt2", choices=CONFIGS)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--objectives", type=int, nargs="+", default=(2, 4, 8))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = options.device

    torch.manual_seed(0)
    config: AutoConfig = CONFIGS[options.model]()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in parameters)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{options.model}, {count / 1e6:.0f} M parameters, {dtype}; {options.responses} responses of {options.tokens} "
        f"tokens; {name} ({platform.machine()}); torch {torch.__version__}\n"
    )

    tokens_BA = torch.randint(config.vocab_size, (options.responses, options.tokens + 1), device=device)
    mask_BA = torch.ones(options.responses, options.tokens, dtype=torch.bool, device=device)
    logits = model(tokens_BA[:, :-1]).logits.float()
    log_probs_BA = logits.log_softmax(-1).gather(-1, tokens_BA[:, 1:, None]).squeeze(-1)
    ratio_BA = (log_probs_BA - log_probs_BA.detach()).exp()

    print(f"{'K':>3} {'PAMA s':>10} {'exact s':>10} {'exact / PAMA':>13}")
    for objectives in options.objectives:
        advantages_KBA = torch.randn(objectives, options.responses, options.tokens, device=device)

        def exact(advantages_KBA: torch.Tensor = advantages_KBA) -> None:
            """One backward pass per objective, the Gram matrix of the gradients, and its min-norm point."""
            rows = []
            for advantages_BA in advantages_KBA:
                grads = torch.autograd.grad(-(ratio_BA * advantages_BA).mean(), parameters, retain_graph=True)
                rows.append(grads)
            gram_KK = torch.zeros(len(rows), len(rows), dtype=torch.float64)
            for i, one in enumerate(rows):
                for j, other in enumerate(rows[: i + 1]):
                    product = sum(float((a.float() * b.float()).sum()) for a, b in zip(one, other))
                    gram_KK[i, j] = gram_KK[j, i] = product
            MGDAWeighting()(gram_KK)

        def pama(advantages_KBA: torch.Tensor = advantages_KBA) -> None:
            aggregate("pama", advantages_KBA, mask_BA, noon=True, rescale="none")  # as in the paper

        times: dict[str, list[float]] = {"pama": [], "exact": []}
        for round in range(options.rounds + 1):
            for key, function in (("pama", pama), ("exact", exact)):
                start = time.perf_counter()
                function()
                if device == "cuda":
                    torch.cuda.synchronize()
                if round:
                    times[key].append(time.perf_counter() - start)
        ours, theirs = (statistics.median(measured) for measured in times.values())
        print(f"{objectives:3} {ours:10.5f} {theirs:10.3f} {theirs / ours:12.0f}x", flush=True)


if __name__ == "__main__":
    main()

"""Cost of the combination and of the update: PAMA on advantages against exact MGDA on K gradients, for real models.

    python tests/benchmarks/exact_mgda.py [--device cuda] [--model gpt2|qwen2.5-1.5b|FOLDER]
                                          [--responses 8] [--tokens 128]

FOLDER is a model in the format of transformers; the shapes with a name get random weights, which take the same time.
One batch of B responses with A tokens. Exact MGDA needs one backward pass of the PPO loss ``−mean(ratio · A_i)`` per
objective, torchjd's solver on the Gramian of the K gradients, and their sum with its coefficients. PAMA needs one call
of ``aggregate``, which returns one (B, A) tensor, and one backward pass. The *update* of both begins with the forward
pass and ends with Adam. The rounds are interleaved; times are medians.
"""

import argparse
import platform
import statistics
import time

import torch
from torch import Tensor
from torchjd.aggregation import MGDAWeighting
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

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
    parser.add_argument("--model", default="gpt2", help=f"{', '.join(CONFIGS)}, or a folder")
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--objectives", type=int, nargs="+", default=(2, 4, 8))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = options.device

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if options.model in CONFIGS:
        model = AutoModelForCausalLM.from_config(CONFIGS[options.model](), dtype=dtype).to(device).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in parameters)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{options.model}, {count / 1e6:.0f} M parameters, {dtype}; {options.responses} responses of {options.tokens} "
        f"tokens; {name} ({platform.machine()}); torch {torch.__version__}\n"
    )

    tokens_BA = torch.randint(model.config.vocab_size, (options.responses, options.tokens + 1), device=device)
    mask_BA = torch.ones(options.responses, options.tokens, dtype=torch.bool, device=device)
    optimizer = torch.optim.Adam(parameters, lr=1e-6)

    def forward() -> Tensor:
        logits = model(tokens_BA[:, :-1]).logits.float()
        log_probs_BA = logits.log_softmax(-1).gather(-1, tokens_BA[:, 1:, None]).squeeze(-1)
        return (log_probs_BA - log_probs_BA.detach()).exp()

    def combine(advantages_KBA: Tensor) -> Tensor:
        return aggregate("pama", advantages_KBA, mask_BA, noon=True, rescale="none").advantages  # as in the paper

    def mgda(ratio_BA: Tensor, advantages_KBA: Tensor) -> tuple[list[tuple[Tensor, ...]], Tensor]:
        """One backward pass per objective, the Gram matrix of the gradients, and its min-norm point."""
        rows = [
            torch.autograd.grad(-(ratio_BA * advantages_BA).mean(), parameters, retain_graph=True)
            for advantages_BA in advantages_KBA
        ]
        gram_KK = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for i, one in enumerate(rows):
            for j, other in enumerate(rows[: i + 1]):
                product = sum((a.float() * b.float()).sum() for a, b in zip(one, other))
                gram_KK[i, j] = gram_KK[j, i] = float(product)
        return rows, MGDAWeighting()(gram_KK)

    def update_pama(advantages_KBA: Tensor) -> None:
        optimizer.zero_grad()
        (-(forward() * combine(advantages_KBA)).mean()).backward()
        optimizer.step()

    def update_exact(advantages_KBA: Tensor) -> None:
        rows, weights_K = mgda(forward(), advantages_KBA)
        for parameter, *gradients in zip(parameters, *rows):
            parameter.grad = sum(float(weight) * gradient for weight, gradient in zip(weights_K, gradients))
        optimizer.step()

    print(f"{'':3} {'combination, s':^31} {'whole update, s':^31}")
    print(f"{'K':>3} " + " ".join([f"{'PAMA':>9} {'exact':>9} {'ratio':>11}"] * 2))
    for objectives in options.objectives:
        advantages_KBA = torch.randn(objectives, options.responses, options.tokens, device=device)
        functions = {
            "combine": lambda: combine(advantages_KBA),
            "mgda": lambda: mgda(ratio_BA, advantages_KBA),
            "update_pama": lambda: update_pama(advantages_KBA),
            "update_exact": lambda: update_exact(advantages_KBA),
        }
        times: dict[str, list[float]] = {name: [] for name in functions}
        for round in range(options.rounds + 1):
            ratio_BA = forward()  # not timed; the updates of the last round changed the weights
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                if device == "cuda":
                    torch.cuda.synchronize()
                if round:
                    times[name].append(time.perf_counter() - start)
        one, many, update, updates = (statistics.median(measured) for measured in times.values())
        print(
            f"{objectives:3} {one:9.5f} {many:9.3f} {many / one:10.0f}x {update:9.3f} {updates:9.3f} "
            f"{updates / update:10.1f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Time and memory of ``aggregate``: every rule, and ``pama`` by number of objectives.

    python tests/benchmarks/aggregation.py [--device cuda] [--objectives 2 8 64]

The input is (K, 1024, 1024) float32. Peak is the largest memory that torch allocated during the call, in addition to
the input, as a multiple of the input's bytes. ``/ read`` is the time as a multiple of reading the input once, taken as
half of the time of copying it, which reads and writes it. Calls and copies are interleaved; each number is the median
over the rounds.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pama_plugin import aggregate, available_rules
from pama_plugin.aggregation import get_rule

B, A = 1024, 1024
ROUNDS = 9


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """The largest memory that torch allocates during the call, in addition to the memory in use before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as profiler:
        function()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def seconds(functions: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Median time of each function; the rounds are interleaved."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round in range(ROUNDS + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if round:  # the first round is a warm-up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(measured) for name, measured in times.items()}


def make(objectives: int, device: str, tokens: int = A) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    advantages_KBA = torch.randn(objectives, B, tokens, generator=generator).to(device)
    return advantages_KBA, (torch.rand(B, tokens, generator=generator) < 0.8).to(device)


def calls_of_every_rule(objectives: int, device: str) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    whole, narrow = make(objectives, device), make(objectives, device, tokens=1)
    groups_B = (torch.arange(B) // 8).to(device)
    constraint = [None] * (objectives - 1)
    for rule in available_rules():
        variants: list[dict[str, Any]] = [{}]
        if rule == "pama":
            variants = [dict(level=level) for level in ("token", "sequence", "batch")]
            variants += [dict(soft=4.0), dict(rescale="none"), dict(noon=True, rescale="none")]
        elif get_rule(rule).constrained:
            variants = [dict(violations_K=[*constraint, 0.1])]
        if "rewards_KB" in get_rule(rule).parameters:
            variants = [dict(rewards_KB=narrow[0].squeeze(-1))]
        advantages_KBA, mask_BA = narrow if get_rule(rule).combines == "rewards" else whole
        for options in variants:
            words = [f"{key}={value}" for key, value in options.items() if not key.endswith(("_K", "_KB"))]
            calls[" ".join([rule, *words])] = lambda rule=rule, options=options, a=advantages_KBA, m=mask_BA: aggregate(
                rule, a, m, groups_B=groups_B, **options
            )
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--objectives", type=int, nargs="+", default=(2, 8, 64), metavar="K")
    options = parser.parse_args()
    device = options.device
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"(K, {B}, {A}) float32; {name} ({platform.machine()}); torch {torch.__version__}\n")

    first = options.objectives[0]
    size = first * B * A * 4
    print(f"every rule, K = {first}, {size / 2**20:.0f} MiB; morlhf and tchebycheff get one reward per response")
    print(f"{'rule':30} {'ms':>8} {'peak':>7}")
    functions = calls_of_every_rule(first, device)
    for rule, took in seconds(functions, device).items():
        print(f"{rule:30} {took * 1000:8.2f} {peak_bytes(functions[rule], device) / size:6.2f}x", flush=True)

    print("\npama, token level")
    print(f"{'K':>4} {'MiB':>6} {'ms':>8} {'copy ms':>8} {'/ read':>7} {'peak':>7}")
    points = []
    for objectives in options.objectives:
        advantages_KBA, mask_BA = make(objectives, device)
        target = torch.empty_like(advantages_KBA)
        pair = {
            "pama": lambda a=advantages_KBA, m=mask_BA: aggregate("pama", a, m),
            "copy": lambda a=advantages_KBA, t=target: t.copy_(a),
        }
        took = seconds(pair, device)
        size = advantages_KBA.numel() * 4
        peak = peak_bytes(pair["pama"], device) / size
        points.append((math.log(objectives), math.log(took["pama"])))
        print(
            f"{objectives:4} {size / 2**20:6.0f} {took['pama'] * 1000:8.1f} {took['copy'] * 1000:8.1f} "
            f"{took['pama'] / (took['copy'] / 2):6.1f}x {peak:6.2f}x",
            flush=True,
        )
    if len(points) > 1:
        slope, _ = statistics.linear_regression(*zip(*points))
        print(f"time grows as K^{slope:.2f} (least squares of the logarithms)")


if __name__ == "__main__":
    main()

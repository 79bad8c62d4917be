"""Time and memory of ``aggregate``, against the size of its input.

    python tests/benchmarks/aggregation.py [--device cuda] [--shape K B A]

Peak and total are what torch allocated while the call ran, as multiples of the bytes of the (K, B, A) input: peak is
the most that was held at once on top of the input, total adds up every allocation, also of what was freed again.
"""

import argparse
import platform
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from pama_plugin import aggregate

LEVELS = ("token", "sequence", "batch")
VARIANTS = [
    ("linear", {}),
    *(("pama", {"level": level, "noon": noon}) for level in LEVELS for noon in (True, False)),
    *(("pama", {"level": level, "noon": False, "weights": "1, 2, …"}) for level in LEVELS),
]


def allocated(function) -> tuple[int, int]:
    """(peak, total) bytes that torch allocated on top of what was there, from the profiler's allocation events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as profiler:
        function()
    held = peak = total = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
            total += max(0, event.nbytes())
    return peak, total


def allocated_cuda(function) -> tuple[int, int]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    return (
        after["allocated_bytes.all.peak"] - before["allocated_bytes.all.current"],
        after["allocated_bytes.all.allocated"] - before["allocated_bytes.all.allocated"],
    )


def seconds(function, device: str, runs: int = 15) -> float:
    times = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", type=int, nargs=3, default=(2, 1024, 1024), metavar=("K", "B", "A"))
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(options.shape, generator=generator).to(options.device)
    mask = (torch.rand(options.shape[1:], generator=generator) < 0.8).to(options.device)
    size = advantages.numel() * advantages.element_size()
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{tuple(options.shape)} float32, {size / 2**20:.0f} MiB; {name} ({platform.machine()}); "
        f"torch {torch.__version__}"
    )
    print(f"{'rule':8} {'level':9} {'noon':6} {'weights':8} {'ms':>8} {'peak':>7} {'total':>7}")
    for rule, settings in VARIANTS:
        weights = range(1, options.shape[0] + 1) if "weights" in settings else None
        arguments = {**settings, "weights": weights}

        def call(rule=rule, arguments=arguments):
            aggregate(rule, advantages, mask, **arguments)

        call()
        peak, total = (allocated_cuda if options.device == "cuda" else allocated)(call)
        took = seconds(call, options.device) * 1000
        level, noon = settings.get("level", "–"), str(settings.get("noon", "–"))
        named = settings.get("weights", "1 each")
        print(f"{rule:8} {level:9} {noon:6} {named:8} {took:8.1f} {peak / size:6.2f}x {total / size:6.2f}x")


if __name__ == "__main__":
    main()

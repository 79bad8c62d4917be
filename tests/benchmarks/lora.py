"""Time and memory of a step with LoRA adapters and with full training; what SmolLM2 learns of the quickstart's task.

    .venv/bin/python tests/benchmarks/lora.py [STEPS]        about 25 minutes for 16 steps

The two runs follow each other, with the same seed and prompts. Memory is the largest proportional set size (PSS) of
each process, read every second.
"""

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "runs" / "lora"
VARIANTS = {
    "full": [],
    "LoRA": "--ds.lora.rank 16 --ds.lora.alpha 32 --actor.adam.lr 5e-4".split(),
}
PHASES = ("generation", "make_experience", "ppo_train", "broadcast", "step_total")
ROLES = ("ray::PolicyModelActor", "ray::ReferenceModelActor", "VLLM::EngineCore")


def memory_by_role() -> Iterator[tuple[str, float]]:
    """The present PSS of each model's process, in GiB."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_text()
            for role in ROLES:
                if title.startswith(role):
                    pss = re.search(r"Pss:\s+(\d+)", (process / "smaps_rollup").read_text())
                    yield role, int(pss[1]) / 2**20
        except (OSError, TypeError):  # it has just ended
            continue


def run(name: str, steps: str) -> dict[str, float]:
    """Run the quickstart and return the largest memory of each role."""
    command = [str(ROOT / "examples" / "quickstart.sh"), steps, *VARIANTS[name]]
    peaks: dict[str, float] = {}
    with subprocess.Popen(command, env=os.environ | {"OUT": str(OUT / name)}) as process:
        while process.poll() is None:
            for role, size in memory_by_role():
                peaks[role] = max(size, peaks.get(role, 0.0))
            time.sleep(1)
    if process.returncode:
        sys.exit(f"{name}: the quickstart ended with {process.returncode}")
    return peaks


def main(steps: str) -> None:
    if int(steps) < 2:
        sys.exit(f"STEPS must be at least 2, the first of which is a warm-up, found {steps}")
    peaks = {name: run(name, steps) for name in VARIANTS}
    print(f"{'GiB at most':26}", *(f"{name:>8}" for name in VARIANTS))
    for role in ROLES:
        print(f"{role:26}", *(f"{of[role]:8.2f}" if role in of else f"{'–':>8}" for of in peaks.values()))
    print(f"\n{'seconds, median of steps':26}", *(f"{name:>8}" for name in VARIANTS))
    for phase in PHASES:
        values = [
            re.findall(rf"'timing/{phase}': ([\d.e-]+)", (OUT / name / "run.log").read_text())[1:] for name in VARIANTS
        ]
        print(f"{phase:26}", *(f"{statistics.median(map(float, of)):8.2f}" for of in values))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "16")

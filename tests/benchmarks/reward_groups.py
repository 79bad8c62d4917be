"""Are K reward groups scored at the same time? Wall time of two groups together against each of them alone.

    python tests/benchmarks/reward_groups.py [ROUNDS]

Real Ray, the host's own ``RayActorGroup`` and ``execute_batch``, and our ``make_experience``; the two models wait a
fixed time per micro-batch instead of computing, because on a machine with two cores two models that compute would
share them. The rounds are interleaved: slow alone, fast alone, both.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import ray
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hosttools import fixed_group, host_args, make_rollout  # noqa: E402  (needs the path above)
from openrlhf.trainer.ray.launcher import BaseModelActor, RayActorGroup  # noqa: E402

from pama_plugin.config import load_config  # noqa: E402
from pama_plugin.host.experience import MultiObjectiveExperienceMaker  # noqa: E402

SECONDS = {"slow": 0.25, "fast": 0.15}
SAMPLES, MICRO_BATCH = 16, 2


def waiting_group(seconds: float) -> RayActorGroup:
    class Waiting(BaseModelActor):
        strategy = SimpleNamespace(is_rank_0=lambda: False)

        def forward(self, sequences, attention_mask, pad_sequence):
            time.sleep(seconds)
            return torch.randn(len(sequences))

    return RayActorGroup(1, 1, ray.remote(Waiting), num_gpus_per_actor=0.2)


def main(rounds: int) -> None:
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=8,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=tempfile.mkdtemp(prefix="pama-"),
    )
    actor = fixed_group("actor")
    groups = {name: waiting_group(seconds) for name, seconds in SECONDS.items()}

    def took(*names: str) -> float:
        args = host_args("--algo.kl.init_coef", "0", "--rollout.micro_batch_size", str(MICRO_BATCH))
        objectives = [f"{name}=rm:org/{name}" for name in names]
        args.pama = load_config("linear", objectives, None, None, None, default_level="token")
        maker = MultiObjectiveExperienceMaker(
            actor,
            None,
            SimpleNamespace(groups={name: groups[name] for name in names}),
            None,
            SimpleNamespace(value=0.0),
            SimpleNamespace(args=args),
            SimpleNamespace(pad_token_id=0),
        )
        samples = maker.split_rollout_samples(make_rollout(SAMPLES))
        start = time.perf_counter()
        maker.make_experience(samples)
        return time.perf_counter() - start

    took("slow", "fast")  # the actors' first call imports torch
    times: dict[tuple[str, ...], list[float]] = {("slow",): [], ("fast",): [], ("slow", "fast"): []}
    for _ in range(rounds):
        for names, measured in times.items():
            measured.append(took(*names))
    ray.shutdown()

    slow, fast, both = (statistics.median(measured) for measured in times.values())
    print(f"{SAMPLES} samples in micro-batches of {MICRO_BATCH}, median of {rounds} interleaved rounds")
    print(f"slow alone {slow:.2f} s, fast alone {fast:.2f} s, both {both:.2f} s")
    print(f"both / slower {both / slow:.2f}, both / sum {both / (slow + fast):.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)

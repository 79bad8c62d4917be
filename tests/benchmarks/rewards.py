"""Time of the rewards in a step: concurrent reward models, and rollout rewards during generation.

    python tests/benchmarks/rewards.py [ROUNDS]

1. Real Ray, OpenRLHF's ``RayActorGroup`` and ``execute_batch``, our ``hf`` replicas and ``make_experience``. The models
   wait for a fixed time per micro-batch or response instead of computing, because they would share two cores.
2. Our executor around a generation that finishes the responses one by one, with a real server on a socket and a
   function, which both take a fixed time per response.

The rounds are interleaved.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faultserver import FaultServer  # noqa: E402  (needs the path above)
from hosttools import as_reward_groups, fixed_group, host_args, make_rollout  # noqa: E402
from openrlhf.trainer.ray.launcher import BaseModelActor, RayActorGroup  # noqa: E402

from pama_plugin.host.actors import replicas  # noqa: E402
from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker  # noqa: E402
from pama_plugin.host.actors.rollout import ObjectiveExecutor  # noqa: E402
from pama_plugin.host.preflight.placement import Role  # noqa: E402
from pama_plugin.settings.load import load_config  # noqa: E402

SECONDS = {"slow": 0.25, "fast": 0.15}  # per micro-batch
HF_SECONDS = 0.1  # per response
SAMPLES, MICRO_BATCH = 16, 2
GENERATED_EVERY, REWARD_SECONDS, RESPONSES = 0.05, 0.4, 40


def waiting_group(seconds: float) -> RayActorGroup:
    class Waiting(BaseModelActor):
        strategy = SimpleNamespace(is_rank_0=lambda: False)

        def forward(self, sequences, attention_mask, pad_sequence):
            time.sleep(seconds)
            return torch.randn(len(sequences))

    return RayActorGroup(1, 1, ray.remote(Waiting), num_gpus_per_actor=0.2)


class WaitingReplica(replicas.Replica):
    def __init__(self, *_: Any) -> None: ...

    def score(self, conversations: list[Any], free_memory: bool) -> list[float]:
        time.sleep(HF_SECONDS * len(conversations))
        return [float(index) for index in range(len(conversations))]


def measure(rounds: int, cases: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median time of each case over interleaved rounds, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round in range(rounds + 1):
        for name, case in cases.items():
            took = case()
            if round:
                times[name].append(took)
    return {name: statistics.median(measured) for name, measured in times.items()}


def models(rounds: int) -> None:
    folder = tempfile.mkdtemp(prefix="pama-")
    ray.init(address="local", num_cpus=8, num_gpus=8, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    actor = fixed_group("actor")
    groups: dict[str, Any] = {name: waiting_group(seconds) for name, seconds in SECONDS.items()}
    config = load_config("linear", ["hf=hf:org/hf,gpus=0"], None, None, None, default_level="token")
    replicas.Replica = WaitingReplica
    groups["hf"] = replicas.ReplicaGroup(config.sources()[0], Role("reward/hf", 1, 1, 0.0), None)

    def run(*names: str) -> float:
        args = host_args("--algo.kl.init_coef", "0", "--rollout.micro_batch_size", str(MICRO_BATCH))
        objectives = [f"{name}={'hf' if name == 'hf' else 'rm'}:org/{name}" for name in names]
        args.pama = load_config("linear", objectives, None, None, None, None, "off", default_level="token")
        maker = MultiObjectiveExperienceMaker(
            actor,
            None,
            as_reward_groups(args.pama, groups),
            None,
            SimpleNamespace(value=0.0),
            SimpleNamespace(args=args),
            SimpleNamespace(pad_token_id=0, decode=lambda tokens, **_: str(tokens)),
        )
        samples = maker.split_rollout_samples(make_rollout(SAMPLES))
        start = time.perf_counter()
        maker.make_experience(samples)
        return time.perf_counter() - start

    cases = {name: lambda name=name: run(name) for name in groups} | {"all three": lambda: run(*groups)}
    medians = measure(rounds, cases)
    ray.shutdown()
    print(f"{SAMPLES} responses in micro-batches of {MICRO_BATCH}, median of {rounds} interleaved rounds")
    print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in medians.items()))
    *alone, together = medians.values()
    print(f"all / slowest {together / max(alone):.2f}, all / sum {together / sum(alone):.2f}")


class Generation:
    """A generation that finishes a response every ``GENERATED_EVERY`` seconds."""

    async def execute(self, index: int, **_: Any) -> dict[str, Any]:
        await asyncio.sleep((index + 1) * GENERATED_EVERY)
        tokens = {"observation_tokens": [1, 2, 3], "action_ranges": [(1, 3)]}
        return {"prompt": "", "label": "", "reward": None, "scores": None, "extra_logs": {}} | tokens


def rollout(rounds: int, folder: str, server: FaultServer) -> None:
    function = Path(folder, "rewards.py")
    function.write_text(f"import time\n\ndef f(q, p, l):\n    time.sleep({REWARD_SECONDS})\n    return 1.0\n")
    objectives = {"http": f"http=http:{server.url}", "py": f"py=py:{function}:f"}

    def run(*names: str) -> float:
        async def roll_out() -> float:
            start = time.perf_counter()
            await asyncio.gather(*(executor.execute(index=index, hf_tokenizer=words) for index in range(RESPONSES)))
            return time.perf_counter() - start

        words = SimpleNamespace(decode=lambda tokens, **_: str(tokens))
        if not names:
            executor: Any = Generation()
        else:
            chosen = [objectives[name] for name in names]
            config = load_config("linear", chosen, None, None, None, default_level="token")
            executor = ObjectiveExecutor(config, Generation())
        return asyncio.run(roll_out())

    cases = {"generation alone": run, "with http": lambda: run("http"), "with py": lambda: run("py")}
    medians = measure(rounds, cases | {"with both": lambda: run("http", "py")})
    print(f"\n{RESPONSES} responses, one every {GENERATED_EVERY} s; {REWARD_SECONDS} s for a reward")
    print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in medians.items()))
    print(f"one after the other it would be {medians['generation alone'] + RESPONSES * REWARD_SECONDS * 2:.1f} s")


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    models(rounds)
    with tempfile.TemporaryDirectory() as folder, FaultServer(delay=REWARD_SECONDS) as server:
        rollout(rounds, folder, server)

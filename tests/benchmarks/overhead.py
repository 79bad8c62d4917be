"""Time of a step with the plugin: against stock OpenRLHF with one reward model, and by number of objectives.

    examples/paper/tiny.sh reward                       once, for the policy, reward model and prompts
    .venv/bin/python tests/benchmarks/overhead.py [BLOCKS]

1. Short runs of PPO with a critic (GAE) on the real stack, interleaved: stock, ours and stock again, with the same
   seeds and flags. Ours has the same reward model as its only objective, combined by ``linear``, and trains the same
   policy as stock OpenRLHF bit for bit. Steps are paired by number. The time of a step is make_experience + ppo_train +
   broadcast, as OpenRLHF logs them. Stock against stock is the control, because the time of a run's dozen processes
   varies.
2. The actor's training time with 1, 2, 4 and 8 objectives, without a critic.
3. The driver's computing time for a rollout batch with models that answer immediately, for stock and for K objectives,
   and the memory of the batch on its way to actor and critic.
"""

import itertools
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from hosttools import as_reward_groups, host_args  # noqa: E402  (needs the path above)
from one_process import Done  # noqa: E402

TINY = ROOT / "runs" / "quickstart"
BIN = Path(sys.executable).parent
STEPS, WARM_UP = 12, 2
PHASES = ("make_experience", "ppo_train", "broadcast")
COMMON_OPTIONS = f"""
    --actor.model_name_or_path {TINY}/models/policy --data.prompt_dataset {TINY}/data/prompts.jsonl
    --data.input_key prompt --data.max_len 64 --data.max_samples {STEPS * 16} --rollout.batch_size 16
    --rollout.n_samples_per_prompt 4 --rollout.micro_batch_size 32 --rollout.max_new_tokens 40 --train.batch_size 32
    --train.micro_batch_size 16 --actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1 --critic.num_gpus_per_node 1
    --reward.num_gpus_per_node 1 --vllm.num_engines 1 --vllm.enforce_eager --vllm.gpu_memory_utilization 0.1
    --vllm.sync_backend gloo --ds.zero_stage 2 --ds.param_dtype fp32 --ds.attn_implementation eager
    --ds.value_head_prefix score --algo.kl.init_coef 0.01
""".split()


def times_of(*flags: str) -> list[dict[str, float]]:
    """Run OpenRLHF's command and return the times of the phases of each step after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        paths = ["--ckpt.path", f"{folder}/checkpoints", "--ckpt.output_dir", f"{folder}/model"]
        command = [sys.executable, "-m", "openrlhf.cli.train_ppo_ray", *COMMON_OPTIONS, *paths, *flags]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    if run.returncode:
        sys.exit(run.stdout[-3000:])
    steps = re.findall(r"Global step \d+: (\{.*\})", run.stdout)[WARM_UP:]
    return [{phase: float(re.search(rf"'timing/{phase}': ([\d.e-]+)", step)[1]) for phase in PHASES} for step in steps]


def against_stock(blocks: int) -> None:
    """Stock, ours, and stock again as the control."""
    reward = TINY / "models" / "reward"
    gae = ["--algo.advantage.estimator", "gae", "--critic.model_name_or_path", str(reward)]
    stock = [*gae, "--reward.model_name_or_path", str(reward)]
    variants = {
        "stock": stock,
        "ours": [*gae, "--loss", "linear", "--pama.objective", f"sentiment=rm:{reward}"],
        "stock again": stock,
    }
    orders = itertools.cycle(itertools.permutations(variants))
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    with tqdm(total=len(variants) * blocks, desc="runs, in turn") as bar:
        for order, _ in zip(orders, range(blocks)):
            for name in order:
                steps[name] += times_of(*variants[name])
                bar.update()
    print(f"{len(steps['ours'])} paired steps of 64 responses, {blocks} runs of each; ratios to stock, median of the")
    print("pairs, with the 95 % interval of a bootstrap over the runs")
    print(f"{'phase':16} {'stock, s':>9} {'ours':>24} {'stock again':>24}")
    for phases in (*((phase,) for phase in PHASES), PHASES):
        times = {
            name: torch.tensor([sum(step[phase] for phase in phases) for step in measured]).view(blocks, -1)
            for name, measured in steps.items()
        }
        columns = []
        for name in ("ours", "stock again"):
            ratios = times[name] / times["stock"]
            drawn = torch.randint(blocks, (10_000, blocks), generator=torch.Generator().manual_seed(0))
            low, high = ratios[drawn].flatten(1).quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()
            columns.append(f"{ratios.quantile(0.5).item():.3f} [{low:.3f}, {high:.3f}]")
        label = phases[0] if len(phases) == 1 else "together"
        print(f"{label:16} {times['stock'].quantile(0.5).item():9.3f} {columns[0]:>24} {columns[1]:>24}")


def by_objectives() -> None:
    rows = []
    for count in tqdm((1, 2, 4, 8), desc="runs with 1, 2, 4 and 8 objectives"):
        objectives = [
            word for k in range(count) for word in ("--pama.objective", f"o{k}=builtin:length,scale={10 + k},max=1.5")
        ]
        steps = times_of("--algo.advantage.estimator", "reinforce", "--loss", "linear", *objectives)
        rows.append([count, *(statistics.median(step[phase] for step in steps) for phase in PHASES[:2])])
    print(f"\n{'objectives':>10} {'make_experience, s':>19} {'ppo_train, s':>13}")
    for count, make_experience, ppo_train in rows:
        print(f"{count:10} {make_experience:19.3f} {ppo_train:13.3f}")


class Immediate:
    """A group of one rank, in this process, whose model returns random numbers immediately."""

    duplicate_actors = 1
    _actor_handlers = (None,)

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def async_run_method_batch(self, sequences: list[torch.Tensor], **_: Any) -> list[Any]:
        shapes = [(len(rows), rows.shape[1] - 1, self.heads) for rows in sequences]
        return [Done([torch.randn(shape).squeeze(-1) if self.heads else torch.randn(shape[0]) for shape in shapes])]


def on_the_driver(samples: int = 64, tokens: int = 1024, rounds: int = 15) -> None:
    """Time the driver with one thread, as in training; the rounds are interleaved."""
    import one_process

    one_process.pytest_configure()  # replaces Ray by calls in this process
    from openrlhf.trainer.ppo_utils.experience import Experience
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker
    from pama_plugin.settings.load import load_config

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    mask = torch.ones(1, tokens + 1, dtype=torch.long)

    def make(objectives: int) -> tuple[float, float]:
        args = host_args(
            *("--algo.advantage.estimator", "gae", "--rollout.n_samples_per_prompt", "1"),
            *("--rollout.micro_batch_size", "32", "--algo.kl.init_coef", "0.01"),
        )
        names = [f"o{k}" for k in range(objectives)]
        if objectives:
            locations = [f"{name}=rm:org/{name}" for name in names]
            args.pama = load_config("linear", locations, None, None, None, default_level="token")
            kind: Any = MultiObjectiveExperienceMaker
            rewards: Any = as_reward_groups(args.pama, {name: Immediate(0) for name in names})
        else:
            kind, rewards = RemoteExperienceMaker, Immediate(0)
        strategy, controller = SimpleNamespace(args=args), SimpleNamespace(value=0.01)
        tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda tokens, **_: str(tokens))
        critic = Immediate(max(objectives, 1))
        maker = kind(Immediate(1), critic, rewards, Immediate(1), controller, strategy, tokenizer)
        rollout = [
            Experience(
                sequences=torch.randint(3, 50, mask.shape),
                attention_mask=mask,
                action_mask=mask[:, 1:],
                response_length=torch.tensor([tokens]),
                truncated=torch.tensor([False]),
                total_length=torch.tensor([tokens + 1.0]),
            )
            for _ in range(samples)
        ]
        start = time.perf_counter()
        made = maker.make_experience_batch(rollout)
        took = time.perf_counter() - start
        parts = [value for one in made for value in (*vars(one).values(), *one.info.values())]
        return took, sum(part.nbytes for part in parts if isinstance(part, torch.Tensor)) / 2**20

    counts = (0, 1, 2, 4, 8)
    measured = [[make(count) for count in counts] for _ in range(rounds + 1)][1:]
    print(f"\n{samples} responses of {tokens} tokens on the driver")
    print(f"{'objectives':>10} {'computes for, ms':>17} {'holds, MiB':>11}")
    for count, rows in zip(counts, zip(*measured)):
        took, held = (statistics.median(column) for column in zip(*rows))
        print(f"{count or 'stock':>10} {1000 * took:17.1f} {held:11.2f}")


def main(blocks: int) -> None:
    settings = dict(
        line.split("=", 1)
        for line in (ROOT / "examples" / "cpu.env").read_text().splitlines()
        if line and not line.startswith("#")
    )
    os.environ |= settings | {"PYTHONWARNINGS": "ignore", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    os.environ["TORCH_EXTENSIONS_DIR"] = str(BIN.parent / "cache" / "torch_extensions")
    port, folder = 20_000 + os.getpid() % 20_000, tempfile.mkdtemp(prefix="pama-", dir="/tmp")
    server = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", f"--port={port}", "--num-gpus=8", "--num-cpus=16"]
        + ["--include-dashboard=false", f"--temp-dir={folder}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    try:
        while subprocess.run([BIN / "ray", "health-check"], capture_output=True).returncode:
            if server.poll() is not None:
                sys.exit("Ray did not start")
            time.sleep(1)
        against_stock(blocks)
        by_objectives()
    finally:
        server.terminate()
        server.wait(60)
    on_the_driver()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)

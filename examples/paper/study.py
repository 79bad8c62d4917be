"""Train the runs of the study, and collect what is committed of them.

    python examples/paper/study.py A | B        trains; can be interrupted and started again
    python examples/paper/study.py collect      runs/study/ -> examples/paper/results/

At any time all tasks of a stage have the same seeds, so a stage that is cut short can be reported. Runs that are in
results/ are not made again, whatever machine made them.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from design import ARMS, COVERAGE, FLAGS, MODELS, SHARED, STAGES, STEPS, TASKS, Stage, Task

from pama_plugin.runs.logs import RESULT
from pama_plugin.runs.rollouts import read_rollouts

OUT, RESULTS = Path("runs/study"), Path(__file__).parent / "results"
EVERY = 5  # steps between the values of what is not an endpoint
SPARSE = {
    "conflict_rate": "pama/conflict_rate",
    "active_fraction": "pama/active_fraction",
    "tokens": "rollout/response_length_mean",
    "cut_off": "rollout/truncated_rate",
}
LAST = 5  # steps, over which the spread at the end is averaged


class Sweep(NamedTuple):
    """Rules × seeds on one task, for ``pama sweep``."""

    folder: Path
    task: str
    rules: dict[str, str]
    seeds: list[int]

    def write(self) -> Path:
        task = TASKS[self.task]
        content = {
            "flags": f"{SHARED} --actor.model_name_or_path {MODELS[task.policy]} {FLAGS[task.policy]} "
            f"--data.max_samples {8 * STEPS[task.policy]}",
            "objectives": task.objectives | task.monitors,
            "seeds": self.seeds,
            "grids": [{"rules": self.rules}],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "sweep.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False, width=110))
        return file


def sweeps(name: str, stage: Stage) -> Iterator[Sweep]:
    """All tasks with the first seeds, then with the next ones."""
    for start in range(0, len(stage.seeds), stage.at_once):
        seeds = list(stage.seeds[start : start + stage.at_once])
        for task in stage.tasks:
            rules = {arm: flags for arm, flags in stage.arms.items() if task in stage.only.get(arm, stage.tasks)}
            yield Sweep(OUT / name / task, task, rules, seeds)


def missing(name: str, sweep: Sweep) -> Sweep:
    """The sweep without the arms of which results/ has all seeds."""
    known = {(run["arm"], run["seed"]) for run in published(name, sweep.task)["runs"]}
    left = {arm: flags for arm, flags in sweep.rules.items() if not {(arm, seed) for seed in sweep.seeds} <= known}
    return sweep._replace(rules=left)


def published(name: str, task: str) -> dict[str, Any]:
    """What results/ has of a task: its ``runs``, and the ``flags`` of its arms."""
    file = RESULTS / f"{name}-{task}.json"
    return json.loads(file.read_text()) if file.exists() else {"runs": [], "flags": {}}


def train(name: str) -> int:
    stage = STAGES[name]
    failed = 0
    for sweep in [missing(name, sweep) for sweep in sweeps(name, stage)]:
        if not sweep.rules:
            continue
        print(f"== {name}: {sweep.task}, seeds {', '.join(map(str, sweep.seeds))}", flush=True)
        command = ["pama", "sweep", str(sweep.write()), "--out", str(sweep.folder), "--jobs", str(stage.jobs)]
        if subprocess.run(command, check=False).returncode:  # once more, as the protocol says
            failed |= subprocess.run(command, check=False).returncode
        for result in sweep.folder.glob(f"*/{RESULT}"):
            shutil.rmtree(result.with_name("model"), ignore_errors=True)  # tens of gigabytes in all
    return failed


def collect() -> None:
    """One file per stage and task: the endpoints' series in every step, others in every fifth, and two answers."""
    RESULTS.mkdir(exist_ok=True)
    for name, stage in STAGES.items():
        for task in stage.tasks:
            files = sorted((OUT / name / task).glob(f"*/{RESULT}"))
            results = [json.loads(file.read_text()) for file in files]
            before = published(name, task)
            runs = {(run["arm"], run["seed"]): run for run in before["runs"]}
            for file, result in zip(files, results):
                runs.setdefault((result["arm"], result["seed"]), reduced(file.parent, result, TASKS[task]))
            flags = before["flags"] | {result["arm"]: " ".join(result["flags"]) for result in results}
            dump(name, task, TASKS[task], stage.arms, flags, [runs[key] for key in sorted(runs)])
    runs = [reduced_without_host(json.loads(file.read_text())) for file in sorted((OUT / "C").glob("*.json"))]
    dump("C", "summary", TASKS["summary"]._replace(monitors={}), ARMS, {}, runs)


def dump(
    stage: str, name: str, task: Task, arms: Iterable[str], flags: dict[str, str], runs: list[dict[str, Any]]
) -> None:
    if not runs:
        return
    content = {
        "stage": stage,
        "task": name,
        "objectives": list(task.objectives),
        "monitors": list(task.monitors),
        "arms": [arm for arm in arms if any(run["arm"] == arm for run in runs)],
        "flags": flags,  # of the last seed
        "runs": runs,
    }
    lines = json.dumps(content, ensure_ascii=False).replace('{"arm"', '\n{"arm"')  # a line per run
    (RESULTS / f"{stage}-{name}.json").write_text(lines + "\n")
    print(f"{stage} {name}: {len(runs)} runs")


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def reduced_without_host(result: dict[str, Any]) -> dict[str, Any]:
    steps = result["steps"]
    names = list(COVERAGE)
    keys = {"nats": "nats", "nll": "reference_nll", "correlation": "group_correlation"}
    return {
        "arm": result["arm"],
        "seed": result["seed"],
        "start_std": dict(zip(names, steps[0]["spread"])),
        "series": {f"reward/{name}": [step["rewards"][index] for step in steps] for index, name in enumerate(names)}
        | {name: [step[key] for step in steps] for name, key in keys.items()},
        "sparse": {name: [step[name] for step in steps[::EVERY]] for name in ("conflict_rate", "tokens")}
        | {f"spread/{name}": [step["spread"][index] for step in steps[::EVERY]] for index, name in enumerate(names)},
        "last_spread": {
            name: rounded(fmean(step["spread"][index] for step in steps[-LAST:]) / steps[0]["spread"][index])
            for index, name in enumerate(names)
        },
        "texts": [
            {"step": at + 1, "prompt": steps[at]["texts"][0][0], "response": steps[at]["texts"][0][1]}
            for at in (0, len(steps) - 1)
        ],
    }


def reduced(folder: Path, result: dict[str, Any], task: Task) -> dict[str, Any]:
    scalars = {tag: dict(points) for tag, points in result["scalars"].items()}
    steps = sorted(scalars["pama/kl_response"])

    def values(tag: str, at: list[int]) -> list[float | None]:
        return [rounded(value) if (value := scalars[tag].get(step)) is not None else None for step in at]

    pairs = [f"pama/group_correlation/{one}/{other}" for one, other in combinations(task.objectives, 2)]
    names = [*task.objectives, *task.monitors]
    answers = [one for one in read_rollouts(folder) if one.sample == 0 and one.step in (steps[0], steps[-1])]
    return {
        "arm": result["arm"],
        "seed": result["seed"],
        "version": result["version"],
        "seconds": result["seconds"],
        "start_std": {name: values(f"reward_std/{name}", steps[:1])[0] for name in names},
        "series": {f"reward/{name}": values(f"reward/{name}", steps) for name in names}
        | {"nats": values("pama/kl_response", steps), "nll": values("pama/reference_nll", steps)}
        | {"correlation": [rounded(fmean(scalars[tag].get(step, math.nan) for tag in pairs)) for step in steps]},
        "sparse": {key: values(tag, steps[::EVERY]) for key, tag in SPARSE.items()}
        | {f"spread/{name}": values(f"pama/spread/{name}", steps[::EVERY]) for name in task.objectives},
        "last_spread": {
            name: rounded(fmean(scalars[f"pama/spread/{name}"][step] for step in steps[-LAST:]))
            for name in task.objectives
        },
        "texts": [{"step": one.step, "prompt": one.prompt, "response": one.response} for one in answers],
    }


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["collect"]:
            collect()
        case [name] if name in STAGES:
            sys.exit(train(name))
        case _:
            raise SystemExit(__doc__)

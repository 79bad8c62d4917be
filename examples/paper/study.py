"""Train the runs of the study, and collect what is committed of them.

    python examples/paper/study.py tune | A | B        trains; can be interrupted and started again
    python examples/paper/study.py collect             runs/study/ -> examples/paper/results/

At any time all tasks of a stage have the same seeds, so a stage that is cut short can be reported.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from design import FLAGS, MODELS, SHARED, STAGES, STEPS, TASKS, Stage, Task

from pama_plugin.runs.logs import RESULT
from pama_plugin.runs.rollouts import read_rollouts

OUT, RESULTS = Path("runs/study"), Path(__file__).parent / "results"
EVERY = 5  # steps between the values of what is not an endpoint
SPARSE = {
    "conflict_rate": "pama/conflict_rate",
    "active_fraction": "pama/active_fraction",
    "words": "rollout/response_length_mean",
    "cut_off": "rollout/truncated_rate",
}


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
        for task in stage.tasks:
            rules = {arm: flags for arm, flags in stage.arms.items() if task in stage.only.get(arm, stage.tasks)}
            yield Sweep(OUT / name / task, task, rules, list(stage.seeds[start : start + stage.at_once]))


def train(name: str) -> int:
    stage = STAGES[name]
    failed = 0
    for sweep in sweeps(name, stage):
        print(f"== {name}: {sweep.task}, seeds {', '.join(map(str, sweep.seeds))}", flush=True)
        command = ["pama", "sweep", str(sweep.write()), "--out", str(sweep.folder), "--jobs", str(stage.jobs)]
        failed |= subprocess.run(command, check=False).returncode
        for model in sweep.folder.glob("*/model"):  # tens of gigabytes in all
            shutil.rmtree(model)
    return failed


def collect() -> None:
    """One file per task: the endpoints' series in every step, others in every fifth, and two answers."""
    RESULTS.mkdir(exist_ok=True)
    for name, stage in STAGES.items():
        for task in stage.tasks if stage.reported else ():
            files = sorted((OUT / name / task).glob(f"*/{RESULT}"))
            if not files:
                continue
            results = [json.loads(file.read_text()) for file in files]
            content = {
                "stage": name,
                "objectives": list(TASKS[task].objectives),
                "monitors": list(TASKS[task].monitors),
                "flags": {
                    result["arm"]: " ".join(result["flags"]) for result in results if result["seed"] == stage.seeds[0]
                },
                "runs": [reduced(file.parent, result, TASKS[task]) for file, result in zip(files, results)],
            }
            lines = json.dumps(content).replace('{"arm"', '\n{"arm"')  # a line per run
            (RESULTS / f"{task}.json").write_text(lines + "\n")
            print(f"{task}: {len(files)} runs")


def reduced(folder: Path, result: dict[str, Any], task: Task) -> dict[str, Any]:
    scalars = {tag: dict(points) for tag, points in result["scalars"].items()}
    steps = sorted(scalars["pama/kl_response"])

    def values(tag: str, at: list[int]) -> list[float | None]:
        return [float(f"{value:.4g}") if (value := scalars[tag].get(step)) is not None else None for step in at]

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
        | {"correlation": [float(f"{fmean(scalars[tag].get(step, 0.0) for tag in pairs):.4g}") for step in steps]},
        "sparse": {key: values(tag, steps[::EVERY]) for key, tag in SPARSE.items()}
        | {f"spread/{name}": values(f"pama/spread/{name}", steps[::EVERY]) for name in task.objectives},
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

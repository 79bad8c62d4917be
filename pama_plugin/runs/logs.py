"""Runs as their TensorBoard logs, or a sweep's results, have them."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pama_plugin.errors import ConfigError

Series = list[tuple[int, float]]
COEFFICIENT, REWARD = "pama/coefficient/", "reward/"
SPEC, RESULT = "run.json", "result.json"  # of a run of a sweep: its settings, and once it is finished its metrics


@dataclass(frozen=True)
class Run:
    """One run, finished or not.

    Attributes:
        folder: where it was read from.
        arm: what it shares with the runs that differ in the seed alone; the folder's name outside of a sweep.
        rule: the arm without its weights.
        seed: None outside of a sweep.
        scalars: tag, without the host's prefix ``train/``, → (step, value) in the order of the steps.
        problems: what is missing of it, in words.
    """

    folder: Path
    arm: str
    rule: str
    seed: int | None
    scalars: dict[str, Series]
    problems: tuple[str, ...]

    @property
    def trained(self) -> list[str]:
        """The objectives that were combined, sorted: the host logs in an order of its own, another one in each run."""
        return sorted(tag.removeprefix(COEFFICIENT) for tag in self.scalars if tag.startswith(COEFFICIENT))

    @property
    def scored(self) -> list[str]:
        """Those, then the objectives that were only watched."""
        found = sorted(tag.removeprefix(REWARD) for tag in self.scalars if tag.startswith(REWARD))
        return [*self.trained, *(name for name in found if name not in self.trained)]

    @property
    def steps(self) -> int:
        return max((series[-1][0] for series in self.scalars.values() if series), default=0)


def find_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs in these folders, a sweep's own each, and what is wrong with those that cannot be shown.

    Raises:
        ConfigError: there is not one run to show.
    """
    runs, missing = [], []
    for folder in folders:
        for place in list(_places(folder)):
            try:
                run = read_run(place)
            except ConfigError as error:
                missing.append(str(error))
            else:
                runs.append(run)
                missing += [f"{place}: {problem}" for problem in run.problems]
    if not runs:
        raise ConfigError("; ".join(missing) or "no run was named")
    return runs, missing


def _places(folder: Path) -> Iterator[Path]:
    of_sweep = sorted(path.parent for name in (SPEC, RESULT) for path in folder.rglob(name))
    yield from dict.fromkeys(of_sweep) or [folder]


def read_run(folder: Path) -> Run:
    """One run: its result if a sweep finished it, else its events so far.

    Raises:
        ConfigError: there is nothing of a run with objectives in the folder.
    """
    spec: dict[str, Any] = {"arm": folder.name, "rule": folder.name, "seed": None}
    for name in (SPEC, RESULT):
        if (folder / name).exists():
            try:
                spec |= json.loads((folder / name).read_text())
            except ValueError as error:
                raise ConfigError(f"{folder / name} is not JSON: {error}") from error
    if "scalars" in spec:
        scalars = {tag: [(int(step), float(value)) for step, value in own] for tag, own in spec["scalars"].items()}
    else:
        scalars = read_scalars(folder)
    problems = []
    run = Run(folder, spec["arm"], spec["rule"], spec["seed"], scalars, ())
    if (folder / SPEC).exists() and not (folder / RESULT).exists():
        problems.append(f"not finished, {run.steps} steps so far")
    for name in run.trained:
        series = scalars.get(f"{REWARD}{name}", [])
        if not series:
            problems.append(f"reward/{name} is not logged")
        elif broken := sum(not math.isfinite(value) for _, value in series):
            problems.append(f"reward/{name} is not a number in {broken} of {len(series)} steps")
    return replace(run, problems=tuple(problems))


def read_scalars(folder: Path) -> dict[str, Series]:
    """Every scalar of the newest run in a ``--logger.tensorboard_dir``, without the host's prefix ``train/``.

    A run that was resumed has several files in one folder; where they repeat a step, the later one counts.

    Raises:
        ConfigError: the folder has no event file, or none of a run with objectives.
    """
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ConfigError(f"no TensorBoard events in {folder}: give the folder that --logger.tensorboard_dir named")
    events = EventAccumulator(str(files[-1].parent), size_guidance={"scalars": 0})  # 0: keep every step
    events.Reload()
    tags = events.Tags()["scalars"]
    if not any(tag.startswith(f"train/{COEFFICIENT}") for tag in tags):
        raise ConfigError(f"{files[-1]} is not the log of a run with --loss: it has no {COEFFICIENT}<name>")
    return {
        tag.removeprefix("train/"): sorted({event.step: event.value for event in events.Scalars(tag)}.items())
        for tag in tags
    }

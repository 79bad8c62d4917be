"""Read runs from TensorBoard logs or from the results of a sweep."""

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
SPEC, RESULT = "run.json", "result.json"  # files of a run in a sweep: its settings, and its metrics once finished


@dataclass(frozen=True)
class Run:
    """One run, finished or not.

    Attributes:
        folder: the folder that it was read from.
        arm: name shared by runs that differ in the seed only; the name of the folder outside a sweep.
        rule: the arm without its weights.
        seed: None outside a sweep.
        scalars: tag, without OpenRLHF's prefix ``train/``, → (step, value), sorted by step.
        problems: descriptions of missing or invalid data.
    """

    folder: Path
    arm: str
    rule: str
    seed: int | None
    scalars: dict[str, Series]
    problems: tuple[str, ...]

    @property
    def trained(self) -> list[str]:
        """The objectives that were combined, sorted, because the order in the log differs between runs."""
        return sorted(tag.removeprefix(COEFFICIENT) for tag in self.scalars if tag.startswith(COEFFICIENT))

    @property
    def scored(self) -> list[str]:
        """``trained``, followed by the monitored objectives."""
        rewards = sorted(tag.removeprefix(REWARD) for tag in self.scalars if tag.startswith(REWARD))
        return [*self.trained, *(name for name in rewards if name not in self.trained)]

    @property
    def steps(self) -> int:
        return max((series[-1][0] for series in self.scalars.values() if series), default=0)


def find_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs in the folders, including all runs of a sweep, and the problems of incomplete or unreadable runs.

    Raises:
        ConfigError: no run can be read.
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
        raise ConfigError("; ".join(missing) or "at least one run is needed, found none")
    return runs, missing


def _places(folder: Path) -> Iterator[Path]:
    of_sweep = sorted(path.parent for name in (SPEC, RESULT) for path in folder.rglob(name))
    yield from dict.fromkeys(of_sweep) or [folder]


def read_run(folder: Path) -> Run:
    """One run: its result if a sweep finished it, else its TensorBoard events so far.

    Raises:
        ConfigError: the folder has no data of a run with objectives.
    """
    spec: dict[str, Any] = {"arm": folder.name, "rule": folder.name, "seed": None}
    for name in (SPEC, RESULT):
        if (folder / name).exists():
            try:
                spec |= json.loads((folder / name).read_text())
            except ValueError as error:
                raise ConfigError(f"{folder / name} is not JSON: {error}") from error
    if "scalars" in spec:
        scalars = {tag: [(int(step), float(value)) for step, value in rows] for tag, rows in spec["scalars"].items()}
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
    """All scalars of the newest run in a ``--logger.tensorboard_dir``, without OpenRLHF's prefix ``train/``.

    A resumed run has several files in one folder; if they repeat a step, the later value is used.

    Raises:
        ConfigError: the folder has no event file, or the newest run has no objectives.
    """
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ConfigError(f"no TensorBoard events in {folder}: give the folder of --logger.tensorboard_dir")
    events = EventAccumulator(str(files[-1].parent), size_guidance={"scalars": 0})  # 0: keep every step
    events.Reload()
    tags = events.Tags()["scalars"]
    if not any(tag.startswith(f"train/{COEFFICIENT}") for tag in tags):
        raise ConfigError(f"{files[-1]} is not the log of a run with --loss: it has no {COEFFICIENT}<name>")
    return {
        tag.removeprefix("train/"): sorted({event.step: event.value for event in events.Scalars(tag)}.items())
        for tag in tags
    }

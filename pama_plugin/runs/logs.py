"""Read runs from TensorBoard logs or from the results of a sweep."""

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

from google.protobuf.message import DecodeError
from pydantic import BaseModel, Field, ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pama_plugin.batch.alarms import Alarms
from pama_plugin.batch.keys import COEFFICIENT, REWARD
from pama_plugin.errors import ConfigError, printable

Series = list[tuple[int, float]]
SPEC, RESULT = "run.json", "result.json"  # files of a run in a sweep: its settings, and its metrics once finished


class Spec(BaseModel):
    """What a run of a sweep is, as far as a report needs it."""

    arm: str = ""  # default: see ``_as_run``
    rule: str = ""
    seed: int | None = None


class Result(Spec):
    """A spec with the metrics of the finished run: tag → (step, value), sorted by step."""

    scalars: dict[str, Annotated[Series, Field(min_length=1)]]


File = TypeVar("File", bound=BaseModel)


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
    def name(self) -> str:
        """The arm, with the seed in a sweep."""
        return self.arm if self.seed is None else f"{self.arm}, seed {self.seed}"

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
    problems = []
    if (folder / RESULT).exists():
        result = read_result(folder / RESULT)
        run = _as_run(folder, result, result.scalars)
    else:
        spec = _read(Spec, folder / SPEC) if (folder / SPEC).exists() else Spec()
        run = _as_run(folder, spec, read_scalars(folder))
    if (folder / SPEC).exists() and not (folder / RESULT).exists():
        problems.append(f"not finished, {run.steps} steps so far")
    steps = sorted({step for name in run.trained for step, _ in run.scalars[f"{COEFFICIENT}{name}"]})
    interval = _interval(steps)
    if steps and (missing := steps[-1] // interval - len(steps)) > 0:
        problems.append(f"{missing} of the steps {interval} to {steps[-1]} are missing")
    for name in run.trained:
        series = run.scalars.get(f"{REWARD}{name}", [])
        if not series:
            problems.append(f"reward/{name} is not logged")
        elif broken := sum(not math.isfinite(value) for _, value in series):
            problems.append(f"reward/{name} is not a number in {broken} of {len(series)} steps")
    return replace(run, problems=tuple(problems))


def _as_run(folder: Path, spec: Spec, scalars: dict[str, Series]) -> Run:
    """The run, which outside a sweep has the name of its folder, or of the one above if that is a folder of logs."""
    place = folder.resolve()
    default = place.parent.name if place.name in ("logs", "tensorboard") else place.name
    arm, rule = (printable(name, len(name)) for name in (spec.arm or default, spec.rule or default))
    return Run(folder, arm, rule, spec.seed, scalars, ())


def read_result(file: Path) -> Result:
    """The result of a run of a sweep.

    Raises:
        ConfigError: the file is broken.
        FileNotFoundError: there is none.
    """
    return _read(Result, file)


def _read(model: type[File], file: Path) -> File:
    try:
        return model.model_validate_json(file.read_bytes())
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{file}: {where or 'the file'}: {first['msg']}, found {first['input']!r:.100}") from error


def alarms_of(run: Run) -> list[str]:
    """The alarms that the run set off, each with its step; with --logger.logging_steps N of every N-th step alone."""
    by_step: dict[int, dict[str, float]] = {}
    for tag, series in run.scalars.items():
        for step, value in series:
            by_step.setdefault(step, {})[tag] = value
    alarms = Alarms(run.trained, [name for name in run.scored if name not in run.trained])
    return [f"step {step}: {alarm}" for step in sorted(by_step) for alarm in alarms.read(by_step[step])]


def _interval(steps: list[int]) -> int:
    """--logger.logging_steps, from the logged steps in order."""
    return min((later - step for step, later in zip(steps, steps[1:])), default=1)


def read_evaluation(folder: Path) -> dict[str, float]:
    """The metrics of the last evaluation in a ``--logger.tensorboard_dir``, without OpenRLHF's prefix ``eval/``.

    Raises:
        ConfigError: the events cannot be read.
    """
    metrics: dict[str, float] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        try:
            events.Reload()
        except (DecodeError, OSError) as error:
            raise ConfigError(f"cannot read the TensorBoard events in {file}: {error}") from error
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("eval/")]
        metrics |= {tag.removeprefix("eval/"): events.Scalars(tag)[-1].value for tag in tags}
    return metrics


def read_scalars(folder: Path) -> dict[str, Series]:
    """All scalars of the newest run in a ``--logger.tensorboard_dir``, without OpenRLHF's prefix ``train/``.

    OpenRLHF names a log by the minute, so a resumed run has several. A log that starts later continues the one before
    it if that has the step before and the same objectives; of its steps those until there are used. If several have a
    step, the latest value is used.

    Raises:
        ConfigError: the folder has no event file, or the newest run has no objectives.
    """
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not files:
        raise ConfigError(f"no TensorBoard events in {folder}: give the folder of --logger.tensorboard_dir")
    scalars: dict[str, dict[int, float]] = {}
    start, interval = sys.maxsize, 1  # the first step that was read, and that between two steps
    objectives: set[str] | None = None  # of the run
    for log in dict.fromkeys(file.parent for file in files):
        events = EventAccumulator(str(log), size_guidance={"scalars": 0})  # 0: keep every step
        try:
            events.Reload()
        except (DecodeError, OSError) as error:
            raise ConfigError(f"cannot read the TensorBoard events in {log}: {error}") from error
        tags = events.Tags()["scalars"]
        coefficients = {tag for tag in tags if tag.startswith(f"train/{COEFFICIENT}")}
        if not coefficients and any(tag.startswith("train/") for tag in tags):
            break  # a stock run
        steps = sorted({event.step for tag in coefficients for event in events.Scalars(tag)})
        if steps and objectives is not None:
            before = [step for step in steps if step < start]
            if coefficients != objectives or not before or before[-1] < start - interval:
                break  # another run
        for tag in tags:
            values = {event.step: event.value for event in events.Scalars(tag) if event.step < start}
            scalars[tag] = values | scalars.get(tag, {})
        if steps:
            objectives = coefficients
            interval = _interval(steps)
            start = min(start, steps[0])
            if start <= interval:
                break
    if start == sys.maxsize:
        raise ConfigError(f"{files[0]} is not the log of a run with --loss: it has no {COEFFICIENT}<name>")
    return {tag.removeprefix("train/"): sorted(values.items()) for tag, values in scalars.items() if values}

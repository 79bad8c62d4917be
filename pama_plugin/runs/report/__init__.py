"""``pama report``: tables, figures and an HTML page from the logs of runs."""

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot
from rich.console import Console

from pama_plugin.errors import ConfigError
from pama_plugin.runs.logs import Run, alarms_of, find_runs
from pama_plugin.runs.report.figures import draw_curves, draw_front, draw_paths
from pama_plugin.runs.report.front import find_front
from pama_plugin.runs.report.page import write_page
from pama_plugin.runs.report.pareto import by_arm, starts
from pama_plugin.runs.report.preferences import Steering, draw_steering, read_steering, steering_tables
from pama_plugin.runs.report.tables import (
    arms_table,
    differences_table,
    draw_table,
    front_table,
    objectives_table,
    shared_objectives,
    without_empty_columns,
)
from pama_plugin.runs.report.texts import Exchange, best_and_worst, early_and_late
from pama_plugin.runs.rollouts import FILE, read_rollouts

__all__ = ["report_runs"]


def report_runs(
    folders: Sequence[Path], out: Path | None = None, reference: Sequence[str] = (), baseline: str | None = None
) -> None:
    """Print tables of the runs; write ``curves.png``, ``paths.png``, ``front.png``, ``report.html``, and
    ``preferences.png`` of runs whose policy follows preferences.

    Args:
        folders: ``--logger.tensorboard_dir`` of a run, or the folder of a sweep.
        out: output folder. Default: the first of ``folders``.
        reference: ``NAME=VALUE`` for every objective, the reference point of the hypervolume, if there are several
            arms. Default: the rewards before the first update.
        baseline: the arm that all others are compared with, paired over seeds.

    Raises:
        ConfigError: no run can be read, the reference is invalid, or no arm has the name of the baseline.
    """
    runs, missing = find_runs(folders)
    out = out or folders[0]
    out.mkdir(parents=True, exist_ok=True)
    console = Console(markup=False, emoji=False)  # names of rules and folders are text: pama[soft=4]
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120  # rich would take 80, too narrow for the tables
    grids, names = [objectives_table(runs), arms_table(runs)], shared_objectives(runs)
    comparable = len(names) > 1 and len(by_arm(runs)) > 1
    if comparable:
        point = _parse_reference(reference, names) if reference else starts(runs, names).tolist()
        grids.append(front_table(runs, names, point))
    if baseline is not None:
        if not names:
            raise ConfigError("--baseline needs an objective that all runs train, found none")
        grids.append(differences_table(runs, names, baseline))
    steering = _steering(runs, missing)
    if steering:
        grids += steering_tables(steering)
    grids = [without_empty_columns(grid) for grid in grids]
    figures = {"curves": draw_curves(runs)}
    if len(names) > 1 and (paths := draw_paths(runs, names)):
        figures["paths"] = paths
    if comparable:
        figures["front"] = draw_front(runs, names, point)
    if steering:
        figures["preferences"] = draw_steering(steering)
    pictures = [out / f"{name}.png" for name in figures]
    for figure, picture in zip(figures.values(), pictures):
        figure.savefig(picture, dpi=120)
        pyplot.close(figure)
    alarms = [f"{run.name}: {alarm}" for run in runs for alarm in alarms_of(run)]
    front = find_front(runs[0]) if len(runs) == 1 else None  # the table has those of many runs
    front_of_run = f"{runs[0].name}: {front}" if front else ""
    title = f"{len(runs)} runs, {', '.join(names)}" if len(runs) > 1 else f"{runs[0].arm}: {runs[0].steps} steps"
    texts = _texts(runs, missing)
    write_page(out / "report.html", title, grids, pictures, missing, alarms, front_of_run, texts)
    for grid in grids:
        console.print(draw_table(grid))
    for line in alarms:
        console.print(f"alarm: {line}", style="red", soft_wrap=True)
    if front_of_run:
        console.print(f"front: {front_of_run}", soft_wrap=True)
    for line in missing:
        console.print(f"missing: {line}", style="yellow", soft_wrap=True)
    for path in [*pictures, out / "report.html"]:
        console.print(str(path), soft_wrap=True)


def _steering(runs: Sequence[Run], missing: list[str]) -> list[Steering]:
    """The runs whose policies follow preferences; one that cannot be read is ``missing``."""
    found = []
    for run in runs:
        try:
            found.append(read_steering(run))
        except ConfigError as error:
            missing.append(str(error))
    return [each for each in found if each is not None]


def _texts(runs: Sequence[Run], missing: list[str]) -> list[tuple[str, list[Exchange]]]:
    """What the policies wrote, of runs with a log of their rollouts; a log that cannot be read is ``missing``."""
    found = []
    for run in runs:
        if not any(run.folder.rglob(FILE)):
            continue
        try:
            rollouts = read_rollouts(run.folder)
        except ConfigError as error:
            missing.append(str(error))
            continue
        if both := early_and_late(rollouts):
            found.append((f"{run.name}: the same prompts early and late", both))
        for heading, exchange in best_and_worst(rollouts, run.scored):
            found.append((f"{run.name}: {heading} of the last fifth", [exchange]))
    return found


def _parse_reference(reference: Sequence[str], names: Sequence[str]) -> list[float]:
    values: dict[str, float] = {}
    for text in reference:
        name, _, value = text.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            raise ConfigError(f"--reference must be NAME=NUMBER, found {text!r}") from None
    if set(values) != set(names):
        raise ConfigError(f"--reference must name {', '.join(names)}, found {', '.join(values)}")
    return [values[name] for name in names]

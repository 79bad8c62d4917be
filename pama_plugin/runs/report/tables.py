"""The tables of a report: rewards and metrics per objective and arm, the Pareto front, differences between arms."""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table

from pama_plugin.batch.keys import COEFFICIENT, COSINE, GAIN, PAMA, REWARD, REWARD_STD
from pama_plugin.errors import ConfigError
from pama_plugin.runs.logs import Run, Series
from pama_plugin.runs.report.front import find_front
from pama_plugin.runs.report.pareto import (
    Interval,
    by_arm,
    ends,
    fifth,
    indicators,
    interval,
    last_fifth,
    nondominated,
    paired,
    starts,
)

SENTENCE = re.compile(r"(?<=\.) (?=[A-Z])")  # the space between two sentences
WHOLE_RUN = ("active_fraction", "conflict_rate", "effective_objectives")
OF_THE_HOST = {"kl": "KL", "response_length": "response length", "entropy_loss": "entropy"}


class Grid(NamedTuple):
    """A table, to be drawn on the console or on the page."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


def objectives_table(runs: Sequence[Run]) -> Grid:
    """Arm × objective: reward in the first and last fifth of the steps, coefficient, gain and cosine over the run."""
    rows = []
    for arm, arm_runs in by_arm(runs).items():
        for name in dict.fromkeys(name for run in arm_runs for name in run.scored):
            row = [arm, name]
            for last in (False, True):
                row.append(_over(arm_runs, f"{REWARD}{name}", last=last))
            rises = [_at(run, f"{REWARD}{name}", True) - _at(run, f"{REWARD}{name}", False) for run in arm_runs]
            row.append(str(interval(_known(rises))))
            for key in (COEFFICIENT, GAIN, COSINE):
                row.append(_mean(arm_runs, f"{key}{name}"))
            rows.append(row)
    return Grid(
        "objectives",
        ["arm", "objective", "first fifth", "last fifth", "rise", "coefficient", "gain", "cosine"],
        rows,
        "Reward: mean over the first and last fifth of the steps, ± half of the 95 % interval over seeds. Others: mean "
        "over the run. Cosine: of the gradients of the update and of the objective (--pama.probe_gradients).",
    )


def arms_table(runs: Sequence[Run]) -> Grid:
    """Arm × metrics of the run: active fraction, conflict rate, effective objectives, KL, length, entropy, front."""
    columns = ["arm", "runs", "steps", *(key.replace("_", " ") for key in WHOLE_RUN), *OF_THE_HOST.values()]
    caption = (
        "Active fraction, conflict rate, effective objectives: mean over the run. Others: mean over its last fifth. "
        "KL: kl as OpenRLHF logs it, by --algo.kl.estimator."
    )
    rows = []
    for arm, arm_runs in by_arm(runs).items():
        row = [arm, str(len(arm_runs)), str(min(run.steps for run in arm_runs))]
        row += [_mean(arm_runs, f"{PAMA}{key}") for key in WHOLE_RUN]
        rows.append(row + [_over(arm_runs, tag, last=True) for tag in OF_THE_HOST])
    fronts = [find_front(run) for run in runs]
    if any(fronts):
        columns.append("at front")
        caption += " At front: runs that were there at the end, and since which step."
        for row in rows:
            steps = [front.step for run, front in zip(runs, fronts) if front and run.arm == row[0]]
            arrived = [str(step) for step in steps if step is not None]
            row.append(f"{len(arrived)} of {len(steps)}{':' * bool(arrived)} {', '.join(arrived)}".rstrip())
    return Grid("runs", columns, rows, caption)


def front_table(runs: Sequence[Run], names: Sequence[str], reference: Sequence[float]) -> Grid:
    """Arm × whether its mean final rewards are on the front, its worst rise, and the indicators of its rule.

    The indicators are of all arms of a rule, one set of points per seed. The front for IGD+ and ε consists of the mean
    final rewards of all arms.
    """
    arms = by_arm(runs)
    means = np.array([ends(arm_runs, names).mean(0) for arm_runs in arms.values()])
    kept = nondominated(means)
    rules: dict[str, list[Run]] = {}
    for run in runs:
        rules.setdefault(run.rule, []).append(run)
    rows = []
    for (arm, arm_runs), on_front in zip(arms.items(), kept):
        row = [arm, "yes" if on_front else "", str(interval(worst_rises(arm_runs, names, runs)))]
        seeds: dict[int | None, list[Run]] = {}
        for run in rules.pop(arm_runs[0].rule, []):  # in the first row of a rule
            seeds.setdefault(run.seed, []).append(run)
        per_seed = [indicators(ends(group, names), means[kept], reference) for group in seeds.values()]
        row += [str(interval(list(column))) for column in zip(*per_seed)] or [""] * 3
        rows.append(row)
    point = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, reference))
    return Grid(
        "Pareto front",
        ["arm", "on the front", "worst rise", "hypervolume", "IGD+", "additive ε"],
        rows,
        "Worst rise: smallest rise of an objective since the first step, in standard deviations of its rewards in that "
        f"step. Hypervolume above {point}. The last three columns are of all arms of a rule.",
    )


def differences_table(
    runs: Sequence[Run],
    names: Sequence[str],
    baseline: str,
    measure: Callable[[Series], float] = last_fifth,
    what: str = "last fifth of the steps",
) -> Grid:
    """Arm × difference to the baseline in every reward and in the worst rise, paired over seeds.

    Args:
        runs: runs of a sweep; the runs of an arm must have different seeds.
        names: the objectives of the worst rise.
        baseline: name of an arm.
        measure: maps the series of a reward to a number.
        what: description of the measure.

    Raises:
        ConfigError: the baseline is not an arm, or two runs of an arm have the same seed or none.
    """
    arms = by_arm(runs)
    if baseline not in arms:
        raise ConfigError(f"--baseline must be one of {', '.join(arms)}, found {baseline!r}")
    for arm, arm_runs in arms.items():
        seeds = [run.seed for run in arm_runs]
        if None in seeds or len(set(seeds)) < len(seeds):
            listed = ", ".join(map(str, seeds))
            raise ConfigError(f"--baseline needs one run of a sweep per arm and seed, found {arm!r} with {listed}")
    scored = shared_rewards(runs)
    columns = {
        arm: [*ends(arm_runs, scored, measure).T.tolist(), worst_rises(arm_runs, names, runs, measure)]
        for arm, arm_runs in arms.items()
    }
    rows = []
    for arm in arms:
        if arm == baseline:
            continue
        differences = [
            paired(_by_seed(arms[arm], values), _by_seed(arms[baseline], baseline_values))
            for values, baseline_values in zip(columns[arm], columns[baseline])
        ]
        cells = [f"{_text(difference)}{' *' * difference.excludes_zero}" for difference in differences]
        rows.append([arm, str(max(difference.n for difference in differences)), *cells])
    return Grid(
        f"against {baseline}",
        ["arm", "seeds", *scored, "worst rise"],
        rows,
        f"{what.capitalize()}: arm minus {baseline} with the same seed, ± half of the 95 % interval over seeds; * if "
        "it excludes zero. Not corrected for the number of comparisons.",
    )


def _by_seed(runs: Sequence[Run], values: Sequence[float]) -> dict[int, float]:
    return {run.seed: value for run, value in zip(runs, values) if run.seed is not None and not math.isnan(value)}


def worst_rises(
    arm_runs: Sequence[Run], names: Sequence[str], runs: Sequence[Run], measure: Callable[[Series], float] = last_fifth
) -> list[float]:
    """The smallest rise of an objective, for each run of an arm, since the first step, in standard deviations there."""
    rises: list[float] = ((ends(arm_runs, names, measure) - starts(runs, names)) / spreads(runs, names)).min(1).tolist()
    return rises


def spreads(runs: Sequence[Run], names: Sequence[str]) -> np.ndarray:
    """(objectives,) standard deviation of the rewards in the first step of all runs; 1 if it is 0 or not logged."""
    deviations = []
    for name in names:
        values = [run.scalars[f"{REWARD_STD}{name}"][0][1] for run in runs if run.scalars.get(f"{REWARD_STD}{name}")]
        deviations.append(float(np.mean(values)) if values and np.mean(values) > 0 else 1.0)
    return np.array(deviations)


def shared_rewards(runs: Sequence[Run]) -> list[str]:
    """The rewards that all runs log, trained objectives first."""
    return [name for name in runs[0].scored if all(run.scalars.get(f"{REWARD}{name}") for run in runs)]


def shared_objectives(runs: Sequence[Run]) -> list[str]:
    """The objectives that all runs train: the axes of the front."""
    common = set.intersection(*({name for name in run.trained if run.scalars.get(f"{REWARD}{name}")} for run in runs))
    return sorted(common)


def without_empty_columns(grid: Grid) -> Grid:
    """The table without columns of which no row has a value, and without the sentences that explain these.

    >>> without_empty_columns(Grid("t", ["arm", "cosine"], [["a", "–"], ["b", "–"]])).columns
    ['arm']
    """
    kept = [index for index in range(len(grid.columns)) if any(row[index] != "–" for row in grid.rows)]
    rows = [[row[index] for index in kept] for row in grid.rows]
    gone = {column.lower() for index, column in enumerate(grid.columns) if index not in kept}
    sentences = [part for part in SENTENCE.split(grid.caption) if part.partition(":")[0].lower() not in gone]
    return grid._replace(columns=[grid.columns[index] for index in kept], rows=rows, caption=" ".join(sentences))


def is_text(grid: Grid, column: int) -> bool:
    """Whether a column has names, which are aligned on the left.

    >>> [is_text(Grid("t", ["arm", "kl"], [["a", "0.1 ± 0.2"]]), column) for column in (0, 1)]
    [True, False]
    """
    return column == 0 or all(row[column][:1].isalpha() for row in grid.rows)


def draw_table(grid: Grid) -> Table:
    """The table for the console."""
    table = Table(title=grid.title, caption=grid.caption, padding=(0, 1, 0, 0))
    for index, column in enumerate(grid.columns):
        table.add_column(column, justify="left" if is_text(grid, index) else "right", overflow="fold")
    for row in grid.rows:
        table.add_row(*row)
    return table


def _at(run: Run, tag: str, last: bool) -> float:
    return fifth(run.scalars.get(tag, []), last=last)


def _known(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _text(value: Interval) -> str:
    return str(value) if value.n else "–"


def _over(runs: list[Run], tag: str, *, last: bool) -> str:
    return _text(interval(_known([_at(run, tag, last) for run in runs])))


def _mean(runs: list[Run], tag: str) -> str:
    """The mean over the steps of each run, then over runs."""
    values = [_known([value for _, value in run.scalars.get(tag, [])]) for run in runs]
    means = [sum(series) / len(series) for series in values if series]
    return f"{interval(means).mean:.3f}" if means else "–"

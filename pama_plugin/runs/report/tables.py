"""The tables of a report: what each run did to each objective, and what many runs say of their arms."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table

from pama_plugin.errors import ConfigError
from pama_plugin.runs.logs import Run, Series
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

WHOLE_RUN = ("active_fraction", "conflict_rate", "effective_objectives")
OF_THE_HOST = {"kl": "KL", "response_length": "response length", "entropy_loss": "entropy"}


class Grid(NamedTuple):
    """A table before it is drawn: on the console or the page."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


def objectives_table(runs: Sequence[Run]) -> Grid:
    """Arm × objective: reward in the first and last fifth of the steps, coefficient, gain and cosine over the run."""
    rows = []
    for arm, own in by_arm(runs).items():
        for name in dict.fromkeys(name for run in own for name in run.scored):
            row = [arm, name]
            for last in (False, True):
                row.append(_over(own, f"reward/{name}", last=last))
            rises = [_at(run, f"reward/{name}", True) - _at(run, f"reward/{name}", False) for run in own]
            row.append(str(interval(_known(rises))))
            for key in ("coefficient", "gain", "gradient_cosine"):
                row.append(_mean(own, f"pama/{key}/{name}"))
            rows.append(row)
    return Grid(
        "objectives",
        ["arm", "objective", "first fifth", "last fifth", "rise", "coefficient", "gain", "cosine"],
        rows,
        "Reward: mean over the first and last fifth of the steps, ± half of the 95 % interval over seeds; the others: "
        "mean over the run. Cosine: of the policy's gradient and the objective's own (--pama.probe_gradients).",
    )


def arms_table(runs: Sequence[Run]) -> Grid:
    """Arm × what the host and the aggregation log of the run: KL, length, entropy, active fraction, conflict."""
    rows = []
    for arm, own in by_arm(runs).items():
        row = [arm, str(len(own)), str(min(run.steps for run in own))]
        row += [_mean(own, f"pama/{key}") for key in WHOLE_RUN]
        rows.append(row + [_over(own, tag, last=True) for tag in OF_THE_HOST])
    columns = ["arm", "runs", "steps", *(key.replace("_", " ") for key in WHOLE_RUN), *OF_THE_HOST.values()]
    return Grid(
        "runs",
        columns,
        rows,
        "Conflict and activity: mean over the run; the rest: mean over its last fifth. KL is what the host logs as kl, "
        "by its own --algo.kl.estimator.",
    )


def front_table(runs: Sequence[Run], names: Sequence[str], reference: Sequence[float]) -> Grid:
    """Arm × whether its mean end is on the front, its worst objective, and the indicators of its rule's points.

    The indicators are of all arms of a rule, one set of points per seed; the front that IGD+ and ε are distances to is
    that of all arms' mean ends.
    """
    arms = by_arm(runs)
    means = np.array([ends(own, names).mean(0) for own in arms.values()])
    kept = nondominated(means)
    rules: dict[str, list[Run]] = {}
    for run in runs:
        rules.setdefault(run.rule, []).append(run)
    rows = []
    for (arm, own), on_front in zip(arms.items(), kept):
        row = [arm, "yes" if on_front else "", str(interval(worst_rises(own, names, runs)))]
        seeds: dict[int | None, list[Run]] = {}
        for run in rules.pop(own[0].rule, []):  # in the first row of a rule
            seeds.setdefault(run.seed, []).append(run)
        found = [indicators(ends(group, names), means[kept], reference) for group in seeds.values()]
        row += [str(interval(list(column))) for column in zip(*found)] or [""] * 3
        rows.append(row)
    point = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, reference))
    return Grid(
        "Pareto front",
        ["arm", "on the front", "worst rise", "hypervolume", "IGD+", "additive ε"],
        rows,
        "Worst rise: that of the objective that rose least since the first step, in standard deviations of its rewards "
        f"there. Hypervolume above {point}. The last three are of all arms of a rule.",
    )


def differences_table(
    runs: Sequence[Run],
    names: Sequence[str],
    baseline: str,
    measure: Callable[[Series], float] = last_fifth,
    what: str = "last fifth of the steps",
) -> Grid:
    """Arm × how much more than the baseline it has, of every reward and of its worst rise, paired over seeds.

    Args:
        runs: whose seeds tell the runs of an arm apart.
        names: the objectives that the worst rise is of.
        baseline: an arm.
        measure: of the series of a reward.
        what: the measure in words.

    Raises:
        ConfigError: no arm has the name, or the runs of an arm cannot be told apart.
    """
    arms = by_arm(runs)
    if baseline not in arms:
        raise ConfigError(f"--baseline must be one of {', '.join(arms)}, found {baseline!r}")
    for arm, own in arms.items():
        seeds = [run.seed for run in own]
        if None in seeds or len(set(seeds)) < len(seeds):
            found = ", ".join(map(str, seeds))
            raise ConfigError(f"--baseline compares runs of a sweep, one per arm and seed, found {arm!r} with {found}")
    scored = shared_rewards(runs)
    columns = {
        arm: [*ends(own, scored, measure).T.tolist(), worst_rises(own, names, runs, measure)]
        for arm, own in arms.items()
    }
    rows = []
    for arm in arms:
        if arm == baseline:
            continue
        differences = [
            paired(_by_seed(arms[arm], ours), _by_seed(arms[baseline], theirs))
            for ours, theirs in zip(columns[arm], columns[baseline])
        ]
        cells = [f"{_text(found)}{' *' * found.excludes_zero}" for found in differences]
        rows.append([arm, str(max(found.n for found in differences)), *cells])
    return Grid(
        f"against {baseline}",
        ["arm", "seeds", *scored, "worst rise"],
        rows,
        f"{what.capitalize()}, the arm's less that of {baseline} with the same seed, ± half of the 95 % interval over "
        "seeds; * where it excludes zero. Not corrected for the number of comparisons.",
    )


def _by_seed(runs: Sequence[Run], values: Sequence[float]) -> dict[int, float]:
    return {run.seed: value for run, value in zip(runs, values) if run.seed is not None and not math.isnan(value)}


def worst_rises(
    own: Sequence[Run], names: Sequence[str], runs: Sequence[Run], measure: Callable[[Series], float] = last_fifth
) -> list[float]:
    """Of each run, the rise of the objective that rose least since all runs' start, in standard deviations there."""
    rises: list[float] = ((ends(own, names, measure) - starts(runs, names)) / spreads(runs, names)).min(1).tolist()
    return rises


def spreads(runs: Sequence[Run], names: Sequence[str]) -> np.ndarray:
    """(objectives,) standard deviation of the rewards of all runs' first steps, 1 where it is not logged or 0."""
    found = []
    for name in names:
        values = [run.scalars[f"reward_std/{name}"][0][1] for run in runs if run.scalars.get(f"reward_std/{name}")]
        found.append(float(np.mean(values)) if values and np.mean(values) > 0 else 1.0)
    return np.array(found)


def shared_rewards(runs: Sequence[Run]) -> list[str]:
    """Every reward that all runs log, the trained ones first."""
    return [name for name in runs[0].scored if all(run.scalars.get(f"reward/{name}") for run in runs)]


def shared_objectives(runs: Sequence[Run]) -> list[str]:
    """The trained objectives that every run has: the axes of the front."""
    common = set.intersection(*({name for name in run.trained if run.scalars.get(f"reward/{name}")} for run in runs))
    return sorted(common)


def draw_table(grid: Grid) -> Table:
    """For the console."""
    table = Table(title=grid.title, caption=grid.caption, padding=(0, 1, 0, 0))
    for index, column in enumerate(grid.columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in grid.rows:
        table.add_row(*row)
    return table


def _at(run: Run, tag: str, last: bool) -> float:
    return fifth(run.scalars.get(tag, []), last=last)


def _known(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _text(found: Interval) -> str:
    return str(found) if found.n else "–"


def _over(runs: list[Run], tag: str, *, last: bool) -> str:
    return _text(interval(_known([_at(run, tag, last) for run in runs])))


def _mean(runs: list[Run], tag: str) -> str:
    """Over all steps, then over runs."""
    values = [_known([value for _, value in run.scalars.get(tag, [])]) for run in runs]
    means = [sum(own) / len(own) for own in values if own]
    return f"{interval(means).mean:.3f}" if means else "–"

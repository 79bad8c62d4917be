"""Statistics of the final rewards of runs: intervals over seeds, the Pareto front and its indicators.

All rewards are maximised. The final reward of a run is the mean over the last fifth of its steps, for each objective.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import moocore
import numpy as np
from scipy.stats import t as student

from pama_plugin.batch.keys import REWARD
from pama_plugin.runs.logs import Run, Series

FIFTH = 0.2


class Interval(NamedTuple):
    """A mean over n values and half the width of its 95 % confidence interval (Student's t); NaN for a single value."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if math.isnan(self.half) else f"{self.mean:.3f} ± {self.half:.3f}"

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half  # false for NaN


def interval(values: Sequence[float]) -> Interval:
    """``mean ± t_{.975, n−1} · s / √n``.

    >>> print(interval([1.0, 2.0, 3.0]))
    2.000 ± 2.484
    """
    n = len(values)
    half = student.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Interval(statistics.fmean(values) if n else math.nan, float(half), n)


def paired(values: dict[int, float], baseline: dict[int, float]) -> Interval:
    """Interval of the differences, ``values − baseline``, over the seeds that both have."""
    return interval([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def fifth(series: Series, *, last: bool) -> float:
    """The mean over the first or last fifth of the steps, at least one, ignoring NaN; NaN if there are none."""
    values = [value for _, value in series if not math.isnan(value)]
    count = max(1, int(len(values) * FIFTH))
    part = values[-count:] if last else values[:count]
    return statistics.fmean(part) if part else math.nan


def moving_average(series: Sequence[Series]) -> tuple[list[int], np.ndarray]:
    """Moving averages, because a rollout batch is a noisy sample.

    They are over 5 steps, over 3 if there are fewer than 25, and over 1 if there are fewer than 6.

    Returns:
        The steps in the middle of the averages, of those steps that all series have, and (series, steps) averages.

    >>> moving_average([[(1, 1.0), (2, 2.0), (3, 6.0), (4, 4.0), (5, 5.0), (6, 6.0)]])
    ([2, 3, 4, 5], array([[3., 4., 5., 5.]]))
    """
    by_step = [dict(points) for points in series]
    steps = sorted(set.intersection(*(set(values) for values in by_step)))
    if not steps:
        return [], np.empty((len(series), 0))
    width = 5 if len(steps) >= 25 else 3 if len(steps) >= 6 else 1
    window = np.ones(width) / width
    values = np.array([np.convolve([values[step] for step in steps], window, "valid") for values in by_step])
    return steps[width // 2 : width // 2 + values.shape[1]], values


class Indicators(NamedTuple):
    """Hypervolume above the reference point (larger is better); IGD+ and ε to a front (smaller is better)."""

    hypervolume: float
    igd_plus: float
    epsilon: float


def indicators(points: np.ndarray, front: np.ndarray, reference: Sequence[float]) -> Indicators:
    """Indicators, by moocore, of ``points`` (points, objectives) to maximise; IGD+ and ε are distances to ``front``.

    >>> indicators(np.array([[1.0, 2.0]]), np.array([[1.0, 2.0], [2.0, 1.0]]), [0.0, 0.0])
    Indicators(hypervolume=2.0, igd_plus=0.5, epsilon=1.0)
    """
    return Indicators(
        float(moocore.hypervolume(points, ref=reference, maximise=True)),
        float(moocore.igd_plus(points, ref=front, maximise=True)),
        float(moocore.epsilon_additive(points, ref=front, maximise=True)),
    )


def nondominated(points: np.ndarray) -> np.ndarray:
    """(n,) true for points that no other dominates: at least as good in all objectives and better in one."""
    kept: np.ndarray = moocore.is_nondominated(points, maximise=True, keep_weakly=True)
    return kept


def last_fifth(series: Series) -> float:
    """The final reward: the mean over the last fifth of the steps."""
    return fifth(series, last=True)


def whole_mean(series: Series) -> float:
    """The mean over all steps, ignoring NaN. It is larger the sooner a reward rises."""
    return statistics.fmean([value for _, value in series if not math.isnan(value)] or [math.nan])


def ends(runs: Iterable[Run], names: Sequence[str], measure: Callable[[Series], float] = last_fifth) -> np.ndarray:
    """(runs, objectives) the final reward, or another measure, of each run and objective."""
    return np.array([[measure(run.scalars[f"{REWARD}{name}"]) for name in names] for run in runs])


def starts(runs: Iterable[Run], names: Sequence[str]) -> np.ndarray:
    """(objectives,) the mean reward in the first step of all runs: that of the policy before any update.

    Of an objective that applies to no prompt of any first step, the mean of the first rewards there are.
    """
    points = [[run.scalars[f"{REWARD}{name}"][0] for name in names] for run in runs]
    steps, rewards = (np.array([[point[part] for point in run] for run in points]) for part in (0, 1))
    at_start = steps == steps.min(1, keepdims=True)
    counted = np.where(at_start.any(0), at_start, True)
    return np.asarray(np.average(rewards, axis=0, weights=counted))


def by_arm(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Arm → its runs, in the order in which the arms appear."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return arms

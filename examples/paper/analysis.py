"""What is read from a run, and how arms are compared. PROTOCOL.md defines every term."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import moocore
import numpy as np
from scipy import stats

from pama_plugin.runs.report.pareto import interval

WIDTH = 5  # steps of the moving average
AFTER, FEWEST = 30, 20  # steps after arrival
MARGIN, ALPHA = 0.15, 0.05


@dataclass(frozen=True)
class Run:
    """A run as committed. ``series``: name → one value per step; ``rewards`` are those of the objectives.

    ``start`` and ``std``, by objective, are of the task: mean and standard deviation of single responses at step 1, and
    ``correlation`` is that of two objectives within the responses to a prompt.
    """

    arm: str
    seed: int
    objectives: tuple[str, ...]
    series: dict[str, list[float]]
    sparse: dict[str, list[float]]
    last_spread: dict[str, float]
    texts: list[dict[str, str]]
    start: dict[str, float]
    std: dict[str, float]
    correlation: float

    @cached_property
    def nats(self) -> np.ndarray:
        return smooth(self.series["nats"])

    @cached_property
    def rises(self) -> np.ndarray:
        """(objectives, positions), smoothed, in standard deviations at the start."""
        return np.stack([self.rise(name) for name in self.objectives])

    def rise(self, name: str) -> np.ndarray:
        return (smooth(self.series[f"reward/{name}"]) - self.start[name]) / self.std[name]

    def at(self, nats: float) -> float:
        """Where the distance is first reached, as a position between two steps; the last position if it never is."""
        beyond = np.flatnonzero(self.nats >= nats)
        if not len(beyond):
            return float(len(self.nats) - 1)
        first = int(beyond[0])
        if first == 0:
            return 0.0
        before, after = self.nats[first - 1], self.nats[first]
        return first - 1 + float((nats - before) / (after - before))

    def reaches(self, nats: float) -> bool:
        return bool((self.nats >= nats).any())

    def worst(self, nats: float) -> float:
        """The worst rise at a distance, or at the end of a run that does not come so far."""
        return float(self.read(self.rises, self.at(nats)).min())

    @property
    def farthest(self) -> float:
        return float(self.nats.max())

    @property
    def end(self) -> float:
        return float(self.rises[:, -1].min())

    @staticmethod
    def read(values: np.ndarray, position: float) -> np.ndarray:
        """The values at a position between two steps, interpolated linearly."""
        low = int(position)
        high = min(low + 1, values.shape[-1] - 1)
        interpolated: np.ndarray = values[..., low] + (position - low) * (values[..., high] - values[..., low])
        return interpolated

    @cached_property
    def arrival(self) -> int | None:
        """The first position, of a whole average, at which the objectives compete."""
        found = np.flatnonzero(smooth(self.series["correlation"]) <= (self.correlation - 1) / 2)
        found = found[found >= WIDTH // 2]
        return int(found[0]) if len(found) else None

    @property
    def later(self) -> int | None:
        """The position at which the *stay* is read; None if the run ends too soon."""
        if self.arrival is None:
            return None
        last = min(self.arrival + AFTER, len(self.nats) - 1)
        return last if last - self.arrival >= FEWEST else None

    @property
    def stay(self) -> float | None:
        """The endpoint *stay*."""
        if self.arrival is None or self.later is None:
            return None
        return float(self.rises[:, self.later].min() - self.rises[:, self.arrival].min())

    @property
    def hypervolume(self) -> float:
        """Of the policies at 3, 6 and 12 nats and at the end, above one standard deviation below the start."""
        points = [self.read(self.rises, self.at(nats)) for nats in (3, 6, 12)] + [self.rises[:, -1]]
        reference = [-1.0] * len(self.objectives)
        return float(moocore.hypervolume(np.stack(points), ref=reference, maximise=True))


def equal_distances(run: Run, other: Run, nats: float) -> tuple[float, float]:
    """The endpoint *way* of two runs: their worst rises where both have come, at most ``nats`` from the start."""
    common = min(nats, run.farthest, other.farthest)
    return run.worst(common), other.worst(common)


def smooth(series: Sequence[float]) -> np.ndarray:
    """A centred moving average of five steps, of fewer at the first two steps; it ends two steps before the last.

    >>> smooth([0.0, 3.0, 6.0, 6.0, 0.0, 3.0])
    array([0. , 3. , 3. , 3.6])
    """
    values, half = np.asarray(series, dtype=float), WIDTH // 2
    positions = range(len(values) - half)
    windows = [values[at - min(at, half) : at + min(at, half) + 1] for at in positions]
    return np.array([np.nanmean(window) if not np.isnan(window).all() else np.nan for window in windows])


def load(file: Path) -> list[Run]:
    """The runs of a task that all of its arms have a seed of, by arm and seed."""
    content = json.loads(file.read_text())
    objectives = tuple(content["objectives"])
    names = [*objectives, *content["monitors"]]
    runs = content["runs"]
    keys = [(run["arm"], run["seed"]) for run in runs]
    if twice := {f"{arm} {seed}" for arm, seed in keys if keys.count((arm, seed)) > 1}:
        raise SystemExit(f"{file}: one run per arm and seed, found more of {', '.join(sorted(twice))}")
    start = {name: statistics.fmean(run["series"][f"reward/{name}"][0] for run in runs) for name in names}
    std = {name: math.sqrt(statistics.fmean(run["start_std"][name] ** 2 for run in runs)) for name in names}
    correlation = statistics.fmean(run["series"]["correlation"][0] for run in runs)
    seeds = set.intersection(*({run["seed"] for run in runs if run["arm"] == arm} for arm in {r["arm"] for r in runs}))
    return [
        Run(
            run["arm"],
            run["seed"],
            objectives,
            run["series"],
            run["sparse"],
            run["last_spread"],
            run["texts"],
            start,
            std,
            correlation,
        )
        for run in sorted(runs, key=lambda run: (content["arms"].index(run["arm"]), run["seed"]))
        if run["seed"] in seeds
    ]


class Difference(NamedTuple):
    """Mean difference of two arms over seeds, half widths of its 95 % and 90 % intervals, and p of a paired t-test."""

    mean: float
    half: float
    half90: float
    p: float
    n: int

    @property
    def equivalent(self) -> bool:
        return bool(abs(self.mean) + self.half90 <= MARGIN)


def difference(values: dict[int, float], baseline: dict[int, float]) -> Difference:
    """Paired over the seeds that both have.

    >>> difference({1: 1.0, 2: 2.0, 3: 4.0}, {1: 0.0, 2: 1.5, 3: 2.0}).mean.__round__(3)
    1.167
    """
    gaps = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    if len(gaps) < 2 or not all(map(math.isfinite, gaps)):
        return Difference(statistics.fmean(gaps) if gaps else math.nan, math.nan, math.nan, 1.0, len(gaps))
    mean, half, n = interval(gaps)
    error = half / stats.t.ppf(0.975, n - 1)
    p = 2 * stats.t.sf(abs(mean) / error, n - 1) if error else float(mean == 0)
    return Difference(mean, half, stats.t.ppf(0.95, n - 1) * error, float(p), n)


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which hypotheses Holm's method rejects: the sorted p are compared with α/m, α/(m−1), … up to the first failure.

    >>> holm([0.001, 0.04, 0.03, 0.02])
    [True, False, False, False]
    >>> holm([0.001, 0.04, 0.01])
    [True, True, True]
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    kept = itertools.takewhile(lambda rank: p_values[order[rank]] <= ALPHA / (len(order) - rank), range(len(order)))
    rejected = {order[rank] for rank in kept}
    return [index in rejected for index in range(len(p_values))]

"""Whether a run has arrived at the front, where the rewards of two objectives rise only at each other's cost."""

from itertools import combinations
from typing import NamedTuple

import numpy as np

from pama_plugin.batch.keys import ACTIVE, CONFLICT, GROUP_CORRELATION
from pama_plugin.runs.logs import Run, Series
from pama_plugin.runs.report.pareto import moving_average

AGAINST = -0.5  # correlation of two rewards at the front
LASTING = 3  # moving averages at the end of the run


class Change(NamedTuple):
    """A metric at the start and at the end of a run, as moving averages."""

    start: float
    end: float


class Front(NamedTuple):
    """Whether a run is at the front at its end, and the metrics that say so.

    Attributes:
        pair: the two objectives whose rewards disagree most at the end.
        step: the step from which on the run was at the front; None if it was not there at the end.
        last: the last step that logged all metrics.
        correlation: of the rewards of the pair, within the responses to a prompt.
        conflict: share of tokens that one objective wants and another does not, over all objectives.
        active: share of tokens with an advantage.
    """

    pair: tuple[str, str]
    step: int | None
    last: int
    correlation: Change
    conflict: Change
    active: Change

    def __str__(self) -> str:
        where = "not at the front" if self.step is None else f"at the front from step {self.step} on"
        conflict, active = (
            f"{100 * change.end:.0f} % of the tokens (at the start {100 * change.start:.0f} %)"
            for change in (self.conflict, self.active)
        )
        return (
            f"{where}: in moving averages until step {self.last}, the rewards {' and '.join(self.pair)} correlate by "
            f"{self.correlation.end:.2f} within a prompt's responses (at the start {self.correlation.start:.2f}), "
            f"objectives conflict on {conflict}, and {active} have an advantage"
        )


def find_front(run: Run) -> Front | None:
    """Whether and when the run arrived; None if it has fewer than two objectives or did not log the metrics.

    A run is at the front if two rewards correlate by at most -0.5 within the responses to a prompt, and more tokens
    are in conflict than chance would have it, ``1 − 2^(1−K)`` for K objectives. Both must hold for moving averages,
    to the end of the run and for at least three of them. A run whose rewards do not vary any more is not at the front.
    """
    chance = 1 - 2.0 ** (1 - len(run.trained))
    found = []
    for pair in combinations(run.trained, 2):
        logged = [_correlations(run, pair), run.scalars.get(CONFLICT, []), run.scalars.get(ACTIVE, [])]
        steps, values = moving_average(logged)
        if steps:
            last = max(set.intersection(*({step for step, _ in series} for series in logged)))
            there = (values[0] <= AGAINST) & (values[1] > chance)
            found.append((pair, steps, values, last, there))
    if not found:
        return None
    pair, steps, values, last, there = min(found, key=lambda each: each[2][0, -1])
    since = len(steps) - int(np.cumprod(there[::-1]).sum())
    arrived = len(steps) - since >= LASTING and last == run.steps
    correlation, conflict, active = (Change(float(row[0]), float(row[-1])) for row in values)
    return Front(pair, steps[since] if arrived else None, last, correlation, conflict, active)


def _correlations(run: Run, pair: tuple[str, str]) -> Series:
    """The names of a pair are in the order in which the run named its objectives."""
    keys = (f"{GROUP_CORRELATION}{'/'.join(names)}" for names in (pair, pair[::-1]))
    return next((run.scalars[key] for key in keys if key in run.scalars), [])

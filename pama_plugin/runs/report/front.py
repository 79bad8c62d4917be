"""Whether a run has arrived at the front, where an objective can only rise at the cost of another."""

from itertools import combinations
from typing import NamedTuple

from pama_plugin.batch.keys import ACTIVE, CONFLICT, GROUP_CORRELATION
from pama_plugin.runs.logs import Run
from pama_plugin.runs.report.pareto import moving_average

AGAINST = -0.5  # correlation of two rewards at the front
CLOSER = 0.5  # share of the way from the first conflict rate to 1


class Change(NamedTuple):
    """A metric at the start and at the end of a run."""

    start: float
    end: float


class Front(NamedTuple):
    """Attributes:
    pair: the two objectives whose rewards disagree most at the end.
    step: the step from which on the run was at the front; None if it was not there at the end.
    correlation: of the rewards of the pair.
    conflict: share of tokens that one objective wants and another does not.
    active: share of tokens with an advantage.
    """

    pair: tuple[str, str]
    step: int | None
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
            f"{where}: the rewards {' and '.join(self.pair)} correlate by {self.correlation.end:.2f} within a "
            f"prompt's responses (at the start {self.correlation.start:.2f}), they conflict on {conflict}, and "
            f"{active} have an advantage"
        )


def find_front(run: Run) -> Front | None:
    """Whether and when the run arrived; None if it has less than two objectives, or a step did not log the metrics.

    A run is at the front if two rewards correlate by at most -0.5 within the responses to a prompt and the conflict
    rate has gone at least half of the way from its start to 1, in moving averages, and if both stay so to the end.
    """
    found = []
    for pair in combinations(run.trained, 2):
        keys = (f"{GROUP_CORRELATION}{'/'.join(names)}" for names in (pair, pair[::-1]))
        correlations = next((run.scalars[key] for key in keys if key in run.scalars), None)
        logged = [correlations, run.scalars.get(CONFLICT), run.scalars.get(ACTIVE)]
        if all(logged):
            found.append((pair, *moving_average([series for series in logged if series])))
    found = [each for each in found if each[1]]
    if not found:
        return None
    pair, steps, values = min(found, key=lambda each: each[2][0, -1])
    correlation, conflict, active = (Change(float(row[0]), float(row[-1])) for row in values)
    there = (values[0] <= AGAINST) & (values[1] >= conflict.start + CLOSER * (1 - conflict.start))
    since = next((index for index in range(len(steps)) if there[index:].all()), None)
    return Front(pair, None if since is None else steps[since], correlation, conflict, active)

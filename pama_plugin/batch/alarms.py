"""Signs in the metrics of a run that it goes wrong although its rewards rise. Each sign is reported once.

The same rules read a run while it trains and its logs afterwards, for the report.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance

from pama_plugin.batch.keys import ACTIVE, AT_BEST, EXPLAINED, REFERENCE_NLL, REWARD, SPREAD, UNIFORM

LITTLE_SPREAD = 0.2  # of the standard deviation of the first step
MANY_AT_BEST = 0.9  # share of the responses with the highest reward
LESS_FLUENT = 1.5  # times the reference's negative log-likelihood of the first step
HARDLY_ACTIVE = 0.02  # share of tokens with an advantage
WINDOW = 5  # steps, to compare the end with the start
CLEAR = 3.0  # standard errors
PATIENCE = {"spread": 3, "saturated": 3, "fluency": 3, "critic": 20, "active": 10}  # steps in a row


class Alarms:
    """Reads the metrics of a run step by step.

    Args:
        trained: names of the trained objectives.
        monitors: names of the monitored ones.

    >>> alarms = Alarms(["a"], [])
    >>> [len(alarms.read({"pama/spread/a": spread})) for spread in (1.0, 0.1, 0.1, 0.1, 0.1)]
    [0, 0, 0, 1, 0]
    """

    def __init__(self, trained: Sequence[str], monitors: Sequence[str]) -> None:
        self.trained, self.monitors = trained, monitors
        self.rewards: dict[str, list[float]] = {name: [] for name in (*trained, *monitors)}
        self.in_a_row: dict[str, int] = {}
        self.first_nll: float | None = None
        self.raised: set[str] = set()

    def read(self, metrics: Mapping[str, float]) -> list[str]:
        """Read the metrics of the next step, as logged; return new alarms as sentences."""
        found = {}
        for name in self.trained:
            spread = metrics.get(f"{SPREAD}{name}", math.nan)
            if self._lasts(f"spread/{name}", spread < LITTLE_SPREAD):
                found[f"spread/{name}"] = (
                    f"objective {name!r} hardly varies any more: the standard deviation of its rewards is "
                    f"{_percent(spread)} of that of the first step"
                )
            at_best = metrics.get(f"{AT_BEST}{name}", math.nan)
            if self._lasts(f"saturated/{name}", at_best >= MANY_AT_BEST):
                found[f"saturated/{name}"] = (
                    f"objective {name!r} is saturated: {_percent(at_best)} of the responses have the highest reward of "
                    "the step"
                )
            explained = metrics.get(f"{EXPLAINED}{name}", math.nan)
            if self._lasts(f"critic/{name}", explained <= 0):
                found[f"critic/{name}"] = (
                    f"the critic has learned nothing about {name!r}: its explained variance was not above 0 for "
                    f"{PATIENCE['critic']} steps"
                )
        nll = metrics.get(REFERENCE_NLL, math.nan)
        if self.first_nll is None and not math.isnan(nll):
            self.first_nll = nll
        if self._lasts("fluency", nll > LESS_FLUENT * (self.first_nll or math.inf)):
            found["fluency"] = (
                "the responses may no longer be language: the reference's negative log-likelihood per token rose from "
                f"{self.first_nll:.2f} to {nll:.2f}"
            )
        if self._lasts("active", metrics.get(ACTIVE, math.nan) < HARDLY_ACTIVE):
            found["active"] = (
                f"hardly anything is trained on: for {PATIENCE['active']} steps less than {_percent(HARDLY_ACTIVE)} of "
                "the tokens had an advantage (--pama.stop_at_front ends such a run)"
            )
        if (share := metrics.get(UNIFORM, 0)) > 0:
            found["uniform"] = f"all responses to a prompt are the same, for {_percent(share)} of the prompts"
        found |= self._falling_monitors(metrics)
        new = {cause: text for cause, text in found.items() if cause not in self.raised}
        self.raised |= set(new)
        return list(new.values())

    def _lasts(self, cause: str, is_so: bool) -> bool:
        """Whether it has been so for as many steps in a row as the cause needs."""
        self.in_a_row[cause] = self.in_a_row.get(cause, 0) + 1 if is_so else 0
        return self.in_a_row[cause] >= PATIENCE[cause.partition("/")[0]]

    def _falling_monitors(self, metrics: Mapping[str, float]) -> dict[str, str]:
        for name, series in self.rewards.items():
            if not math.isnan(reward := metrics.get(f"{REWARD}{name}", math.nan)):
                series.append(reward)
        rising = [name for name in self.trained if _change(self.rewards[name]) > CLEAR]
        return {
            f"monitor/{name}": f"monitor {name!r} falls while {', '.join(rising)} rises: from "
            f"{fmean(self.rewards[name][:WINDOW]):.3g} to {fmean(self.rewards[name][-WINDOW:]):.3g}"
            for name in self.monitors
            if rising and _change(self.rewards[name]) < -CLEAR
        }


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _change(series: Sequence[float]) -> float:
    """Mean of the last steps minus mean of the first, in standard errors of the difference; 0 while they overlap."""
    if len(series) < 2 * WINDOW:
        return 0.0
    first, last = series[:WINDOW], series[-WINDOW:]
    difference = fmean(last) - fmean(first)
    error = math.sqrt((variance(first) + variance(last)) / WINDOW)
    return difference / error if error else math.copysign(math.inf, difference) if difference else 0.0

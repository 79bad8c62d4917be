"""Types and parsers of option values: weights with schedules, bounds, failure policies."""

import math
from typing import Any, NamedTuple

from pama_plugin.rewards.options import LARGEST, refuse_bool

SHAPES = ("constant", "linear", "cosine", "step")


class Weight(NamedTuple):
    """A preference weight over the steps of a run: ``1``, or ``SHAPE:START:END:STEPS``.

    ``linear`` and ``cosine`` go from START to END in STEPS steps; ``step`` jumps to END after STEPS steps.

    >>> parse_weight("linear:1:0.5:100").at(50), parse_weight(2).at(50)
    (0.75, 2.0)
    """

    shape: str
    start: float
    end: float
    steps: int

    def at(self, steps_done: int) -> float:
        """The weight for the next step, after ``steps_done`` steps."""
        done = min(1.0, steps_done / self.steps)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        elif self.shape == "step":
            done = math.floor(done)
        return self.start + (self.end - self.start) * done

    def __str__(self) -> str:
        if self.shape == "constant":
            return _shortest(self.start)
        return f"{self.shape}:{_shortest(self.start)}:{_shortest(self.end)}:{self.steps}"


UNIT_WEIGHT = Weight("constant", 1.0, 1.0, 1)


class Bounds(NamedTuple):
    """Inclusive bounds ``LOW:HIGH``.

    >>> parse_bounds("-5:inf")
    Bounds(low=-5.0, high=inf)
    """

    low: float
    high: float

    def __str__(self) -> str:
        return f"{_shortest(self.low)}:{_shortest(self.high)}"


class OnFailure(NamedTuple):
    """Failure policy for a response without a reward: ``fail``, ``mask``, ``impute:VALUE`` or ``impute:mean``.

    >>> parse_on_failure("impute:-1.5")
    OnFailure(action='impute', value=-1.5)
    """

    action: str
    value: float | None = None  # to impute; None means the mean of all rewards so far

    def __str__(self) -> str:
        if self.action != "impute":
            return self.action
        return "impute:mean" if self.value is None else f"impute:{_shortest(self.value)}"


def _shortest(number: float) -> str:
    """The shortest text that parses to the same number."""
    return repr(number).removesuffix(".0")


def parse_weight(value: Any) -> Weight:
    """Parse a number, ``SHAPE:START:END:STEPS`` or a ``Weight``; raise ``ValueError`` for anything else."""
    if isinstance(value, Weight):
        return value
    shape, *rest = value.split(":") if isinstance(value, str) and ":" in value else ("constant", value, value, 1)
    try:
        start, end, steps = rest
        weight = Weight(shape, float(refuse_bool(start)), float(end), int(steps))
    except (ValueError, TypeError, OverflowError):
        raise ValueError("must be a number, or SHAPE:START:END:STEPS such as linear:1:0.5:100") from None
    if shape not in SHAPES:
        raise ValueError(f"must have one of the shapes {', '.join(SHAPES[1:])}")
    if not (1e-9 <= min(weight.start, weight.end) <= max(weight.start, weight.end) <= 1e9 and weight.steps >= 1):
        raise ValueError(
            "must be from 1e-9 to 1e9, over at least 1 step (role=monitor logs a reward without training on it; for a "
            "reward of which less is better, return its negative)"
        )
    return weight


def parse_bounds(value: Any) -> Bounds | None:
    """Parse ``LOW:HIGH``, a pair of numbers or None; raise ``ValueError`` for anything else."""
    if value is None or isinstance(value, Bounds):
        return value
    try:
        low, high = value.split(":") if isinstance(value, str) else value
        bounds = Bounds(float(refuse_bool(low)), float(refuse_bool(high)))
    except (ValueError, TypeError, OverflowError):
        raise ValueError("must be LOW:HIGH, two numbers (in a file also [LOW, HIGH])") from None
    if not bounds.low < bounds.high or any(LARGEST < abs(end) < math.inf for end in bounds):
        raise ValueError(f"must be LOW:HIGH with LOW < HIGH, each of magnitude at most {LARGEST:g} or infinite")
    return bounds


def parse_on_failure(value: Any) -> OnFailure:
    """Parse ``fail``, ``mask``, ``impute:VALUE``, ``impute:mean`` or an ``OnFailure``; else raise ``ValueError``."""
    if isinstance(value, OnFailure):
        return value
    action, _, reward = str(value).partition(":")
    if action in ("fail", "mask") and not reward:
        return OnFailure(action)
    try:
        if action == "impute" and (reward == "mean" or abs(float(reward)) <= LARGEST):
            return OnFailure("impute", None if reward == "mean" else float(reward))
    except ValueError:
        pass
    raise ValueError("must be fail, mask, impute:VALUE or impute:mean")

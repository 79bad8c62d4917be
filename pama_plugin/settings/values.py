"""The values that options of an objective are written as: weights with schedules, bounds, failure policies."""

import math
from typing import Any, NamedTuple

from pama_plugin.rewards.options import LARGEST, refuse_bool

SHAPES = ("constant", "linear", "cosine", "step")


class Weight(NamedTuple):
    """A preference weight over the steps of a run: ``1``, or ``SHAPE:START:END:STEPS``.

    ``linear`` and ``cosine`` go from START to END in STEPS steps, ``step`` jumps after them.

    >>> parse_weight("linear:1:0.5:100").at(50), parse_weight(2).at(50)
    (0.75, 2.0)
    """

    shape: str
    start: float
    end: float
    steps: int

    def at(self, steps_done: int) -> float:
        """The weight of the step that follows ``steps_done`` others."""
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
    """``LOW:HIGH``, both included.

    >>> parse_bounds("-5:inf")
    Bounds(low=-5.0, high=inf)
    """

    low: float
    high: float

    def __str__(self) -> str:
        return f"{_shortest(self.low)}:{_shortest(self.high)}"


class OnFailure(NamedTuple):
    """What becomes of a response that has no reward: ``fail``, ``mask``, ``impute:VALUE`` or ``impute:mean``.

    >>> parse_on_failure("impute:-1.5")
    OnFailure(action='impute', value=-1.5)
    """

    action: str
    value: float | None = None  # to impute; None is the mean of all rewards so far

    def __str__(self) -> str:
        if self.action != "impute":
            return self.action
        return "impute:mean" if self.value is None else f"impute:{_shortest(self.value)}"


def _shortest(number: float) -> str:
    """The shortest text that is the same number again."""
    return repr(number).removesuffix(".0")


def parse_weight(given: Any) -> Weight:
    """A number, ``SHAPE:START:END:STEPS``, or a ``Weight``; else ``ValueError``."""
    if isinstance(given, Weight):
        return given
    shape, *rest = given.split(":") if isinstance(given, str) and ":" in given else ("constant", given, given, 1)
    try:
        start, end, steps = rest
        weight = Weight(shape, float(refuse_bool(start)), float(end), int(steps))
    except (ValueError, TypeError, OverflowError):
        raise ValueError("must be a number, or SHAPE:START:END:STEPS such as linear:1:0.5:100") from None
    if shape not in SHAPES:
        raise ValueError(f"must have one of the shapes {', '.join(SHAPES[1:])}")
    if not (1e-9 <= min(weight.start, weight.end) <= max(weight.start, weight.end) <= 1e9 and weight.steps >= 1):
        raise ValueError("must be from 1e-9 to 1e9, over at least 1 step")
    return weight


def parse_bounds(given: Any) -> Bounds | None:
    """``LOW:HIGH``, a pair of numbers, or None; else ``ValueError``."""
    if given is None or isinstance(given, Bounds):
        return given
    try:
        low, high = given.split(":") if isinstance(given, str) else given
        bounds = Bounds(float(refuse_bool(low)), float(refuse_bool(high)))
    except (ValueError, TypeError, OverflowError):
        raise ValueError("must be LOW:HIGH, two numbers (in a file [LOW, HIGH])") from None
    if not bounds.low < bounds.high or any(LARGEST < abs(end) < math.inf for end in bounds):
        raise ValueError(f"must be LOW:HIGH with LOW < HIGH, each infinite or at most {LARGEST:g}")
    return bounds


def parse_on_failure(given: Any) -> OnFailure:
    """``fail``, ``mask``, ``impute:VALUE``, ``impute:mean``, or an ``OnFailure``; else ``ValueError``."""
    if isinstance(given, OnFailure):
        return given
    action, _, value = str(given).partition(":")
    if action in ("fail", "mask") and not value:
        return OnFailure(action)
    try:
        if action == "impute" and (value == "mean" or abs(float(value)) <= LARGEST):
            return OnFailure("impute", None if value == "mean" else float(value))
    except ValueError:
        pass
    raise ValueError("must be fail, mask, impute:VALUE or impute:mean")

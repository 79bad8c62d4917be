"""The outcome of one objective for one response: a reward, a failure, or that it does not apply."""

import hashlib
import math
from collections.abc import Awaitable
from typing import Any, NamedTuple

from torch import Tensor

from pama_plugin.errors import RewardError, printable, problem_of
from pama_plugin.rewards.options import LARGEST
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.source import Source
from pama_plugin.settings.values import Bounds


class Outcome(NamedTuple):
    """A reward, or NaN and the reason why there is none; without a reason, the objective does not apply."""

    reward: float
    problem: str | None = None


# Codes of outcomes that are neither a reward (0) nor a failure (positive).
NOT_ASKED_CODE, ABSTAINED_CODE = -1, -2
NOT_ASKED = Outcome(math.nan)  # because of when=


async def attempt(source: Source, call: Awaitable[Any]) -> list[Outcome]:
    """Await the call; return the outcome of each objective of the source. An exception becomes their problem."""
    try:
        return check_results(source, await call)
    except RewardError:  # ends the run
        raise
    except Exception as error:  # user code may raise any exception
        return [Outcome(math.nan, problem_of(error))] * len(source.objectives)


def check_results(source: Source, result: Any) -> list[Outcome]:
    """The outcome of each objective, from the result of their call."""
    results = source.split(result)
    shared = len(results) > 1  # then a text is the reason why one of them is missing
    return [
        Outcome(math.nan, printable(each)) if shared and isinstance(each, str) else check_result(objective, each)
        for objective, each in zip(source.objectives, results, strict=True)
    ]


def check_result(objective: Objective, result: Any) -> Outcome:
    """The outcome of a result: a number, or None where the objective does not apply.

    >>> from pama_plugin.settings.objective import parse_objective
    >>> check_result(parse_objective("a=agent:style,abstain=true"), None)
    Outcome(reward=nan, problem=None)
    """
    if result is None and objective.abstain:
        return Outcome(math.nan)
    if result is None:
        return Outcome(math.nan, "returned None (abstain=true takes it as: does not apply to this response)")
    return check_reward(objective, result)


def check_reward(objective: Objective, reward: float, bounds: Bounds | None = None) -> Outcome:
    """Check that the square of the reward is finite in float32, and that the reward is within the bounds.

    Args:
        objective: the objective of the reward.
        reward: the reward, of any type that a user function may return.
        bounds: ``objective.range``, rounded to the precision of the reward. Default: not rounded.
    """
    if isinstance(reward, str | bytes | bool):  # float() would accept them
        return Outcome(math.nan, printable(f"returned {reward!r}, which is not a number"))
    reward = float(reward)
    if not math.isfinite(reward):
        return Outcome(math.nan, f"returned {reward}")
    if abs(reward) > LARGEST:
        return Outcome(math.nan, f"returned {reward}, more than {LARGEST:g}")
    bounds = bounds or objective.range
    if bounds is not None and not bounds.low <= reward <= bounds.high:
        return Outcome(math.nan, f"returned {reward}, outside range={objective.range}")
    return Outcome(reward)


def judge_column(objective: Objective, rewards_B: Tensor) -> dict[int, str]:
    """Response → problem, for the rewards of a model. Bounds are rounded to the dtype of the rewards."""
    rounded = None if objective.range is None else Bounds(*rewards_B.new_tensor(objective.range).tolist())
    outcomes = enumerate(check_reward(objective, reward, rounded) for reward in rewards_B.tolist())
    return {response: outcome.problem for response, outcome in outcomes if outcome.problem is not None}


def code_of(outcome: Outcome) -> int:
    """A code that a float64 column can represent: 0 for a reward, positive for the text of a problem, else negative.

    >>> code_of(Outcome(0.5)), code_of(NOT_ASKED), 0 < code_of(Outcome(math.nan, "HTTP 502")) < 2**48
    (0, -1, True)
    """
    if outcome.problem is not None:
        return int.from_bytes(hashlib.sha256(outcome.problem.encode()).digest()[:6], "big") or 1
    if outcome is NOT_ASKED:
        return NOT_ASKED_CODE
    return ABSTAINED_CODE if math.isnan(outcome.reward) else 0

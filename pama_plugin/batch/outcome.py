"""The outcome of one objective for one response: a reward or a failure, checked where the reward is computed."""

import hashlib
import math
from collections.abc import Awaitable
from typing import NamedTuple

from torch import Tensor

from pama_plugin.errors import RewardError, printable, problem_of
from pama_plugin.rewards.options import LARGEST
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.values import Bounds


class Outcome(NamedTuple):
    """A reward, or NaN and the reason why there is none."""

    reward: float
    problem: str | None = None


async def attempt(objective: Objective, reward: Awaitable[float]) -> Outcome:
    """Await the reward. An exception becomes the problem of the outcome."""
    try:
        return check_reward(objective, await reward)
    except RewardError:  # ends the run
        raise
    except Exception as error:  # user code may raise any exception
        return Outcome(math.nan, problem_of(error))


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


def code_of(problem: str | None) -> int:
    """A code for the text of a problem that a float64 column can represent; 0 for no problem.

    >>> code_of(None), 0 < code_of("HTTP 502") < 2**48
    (0, True)
    """
    return 0 if problem is None else int.from_bytes(hashlib.sha256(problem.encode()).digest()[:6], "big") or 1

"""The outcome of one objective for one response: a reward or a failure, judged where it is made."""

import hashlib
import math
from collections.abc import Awaitable
from typing import NamedTuple

from torch import Tensor

from pama_plugin.errors import PamaError, RewardError
from pama_plugin.rewards.options import LARGEST
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.values import Bounds


class Outcome(NamedTuple):
    """A reward; or NaN, and why there is none."""

    reward: float
    problem: str | None = None


async def attempt(objective: Objective, reward: Awaitable[float]) -> Outcome:
    """Await the reward. Whatever goes wrong becomes the outcome's problem; nothing becomes a number."""
    try:
        return check_reward(objective, await reward)
    except RewardError:  # which ends the run
        raise
    except PamaError as error:
        return Outcome(math.nan, str(error))
    except Exception as error:  # other people's code may raise anything
        return Outcome(math.nan, f"{type(error).__name__}: {error}")


def check_reward(objective: Objective, reward: float, bounds: Bounds | None = None) -> Outcome:
    """Whether training can use the number: its square is finite in float32, and it is within the bounds.

    These are ``range`` of the objective, unless they are given, rounded as the rewards are.
    """
    if isinstance(reward, str | bytes):  # float would take it
        return Outcome(math.nan, f"returned text, {reward!r}")
    reward = float(reward)  # of whatever other type somebody else's function returned
    if not math.isfinite(reward):
        return Outcome(math.nan, f"returned {reward}")
    if abs(reward) > LARGEST:
        return Outcome(math.nan, f"returned {reward}, more than {LARGEST:g}")
    bounds = bounds or objective.range
    if bounds is not None and not bounds.low <= reward <= bounds.high:
        return Outcome(math.nan, f"returned {reward}, outside range={objective.range}")
    return Outcome(reward)


def judge_column(objective: Objective, rewards_B: Tensor) -> dict[int, str]:
    """What is wrong with the numbers of a model, by response; bounds are rounded as its rewards are."""
    rounded = None if objective.range is None else Bounds(*rewards_B.new_tensor(objective.range).tolist())
    outcomes = enumerate(check_reward(objective, reward, rounded) for reward in rewards_B.tolist())
    return {response: outcome.problem for response, outcome in outcomes if outcome.problem is not None}


def code_of(problem: str | None) -> int:
    """A number that a float64 column can carry for a problem's text; 0 for none.

    >>> code_of(None), 0 < code_of("HTTP 502") < 2**48
    (0, True)
    """
    return 0 if problem is None else int.from_bytes(hashlib.sha256(problem.encode()).digest()[:6], "big") or 1

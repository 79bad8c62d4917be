"""One objective, one response: load what scores, and tell a reward from a failure."""

import math
from collections.abc import Awaitable
from typing import Any, NamedTuple

from pama_plugin.errors import PamaError, RewardError
from pama_plugin.objective import Objective
from pama_plugin.rewards import Scorer, load_builtin, load_function
from pama_plugin.rewards.options import LARGEST


class Outcome(NamedTuple):
    """A reward; or NaN, and why there is none."""

    reward: float
    problem: str | None = None


def load_scorer(objective: Objective, *, patient: bool) -> Scorer:
    """Of a ``py``, ``http`` or ``builtin`` objective; ``patient`` is for servers, see ``load_http``."""
    if objective.kind == "builtin":
        return load_builtin(objective.location, objective.options)
    settings: Any = objective.settings
    if objective.kind == "py":
        return load_function(objective.location, settings)
    from pama_plugin.rewards.http import load_http

    return load_http(objective.location, settings, patient=patient)


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


def check_reward(objective: Objective, reward: float) -> Outcome:
    """Whether training can use the number: one whose square is finite in float32, and within ``range``."""
    if isinstance(reward, str | bytes):  # float would take it
        return Outcome(math.nan, f"returned text, {reward!r}")
    reward = float(reward)  # of whatever other type somebody else's function returned
    if not math.isfinite(reward):
        return Outcome(math.nan, f"returned {reward}")
    if abs(reward) > LARGEST:
        return Outcome(math.nan, f"returned {reward}, more than {LARGEST:g}")
    if objective.range is not None and not objective.range.low <= reward <= objective.range.high:
        return Outcome(math.nan, f"returned {reward}, outside range={objective.range}")
    return Outcome(reward)

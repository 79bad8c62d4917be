"""Kind ``builtin``: rewards that come with the package, by name."""

import inspect
import math
from collections.abc import Callable
from typing import Any

from pydantic import validate_call

from pama_plugin.rewards.response import Response, Scorer

_REWARDS: dict[str, Callable[..., Scorer]] = {}


def register_reward(name: str) -> Callable[[Callable[..., Scorer]], Callable[..., Scorer]]:
    """Register a function from options (keyword-only, annotated) to a scorer; a taken name raises ``ValueError``."""

    def register(factory: Callable[..., Scorer]) -> Callable[..., Scorer]:
        if name in _REWARDS:
            raise ValueError(f"the reward name {name!r} is taken; registered: {', '.join(available_rewards())}")
        _REWARDS[name] = factory
        return factory

    return register


def available_rewards() -> tuple[str, ...]:
    """The names that ``builtin:NAME`` accepts, sorted.

    >>> available_rewards()
    ('length',)
    """
    return tuple(sorted(_REWARDS))


def load_builtin(name: str, options: dict[str, Any]) -> Scorer:
    """The scorer that ``builtin:NAME,key=value…`` asks for; text values are converted to the options' types.

    Raises:
        ValueError: an unknown name or option (both list the known ones), or a value of the wrong type.

    >>> load_builtin("length", {"scale": "140", "min": "0.5", "max": "1.5"})(Response("", "", "", 280))
    1.5
    """
    if name not in _REWARDS:
        raise ValueError(f"unknown builtin reward {name!r}; known: {', '.join(available_rewards())}")
    known = list(inspect.signature(_REWARDS[name]).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"builtin:{name} has no option {', '.join(unknown)}; it takes {', '.join(known)}")
    return validate_call(_REWARDS[name])(**options)


@register_reward("length")
def length(*, scale: float = 1.0, min: float = -math.inf, max: float = math.inf) -> Scorer:
    """``clip(l / scale, min, max)`` of a response of l tokens: the length reward of arXiv 2508.07768, section 6."""
    if not (scale > 0 and math.isfinite(scale)) or not min <= max:
        raise ValueError(f"length needs a finite scale > 0 and min ≤ max, found scale={scale}, min={min}, max={max}")

    def score(response: Response) -> float:
        return float(sorted((min, response.num_tokens / scale, max))[1])

    return score

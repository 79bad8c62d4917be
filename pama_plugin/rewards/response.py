"""What a reward is computed from, and the shape of everything that computes one."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple


class Response(NamedTuple):
    """One response of the policy, as the host's rollout has it.

    Attributes:
        query: prompt and response, decoded with special tokens; what the host passes to a ``reward_func``.
        prompt: the prompt as text.
        label: the data set's label for the prompt, empty if there is none.
        response: what the policy wrote, over all turns, without special tokens.
        num_tokens: how many of the policy's tokens that is, end-of-sequence included.
    """

    query: str
    prompt: str
    label: str
    response: str
    num_tokens: int


Scorer = Callable[[Response], Awaitable[float]]

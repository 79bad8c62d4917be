"""What a reward is computed from, and the shape of everything that computes one."""

from collections.abc import Callable
from typing import NamedTuple


class Response(NamedTuple):
    """One response of the policy, as the host's rollout has it.

    Attributes:
        query: prompt and response, decoded with special tokens; what the host passes to a ``reward_func``.
        prompt: the prompt as text.
        label: the data set's label for the prompt, empty if there is none.
        num_tokens: length of the response in the policy's tokens, end-of-sequence included.
    """

    query: str
    prompt: str
    label: str
    num_tokens: int


Scorer = Callable[[Response], float]

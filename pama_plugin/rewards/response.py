"""The inputs of a reward, and the two interfaces through which a kind computes it."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol


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
"""A loaded reward of a kind that is scored in the rollout."""


class Conversation(NamedTuple):
    """A prompt as messages, and the response to it as text.

    Attributes:
        messages: ``{"role": …, "content": …}`` each, as the data set has them.
        response: without special tokens of the policy.
    """

    messages: Sequence[Mapping[str, Any]]
    response: str


class Inspection(NamedTuple):
    """The text of one conversation as the model reads it.

    Attributes:
        tail: its end, with special tokens.
        length: in the model's tokens.
        truncated_prompt: whether the model's limit cuts off a part of the prompt.
        truncated_response: the same of the response.
    """

    tail: str
    length: int
    truncated_prompt: bool
    truncated_response: bool


class TextModel(Protocol):
    """A loaded model of a kind that is scored in replicas."""

    def score_each(self, conversations: Sequence[Conversation]) -> list[float]:
        """One reward each; NaN for a conversation that the model cannot read."""

    def inspect(self, conversation: Conversation) -> Inspection:
        """What the model reads of one conversation."""

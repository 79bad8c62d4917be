"""Inputs of a reward, and the two interfaces that compute it: ``Scorer`` and ``TextModel``."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pama_plugin.errors import problem_of


class Response(NamedTuple):
    """One response of the policy, as in OpenRLHF's rollout.

    Attributes:
        query: prompt and response, decoded with special tokens, as OpenRLHF passes them to a ``reward_func``.
        prompt: the prompt as text.
        label: the label of the prompt in the data set, empty if there is none.
        response: the text of the policy over all turns, without special tokens.
        num_tokens: number of tokens of the response, including end-of-sequence.
    """

    query: str
    prompt: str
    label: str
    response: str
    num_tokens: int


Scorer = Callable[[Response], Awaitable[float]]
"""The loaded reward of a kind with ``scored_in="rollout"``."""


class Conversation(NamedTuple):
    """A prompt as messages, and the response as text.

    Attributes:
        messages: messages ``{"role": …, "content": …}`` from the data set.
        response: the response without special tokens of the policy.
    """

    messages: Sequence[Mapping[str, Any]]
    response: str


class Inspection(NamedTuple):
    """The input of the model for one conversation.

    Attributes:
        tail: end of the text, with special tokens.
        length: number of tokens of the model.
        truncated_prompt: whether part of the prompt is truncated.
        truncated_response: whether part of the response is truncated.
    """

    tail: str
    length: int
    truncated_prompt: bool
    truncated_response: bool


def score_apart(score: Callable[[Sequence[Any]], Sequence[float]], inputs: Sequence[Any]) -> list[float | str]:
    """The rewards of ``score``; where it fails, the reason, for the inputs alone that make it fail.

    >>> score_apart(lambda texts: [1 / len(text) for text in texts], ["abcd", "", "ab"])
    [0.25, 'ZeroDivisionError: division by zero', 0.5]
    """
    try:
        return [*score(inputs)]
    except Exception as error:  # a template or the code of a model may raise any exception
        if len(inputs) == 1:
            return [problem_of(error)]
    half = len(inputs) // 2
    return score_apart(score, inputs[:half]) + score_apart(score, inputs[half:])


class TextModel(Protocol):
    """The loaded model of a kind with ``scored_in="replicas"``."""

    def score_each(self, conversations: Sequence[Conversation]) -> list[float | str]:
        """One reward per conversation, or the reason why it has none."""

    def inspect(self, conversation: Conversation) -> Inspection:
        """The input of the model for one conversation."""

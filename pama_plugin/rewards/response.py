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
        columns: the columns of the prompt's row that objectives need, by name.
    """

    query: str
    prompt: str
    label: str
    response: str
    num_tokens: int
    columns: Mapping[str, Any] = {}


Scorer = Callable[[Response], Awaitable[Any]]
"""The loaded reward of a kind with ``scored_in="rollout"``.

It returns a number, or None if the kind ``abstains``. Loaded with ``keys``, it returns a list of them in the order of
the keys, in which a text is the reason why one is missing.
"""


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


def score_apart(score: Callable[[Sequence[Any]], Sequence[Any]], inputs: Sequence[Any]) -> list[Any]:
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

    def score_each(self, conversations: Sequence[Conversation]) -> list[Any]:
        """One reward per conversation, or the reason why it has none; loaded with ``keys``, a list of rewards."""

    def inspect(self, conversation: Conversation) -> Inspection:
        """The input of the model for one conversation."""

"""Prompts that carry columns of the data set, and preferences, on their way from OpenRLHF's data loader to the rewards.

OpenRLHF passes the text of a prompt, its label and its images, and names the data source only in evaluations. A prompt
is a text everywhere, so a text that carries all else needs no change of anything in between.
"""

from collections.abc import Mapping
from typing import Any

from pama_plugin.errors import PamaError
from pama_plugin.settings.preferences import Template, Weights, fill_slots


class Prompt(str):
    """The text of a prompt, as the policy reads it.

    Attributes:
        columns: columns of its row in the data set.
        slots: the text with slots for a preference, if it is to have one.
        plain: the text without a preference, which rewards judge.
        preference: weights that are written in the text.
        given: what the data set has in the column of preferences.
        row: its number in the data set.
        source: the data set, or part of it, as OpenRLHF names it in evaluations.
    """

    columns: Mapping[str, Any]
    slots: str | None = None
    plain: str | None = None
    preference: Weights = ()
    given: Any = None
    row: int = 0
    source: str = ""

    def as_text(self, text: str) -> "Prompt":
        """Another text with all that this one carries."""
        prompt = Prompt(text)
        prompt.__dict__ |= self.__dict__
        return prompt

    def with_preference(self, template: Template, preference: Weights) -> "Prompt":
        """The text with the preference in its slots."""
        assert self.slots is not None
        prompt = self.as_text(fill_slots(self.slots, template, preference))
        prompt.slots, prompt.plain, prompt.preference = None, str(self), preference
        return prompt


def with_columns(text: str, columns: Mapping[str, Any]) -> Prompt:
    """A prompt with columns.

    >>> with_columns("2 + 2?", {"answer": 4}).columns, with_columns("2 + 2?", {}) == "2 + 2?"
    ({'answer': 4}, True)
    """
    prompt = Prompt(text)
    prompt.columns = columns
    return prompt


def columns_of(prompt: str) -> Mapping[str, Any]:
    """The columns of a prompt. Raises ``PamaError`` if it has lost them: nothing would say to what it belongs."""
    return whole(prompt).columns


def preference_of(prompt: str) -> Weights:
    """The preference of a prompt. Raises ``PamaError`` if it has lost it."""
    return whole(prompt).preference


def plain(prompt: str) -> str:
    """The prompt without a preference: as the data set and the chat template have it."""
    without = getattr(prompt, "plain", None)
    return prompt if without is None else str(without)


def whole(prompt: str) -> Prompt:
    """The prompt, which must have all that it carries. Raises ``PamaError``."""
    if not isinstance(prompt, Prompt):
        raise PamaError(f"the prompt {prompt[:200]!r} has lost the columns of its row in the data set")
    return prompt

"""Prompts that carry columns of the data set, on their way from OpenRLHF's data loader to the rewards.

OpenRLHF passes the text of a prompt, its label and its images, and names the data source only in evaluations. A prompt
is a text everywhere, so a text that carries the columns of its row needs no change of anything in between.
"""

from collections.abc import Mapping
from typing import Any

from pama_plugin.errors import PamaError


class Prompt(str):
    """The text of a prompt, with columns of its row."""

    columns: Mapping[str, Any]


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
    if not isinstance(prompt, Prompt):
        raise PamaError(f"the prompt {prompt[:200]!r} has lost the columns of its row in the data set")
    return prompt.columns

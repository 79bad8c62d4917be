"""Reads one number from the result of user code."""

import numbers
import reprlib
from collections.abc import Iterator
from typing import Any

from pama_plugin.errors import PamaError


def number_or_none(value: Any) -> float | None:
    """``only_number``, but None for None, alone or in a list.

    >>> number_or_none([None]), number_or_none([0.5])
    (None, 0.5)
    """
    while isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    return None if value is None else only_number(value)


def only_number(value: Any) -> float:
    """Return the only number in a number, tensor, array or nested list. It may be NaN or infinite.

    Text is not parsed, and functions of torch, which user code may have replaced, are not called.

    Raises:
        PamaError: there is no number or more than one, or text, bytes, a bool, a masked element or another object.

    >>> only_number([[0.5]]), only_number({"rewards": 2}["rewards"])
    (0.5, 2.0)
    >>> only_number([True])
    Traceback (most recent call last):
    pama_plugin.errors.PamaError: returned True, which is not a number
    """
    if value is None:
        raise PamaError("returned None")
    rewards = list(_numbers_in(value))
    if len(rewards) != 1:
        raise PamaError(f"returned {len(rewards)} rewards for 1 response")
    return rewards[0]


def _numbers_in(value: Any) -> Iterator[float]:
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # a tensor or array
        value = value.tolist()  # a bool stays a bool; a masked element is None
    if isinstance(value, list | tuple):
        for element in value:
            yield from _numbers_in(element)
        return
    is_number = isinstance(value, numbers.Real) or hasattr(type(value), "__float__")
    if isinstance(value, bool) or not is_number:
        raise PamaError(f"returned {reprlib.repr(value)}, which is not a number")
    try:
        yield float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise PamaError(f"returned {reprlib.repr(value)}, which is not a number: {error}") from error

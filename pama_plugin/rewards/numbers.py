"""The number in what user code returned."""

import numbers
import reprlib
from collections.abc import Iterator
from typing import Any

from pama_plugin.errors import PamaError


def only_number(value: Any) -> float:
    """The only number in a number, tensor, array or (nested) list; NaN and infinities are left to the caller.

    Nothing is parsed, and functions of torch that user code may have replaced are not called.

    Raises:
        PamaError: another count of numbers, or text, bytes, a bool, a masked array or any other object.

    >>> only_number([[0.5]]), only_number({"rewards": 2}["rewards"])
    (0.5, 2.0)
    >>> only_number([True])
    Traceback (most recent call last):
    pama_plugin.errors.PamaError: returned True, which is not a number
    """
    if value is None:
        raise PamaError("returned None")
    found = list(_numbers_in(value))
    if len(found) != 1:
        raise PamaError(f"returned {len(found)} rewards for 1 response")
    return found[0]


def _numbers_in(value: Any) -> Iterator[float]:
    masked = hasattr(value, "mask")  # what is under the mask of a NumPy array is no reward
    if hasattr(value, "dtype") and hasattr(value, "tolist") and not masked:  # of torch, NumPy, JAX …
        value = value.tolist()  # bools stay bools
    if isinstance(value, list | tuple):
        for element in value:
            yield from _numbers_in(element)
        return
    is_number = isinstance(value, numbers.Real) or hasattr(type(value), "__float__")
    if isinstance(value, bool) or masked or not is_number:
        raise PamaError(f"returned {reprlib.repr(value)}, which is not a number")
    try:
        yield float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise PamaError(f"returned {reprlib.repr(value)}, which is not a number: {error}") from error

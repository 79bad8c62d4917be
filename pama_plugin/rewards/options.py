"""What the options of all kinds have in common."""

from typing import Any

from pydantic import BeforeValidator

# Its square is finite in float32, in which rewards are whitened.
LARGEST = 1e18


def refuse_bool(number: Any) -> Any:
    """For what Python, and so pydantic, takes for 0 or 1."""
    if isinstance(number, bool):
        raise ValueError("must be a number")
    return number


IsNumber = BeforeValidator(refuse_bool)

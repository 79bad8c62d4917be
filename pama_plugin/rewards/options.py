"""What the options of all kinds have in common."""

from pathlib import Path
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


def check_model(location: str) -> None:
    """A folder must hold a model; what is no folder must read like a name on the hub, which whoever loads it resolves.

    Raises:
        ValueError: neither.
    """
    folder = Path(location).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"no reward model in {location}: it has no config.json")
    if not folder.exists() and (location.startswith((".", "/", "~")) or location.count("/") > 1):
        raise ValueError(f"no such folder: {location}")

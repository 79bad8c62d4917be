"""Names and what they stand for: ours, what a program registers, and what installed packages name as entry points."""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A table that refuses a taken name, and lists the known ones when asked for another.

    Args:
        what: what it is a table of, for error texts.
        group: of the entry points in which packages name theirs: ``[project.entry-points."GROUP"] NAME = "MODULE:X"``.
        adopt: makes an entry of what an entry point loads, unless its module has registered the name itself.

    >>> colours = Registry[str]("colour", "no.such.group")
    >>> colours.add("red", "#f00")
    >>> colours["red"], colours.names()
    ('#f00', ('red',))
    >>> colours["blue"]
    Traceback (most recent call last):
    ValueError: unknown colour 'blue'; known: red
    """

    def __init__(self, what: str, group: str, adopt: Callable[[Any], T] = lambda loaded: loaded) -> None:
        self.what, self.group, self.adopt = what, group, adopt
        self.entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Register ``entry``; a taken name raises ``ValueError``."""
        if name in self.entries:
            raise ValueError(f"the {self.what} name {name!r} is taken; registered: {', '.join(sorted(self.entries))}")
        self.entries[name] = entry

    def names(self) -> tuple[str, ...]:
        """All that can be asked for, sorted, whether it can be loaded or not."""
        return tuple(sorted({*self.entries, *entry_points(group=self.group).names}))

    def __getitem__(self, name: str) -> T:
        """The entry; an unknown name, or an entry point that cannot be loaded, raises ``ValueError``."""
        if name not in self.entries:
            for entry_point in entry_points(group=self.group, name=name):
                try:
                    loaded = entry_point.load()  # whose module may well register the name
                except Exception as error:  # somebody else's code
                    where = entry_point.value
                    raise ValueError(f"{self.what} {name!r} cannot be loaded from {where}: {error}") from error
                return self.entries.setdefault(name, self.adopt(loaded))
            raise ValueError(f"unknown {self.what} {name!r}; known: {', '.join(self.names())}")
        return self.entries[name]

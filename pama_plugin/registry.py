"""A registry of names: built-in ones, ones that a program registers, and entry points of installed packages."""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from names to entries. A taken name and an unknown name are errors that list the known names.

    Args:
        what: the kind of entry, for error messages.
        group: the entry-point group of other packages: ``[project.entry-points."GROUP"] NAME = "MODULE:X"``.
        adopt: converts the object that an entry point loads into an entry, unless its module registered the name.

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
        """All names, sorted. Entry points are not loaded, so some may fail to load."""
        return tuple(sorted({*self.entries, *entry_points(group=self.group).names}))

    def __getitem__(self, name: str) -> T:
        """The entry; an unknown name, or an entry point that cannot be loaded, raises ``ValueError``."""
        if name not in self.entries:
            for entry_point in entry_points(group=self.group, name=name):
                try:
                    loaded = entry_point.load()  # the module may register the name itself
                except Exception as error:  # code of another package
                    where = entry_point.value
                    raise ValueError(f"{self.what} {name!r} cannot be loaded from {where}: {error}") from error
                return self.entries.setdefault(name, self.adopt(loaded))
            raise ValueError(f"unknown {self.what} {name!r}; known: {', '.join(self.names())}")
        return self.entries[name]

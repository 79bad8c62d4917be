"""Preferences: a weight vector for each prompt, drawn before generation and written into the prompt.

The policy is trained with weights that differ from prompt to prompt and that it can read, so that one policy follows
every trade-off (multi-objective conditioning: Panacea, arXiv 2402.02030; CLP, 2407.15762; MOC, 2604.04497).
"""

import functools
import math
import random
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

SOURCES = "dirichlet:ALPHA, grid:N or column:NAME"
PROMPT = "prompt"  # the field of a template that stands for the user's text
LARGEST_GRID = 1000  # points
SMALLEST = 1e-3  # share that is not 0

Weights = tuple[float, ...]


class Preferences(NamedTuple):
    """Where weight vectors come from. Vectors are at least 0 and sum to 1.

    Attributes:
        source: ``dirichlet``: drawn from the Dirichlet distribution with all parameters ALPHA, 1 for uniform over the
            simplex, below 1 for more vectors near its corners. ``grid``: the vectors whose entries are multiples of
            1/(N − 1), each as often as the others, in random order. ``column``: a column of the data set.
        alpha: of ``dirichlet``.
        points: N of ``grid``, the number of points on each edge of the simplex.
        column: of ``column``.
    """

    source: Literal["dirichlet", "grid", "column"]
    alpha: float = 1.0
    points: int = 2
    column: str = ""

    def draw(self, number: int, seed: int, objectives: int) -> Weights:
        """The weights of the prompt with this number in the run, from ``dirichlet`` or ``grid``.

        They depend on nothing but the arguments, so a run that is resumed goes on as one that was not.

        >>> draw = parse_preferences("grid:3").draw
        >>> sorted(draw(number, 42, 2) for number in range(3))
        [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
        """
        assert self.source != "column"
        if self.source == "grid":
            grid = simplex_grid(objectives, self.points)
            order = random.Random(f"{seed} {number // len(grid)}").sample(range(len(grid)), len(grid))
            return grid[order[number % len(grid)]]
        generator = random.Random(f"{seed} {number}")
        drawn: list[float] = []
        while not sum(drawn) > 0:  # all may be 0 up to rounding if alpha is small
            drawn = [generator.gammavariate(self.alpha, 1.0) for _ in range(objectives)]
        return _normalise(drawn)


@functools.cache
def parse_preferences(text: str) -> Preferences:
    """Parse ``dirichlet:ALPHA``, ``grid:N`` or ``column:NAME``; else raise ``ValueError``.

    >>> parse_preferences("dirichlet:0.5").alpha
    0.5
    """
    source, _, value = str(text).partition(":")
    try:
        if source == "dirichlet" and 0.01 <= float(value) <= 100:
            return Preferences("dirichlet", alpha=float(value))
        if source == "grid" and int(value) >= 2:
            return Preferences("grid", points=int(value))
    except ValueError:
        pass
    if source == "column" and value:
        return Preferences("column", column=value)
    raise ValueError(f"must be {SOURCES} with ALPHA from 0.01 to 100 and N of 2 or more, found {text!r}")


@functools.cache
def simplex_grid(objectives: int, points: int) -> tuple[Weights, ...]:
    """The weight vectors with entries that are multiples of 1/(points − 1), the first objective's falling.

    There are ``C(points + objectives − 2, objectives − 1)`` (Das & Dennis, SIAM J. Optim. 8, 1998).

    Raises:
        ValueError: more than ``LARGEST_GRID``.

    >>> simplex_grid(2, 3), len(simplex_grid(3, 5))
    (((1.0, 0.0), (0.5, 0.5), (0.0, 1.0)), 15)
    """
    parts = points - 1
    if (count := math.comb(parts + objectives - 1, objectives - 1)) > LARGEST_GRID:
        raise ValueError(
            f"{points} points on each edge are {count} preferences of {objectives} objectives; at most {LARGEST_GRID}"
        )

    def compositions(total: int, size: int) -> list[tuple[int, ...]]:
        if size == 1:
            return [(total,)]
        return [(first, *rest) for first in range(total, -1, -1) for rest in compositions(total - first, size - 1)]

    return tuple(tuple(part / parts for part in each) for each in compositions(parts, objectives))


def read_weights(value: Any, names: Sequence[str]) -> Weights:
    """The weights that a column has: a list in the order of the objectives, or a mapping with their names.

    Raises:
        ValueError: says what the weights must be.

    >>> read_weights([3, 1], ["a", "b"]), read_weights({"b": 1, "a": 0}, ["a", "b"])
    ((0.75, 0.25), (0.0, 1.0))
    """
    found = value
    if isinstance(value, Mapping):
        value = [value[name] for name in names] if set(value) == set(names) else None
    numbers = [each for each in value if _is_weight(each)] if isinstance(value, list | tuple) else []
    if not (isinstance(value, list | tuple) and len(numbers) == len(value) == len(names)) or not sum(numbers) > 0:
        raise ValueError(
            f"must be {len(names)} numbers for {', '.join(names)}, or map these names to numbers, finite, at least 0 "
            f"and not all 0, found {found!r}"
        )
    return _normalise(numbers)


def _normalise(numbers: Sequence[float]) -> Weights:
    """Shares that sum to 1; those below ``SMALLEST``, which no template writes, are 0."""
    total = math.fsum(numbers)
    kept = [number if number >= SMALLEST * total else 0.0 for number in numbers]
    return tuple(number / math.fsum(kept) for number in kept)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


class Field(NamedTuple):
    """Where a template has the weight of an objective."""

    objective: int
    form: str


class Template(NamedTuple):
    """How weights are written into a prompt: pieces of text and fields; None stands for the user's text.

    Without the user's text, it is the system message.
    """

    pieces: tuple[str | Field | None, ...]

    @property
    def is_system_message(self) -> bool:
        return None not in self.pieces

    def with_slots(self, text: str = "") -> str:
        """The template around the user's text, with a slot in place of each number; see ``fill_slots``.

        >>> template = parse_template("terse {terse:.1f}: {prompt}", ["terse"])
        >>> fill_slots(template.with_slots("Why?"), template, (0.5,))
        'terse 0.5: Why?'
        """
        parts = []
        for number, piece in enumerate(self.pieces):
            part = _slot(number) if isinstance(piece, Field) else piece
            parts.append(text if part is None else part)
        return "".join(parts)

    @property
    def slots(self) -> list[str]:
        return [_slot(number) for number, piece in enumerate(self.pieces) if isinstance(piece, Field)]


# Characters for private use, which chat templates pass on and texts do not have.
OPEN, CLOSE = "\ue0f0", "\ue0f1"


def _slot(number: int) -> str:
    return f"{OPEN}{number}{CLOSE}"


def fill_slots(text: str, template: Template, weights: Weights) -> str:
    """The text with weights in its slots."""
    for number, piece in enumerate(template.pieces):
        if isinstance(piece, Field):
            text = text.replace(_slot(number), format(weights[piece.objective], piece.form))
    return text


def default_template(names: Sequence[str]) -> str:
    """
    >>> default_template(["helpful", "concise"])
    '[helpful {helpful}, concise {concise}]\\n{prompt}'
    """
    return f"[{', '.join(f'{name} {{{name}}}' for name in names)}]\n{{{PROMPT}}}"


def parse_template(text: str, names: Sequence[str]) -> Template:
    """Parse a text with a field ``{NAME}`` or ``{NAME:FORMAT}`` for every objective, and ``{prompt}`` at most once.

    Raises:
        ValueError: says what is missing or unknown.

    >>> parse_template("{a}, {b:.0%}", ["a", "b"]).is_system_message
    True
    """
    pieces: list[str | Field | None] = []
    try:
        for literal, name, form, conversion in string.Formatter().parse(text):
            pieces += [literal] if literal else []
            if name is None:
                continue
            if name == PROMPT and not (form or conversion):
                pieces.append(None)
            elif name in names and not conversion:
                format(0.5, form or ".2f")
                pieces.append(Field(list(names).index(name), form or ".2f"))
            else:
                raise ValueError(f"unknown field {{{name}}}")
    except ValueError as error:
        raise ValueError(f"must have fields {{NAME}} of objectives and at most one {{{PROMPT}}}: {error}") from error
    missing = [
        name for index, name in enumerate(names) if index not in {p.objective for p in pieces if isinstance(p, Field)}
    ]
    if PROMPT in names:
        raise ValueError(f"an objective cannot be named {PROMPT}, which is the field of the user's text")
    if missing or pieces.count(None) > 1:
        problem = f"no {{{'}, {'.join(missing)}}}" if missing else f"{{{PROMPT}}} more than once"
        raise ValueError(f"must have a field for every objective and at most one {{{PROMPT}}}, found {problem}")
    return Template(tuple(pieces))

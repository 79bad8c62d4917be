"""The table of aggregation rules: a plain dict and a decorator."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Combination(NamedTuple):
    """What a rule returns: one advantage per token, and how much of it each objective supplied."""

    advantages_BA: Tensor
    coefficients_K: Tensor


Rule = Callable[..., Combination]

_RULES: dict[str, Rule] = {}


def register_rule(name: str) -> Callable[[Rule], Rule]:
    """Register ``rule(advantages_KBA, mask_BA, weights_K, active_K, present_KB, *, …)`` under ``name``.

    Its keyword-only parameters are its options; of those, ``level`` and ``noon`` are passed if it names them.
    A rule gets advantages that are finite wherever ``mask_BA`` is true and may hold anything elsewhere, weights that
    are positive, the objectives that carry signal, and which responses each has a reward for: of the others its
    advantages must not count. It must not write to any of them.

    Raises:
        ValueError: ``name`` is taken.
    """

    def register(rule: Rule) -> Rule:
        if name in _RULES:
            raise ValueError(f"the rule name {name!r} is taken; registered: {', '.join(available_rules())}")
        _RULES[name] = rule
        return rule

    return register


def available_rules() -> tuple[str, ...]:
    """The names that ``aggregate`` and ``--loss`` accept, sorted.

    >>> available_rules()
    ('linear', 'pama')
    """
    return tuple(sorted(_RULES))


def get_rule(name: str) -> Rule:
    """The rule registered under ``name``; an unknown name raises ``ValueError`` and lists the known ones."""
    if name not in _RULES:
        raise ValueError(f"unknown rule {name!r}; known: {', '.join(available_rules())}")
    return _RULES[name]

"""The table of aggregation rules: ours, those that a program registers, and those of installed packages."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from pama_plugin.registry import Registry

# Keyword-only parameters of a rule that are no options: whoever calls ``aggregate`` knows them.
CONTEXT_PARAMETERS = ("level", "noon", "groups_B", "violations_K", "multipliers_K")


class Combination(NamedTuple):
    """What a rule returns: one advantage per token, how much of it each objective supplied, and numbers of its own."""

    advantages_BA: Tensor
    coefficients_K: Tensor
    metrics: Mapping[str, float] = {}


class Rule(NamedTuple):
    """A registered rule.

    Attributes:
        combine: the function.
        combines: the ``advantages`` that the estimator made of each objective, or the ``rewards``, one per response, of
            which the estimator then makes advantages.
        constrained: whether some of its objectives are constraints.
        linear: of a rule of rewards, whether its result is ``Σ w_i r_i``, whose value with a critic is ``Σ w_i V_i``.
    """

    combine: Callable[..., Combination]
    combines: Literal["advantages", "rewards"] = "advantages"
    constrained: bool = False
    linear: bool = False

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The keyword-only ones."""
        parameters = inspect.signature(self.combine, eval_str=True).parameters  # annotations may be strings
        return {name: own for name, own in parameters.items() if own.kind is own.KEYWORD_ONLY}


RULES = Registry[Rule]("rule", "pama_plugin.rules", adopt=Rule)


def register_rule(
    name: str,
    *,
    of: Literal["advantages", "rewards"] = "advantages",
    constrained: bool = False,
    linear: bool = False,
) -> Callable[[Callable[..., Combination]], Callable[..., Combination]]:
    """Register ``rule(advantages_KBA, mask_BA, weights_K, active_K, present_KB, *, …)`` under ``name``.

    It returns a ``Combination``. Its keyword-only parameters are its options, with annotations that pydantic validates;
    of those, ``level``, ``noon``, ``groups_B``, ``violations_K`` and ``multipliers_K`` are passed if it names them.
    A rule gets advantages that are finite wherever ``mask_BA`` is true and may hold anything elsewhere, weights that
    are positive, the objectives that carry signal, and which responses each has a reward for: of the others its
    advantages must not count. It must not write to any of them, and returns tensors of its own. A rule ``of`` rewards
    gets them as (K, B, 1), with missing ones filled in, so that ``present_KB`` is all true; it can be used with a
    critic only if it is ``linear``, a weighted sum, whose value is that of the value heads. A ``constrained`` one needs
    objectives with ``role=constraint``, and what ``lagrangian`` says of ``violations_K`` and ``multipliers_K`` holds
    for it too.

    ``metrics`` are logged as ``pama/<key>``; ``<stem>/<i>`` is of objective i and logged by its name. A program that
    trains needs the rule in every process that reads the configuration: a package should name the
    function in the entry-point group ``pama_plugin.rules``. ``pama_plugin.testing`` has the properties that a rule
    should hold.

    Raises:
        ValueError: ``name`` is taken or no name, ``of`` is neither, or what is registered is no function.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.:+-]+", name):
        raise ValueError(
            f'a rule needs a name of letters, digits and _.:+-, as in @register_rule("name"), found {name!r}'
        )
    if of not in ("advantages", "rewards"):
        raise ValueError(f"of must be advantages or rewards, found {of!r}")
    if linear and of != "rewards":
        raise ValueError(f"linear is said of a rule of rewards, found of={of!r}")

    def register(combine: Callable[..., Combination]) -> Callable[..., Combination]:
        if not callable(combine):
            raise ValueError(f"rule {name!r} must be a function, found {combine!r}")
        RULES.add(name, Rule(combine, of, constrained, linear))
        return combine

    return register


def available_rules() -> tuple[str, ...]:
    """The names that ``aggregate`` and ``--loss`` accept, sorted: ours, and those of installed packages.

    >>> "pama" in available_rules()
    True
    """
    return RULES.names()


def get_rule(name: str) -> Rule:
    """The rule registered under ``name``; an unknown name raises ``ValueError`` and lists the known ones."""
    return RULES[name]


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the rule ``name``, each converted to its type.

    Raises:
        ValueError: an unknown rule or option (both list the known ones), a value of the wrong type, or none where the
            rule has no default.

    >>> check_options("pama", {"soft": "4", "rescale": "true"})
    {'soft': 4.0, 'rescale': True}
    """
    known = {key: own for key, own in get_rule(name).parameters.items() if key not in CONTEXT_PARAMETERS}
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = ", ".join(known) or "none"
        raise ValueError(f"rule {name!r} has no option {', '.join(unknown)}; it takes {takes}")
    missing = sorted(key for key, own in known.items() if own.default is own.empty and key not in options)
    if missing:
        raise ValueError(f"rule {name!r} needs option {', '.join(missing)}")
    checked = {}
    for key, value in options.items():
        try:
            annotation = known[key].annotation
            checked[key] = _adapter(Any if annotation is inspect.Parameter.empty else annotation).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"rule {name!r}, option {key}: {first}, found {value!r}") from error
    return checked


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))

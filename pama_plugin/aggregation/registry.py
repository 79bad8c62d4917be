"""The registry of aggregation rules: built-in ones, ones that a program registers, and ones of installed packages."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from pama_plugin.registry import Registry

# Keyword-only parameters of a rule that are not options: ``aggregate`` passes them to the rules that name them.
CONTEXT_PARAMETERS = ("level", "noon", "groups_B", "log_ratio_BA", "rewards_KB", "violations_K", "memory_K")


class Combination(NamedTuple):
    """Return value of a rule.

    Attributes:
        advantages_BA: one advantage per token.
        coefficients_K: the share of each objective in it.
        metrics: metrics of the rule, by name.
        unit_rms: the root mean square that the advantages have, with these weights, if the objectives are independent
            and their advantages standard normal: a number, or (B,) if responses differ in it. It must not depend on the
            values of the advantages. None if it is not known: the result then cannot be scaled to unit size.
    """

    advantages_BA: Tensor
    coefficients_K: Tensor
    metrics: Mapping[str, float] = {}
    unit_rms: float | Tensor | None = None


class Rule(NamedTuple):
    """A registered rule.

    Attributes:
        combine: the function.
        combines: ``advantages``, computed by the estimator for each objective, or ``rewards``, one per response, which
            are combined before the estimator.
        constrained: true if some of its objectives are constraints.
        linear: true if the rule combines rewards to ``Σ w_i r_i``, so that its value with a critic is ``Σ w_i V_i``.
    """

    combine: Callable[..., Combination]
    combines: Literal["advantages", "rewards"] = "advantages"
    constrained: bool = False
    linear: bool = False

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters."""
        parameters = inspect.signature(self.combine, eval_str=True).parameters  # annotations may be strings
        return {name: value for name, value in parameters.items() if value.kind is value.KEYWORD_ONLY}


RULES = Registry[Rule]("rule", "pama_plugin.rules", adopt=Rule)


def register_rule(
    name: str,
    *,
    of: Literal["advantages", "rewards"] = "advantages",
    constrained: bool = False,
    linear: bool = False,
) -> Callable[[Callable[..., Combination]], Callable[..., Combination]]:
    """Register ``rule(advantages_KBA, mask_BA, weights_KB, active_K, present_KB, *, …)`` under ``name``.

    The rule returns a ``Combination``. Its keyword-only parameters are its options; pydantic validates their
    annotations. Parameters with these names are not options; a rule that names one is given it:

    - ``level`` and ``noon``, as in ``aggregate``;
    - ``groups_B``: the prompt of each response, as an index;
    - ``log_ratio_BA``: log π − log π_ref at every token, where there is a reference policy;
    - ``rewards_KB``: the rewards that the estimator receives, after ``normalize``, ``clip`` and imputation; NaN where
      missing;
    - ``violations_K``: threshold minus mean reward of each constraint, None for other objectives;
    - ``memory_K``: for each objective, the metrics of the previous step that the rule returned with the index of this
      objective, ``{"multiplier": 2.0}`` for ``multiplier/1``; empty before the first step. They must be finite, and are
      saved in checkpoints.

    Advantages are finite where ``mask_BA`` is true and arbitrary elsewhere. Weights are positive and (K, 1), or (K, B)
    if responses have different ones, and then 0 only where ``present_KB`` is false. ``active_K`` is true for objectives
    that vary over the batch, ``present_KB`` where an objective has a reward for a response; the advantages of other
    responses must not affect the result. A rule must not modify its arguments.

    With ``of="rewards"`` the rule gets rewards (K, B, 1), with missing ones filled in and ``present_KB`` all true. It
    works with a critic only if it is ``linear``, a weighted sum, whose value is the weighted sum of the value heads. A
    ``constrained`` rule needs objectives with ``role=constraint``, and gets ``violations_K``.

    ``metrics`` are logged as ``pama/<key>``; in a key ``<stem>/<i>``, the index i is replaced by the name of the
    objective. In training, every process that reads the configuration needs the rule, so a package should declare the
    function in the entry-point group ``pama_plugin.rules``. ``pama_plugin.testing`` has properties to test a rule with.

    Raises:
        ValueError: ``name`` is taken or not a valid name, ``of`` is neither, or the registered object is no function.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.:+-]+", name):
        raise ValueError(
            f'a rule needs a name of letters, digits and _.:+-, as in @register_rule("name"), found {name!r}'
        )
    if of not in ("advantages", "rewards"):
        raise ValueError(f"of must be advantages or rewards, found {of!r}")
    if linear and of != "rewards":
        raise ValueError(f"linear=True needs of='rewards', found of={of!r}")

    def register(combine: Callable[..., Combination]) -> Callable[..., Combination]:
        if not callable(combine):
            raise ValueError(f"rule {name!r} must be a function, found {combine!r}")
        RULES.add(name, Rule(combine, of, constrained, linear))
        return combine

    return register


def available_rules() -> tuple[str, ...]:
    """The names that ``aggregate`` and ``--loss`` accept, sorted: built-in, registered and of installed packages.

    >>> "pama" in available_rules()
    True
    """
    return RULES.names()


def get_rule(name: str) -> Rule:
    """The rule registered under ``name``; ``ValueError`` lists the known names if it is unknown."""
    return RULES[name]


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the rule ``name``, each converted to its type.

    Raises:
        ValueError: an unknown rule or option (the error lists the known ones), a value of the wrong type, or no value
            for an option without a default.

    >>> check_options("gdpo", {"whiten_sum": "true"})
    {'whiten_sum': True}
    """
    known = {key: value for key, value in get_rule(name).parameters.items() if key not in CONTEXT_PARAMETERS}
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = ", ".join(known) or "none"
        raise ValueError(f"rule {name!r} has no option {', '.join(unknown)}; it takes {takes}")
    missing = sorted(key for key, value in known.items() if value.default is value.empty and key not in options)
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

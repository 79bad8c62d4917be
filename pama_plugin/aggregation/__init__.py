"""Aggregation rules: pure functions of tensors, independent of OpenRLHF.

Shape suffixes: K objectives, B responses, A action (response) tokens, U units (tokens or responses).
"""

from pama_plugin.aggregation import rules  # noqa: F401  (importing the package registers the rules)
from pama_plugin.aggregation.aggregate import LEVELS, RESCALES, Aggregation, aggregate
from pama_plugin.aggregation.diagnostics import describe
from pama_plugin.aggregation.registry import Combination, available_rules, check_options, get_rule, register_rule

__all__ = [
    "Combination",
    "LEVELS",
    "RESCALES",
    "Aggregation",
    "aggregate",
    "available_rules",
    "check_options",
    "describe",
    "get_rule",
    "register_rule",
]

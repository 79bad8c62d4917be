"""Aggregation rules: pure functions of tensors that know no host.

Shape suffixes: K objectives, B responses, A action (response) tokens, U units (tokens or responses).
"""

from pama_plugin.aggregation import linear, pama  # noqa: F401  (importing a rule registers it)
from pama_plugin.aggregation.aggregate import LEVELS, Aggregation, aggregate
from pama_plugin.aggregation.registry import available_rules, register_rule

__all__ = ["LEVELS", "Aggregation", "aggregate", "available_rules", "register_rule"]

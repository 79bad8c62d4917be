"""Pareto multi-objective alignment (PAMA, arXiv 2508.07768) for OpenRLHF."""

from pama_plugin.aggregation import Aggregation, aggregate, available_rules, register_rule

__version__ = "0.1.0"

__all__ = ["Aggregation", "aggregate", "available_rules", "register_rule"]

"""Pareto multi-objective alignment (PAMA, arXiv 2508.07768) for OpenRLHF."""

from pama_plugin.aggregation import Aggregation, Combination, aggregate, available_rules, register_rule
from pama_plugin.rewards import Response, available_rewards, register_reward

__version__ = "0.1.0"

__all__ = [
    "Aggregation",
    "Combination",
    "Response",
    "aggregate",
    "available_rewards",
    "available_rules",
    "register_reward",
    "register_rule",
]

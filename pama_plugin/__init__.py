"""Pareto multi-objective alignment (PAMA, arXiv 2508.07768) for OpenRLHF."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_OF_REWARDS = ("Response", "available_rewards", "register_reward", "rewards")


def __getattr__(name: str) -> Any:
    """Import public names on first access, so that ``pama --help`` does not import torch."""
    if name not in (*__all__, "aggregation", "rewards"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module("pama_plugin.rewards" if name in _OF_REWARDS else "pama_plugin.aggregation")
    return home if name in ("aggregation", "rewards") else getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

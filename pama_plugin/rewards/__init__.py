"""Reward kinds that score text: pure functions of a response that know no host."""

from pama_plugin.rewards.builtin import available_rewards, load_builtin, load_measure, register_reward
from pama_plugin.rewards.py import check_location, load_function, split_location
from pama_plugin.rewards.response import Response, Scorer

__all__ = [
    "Response",
    "Scorer",
    "available_rewards",
    "check_location",
    "load_builtin",
    "load_function",
    "load_measure",
    "register_reward",
    "split_location",
]

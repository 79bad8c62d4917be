"""Kinds of reward: functions of a prompt and a response, independent of OpenRLHF. Imports no library of a kind."""

from pama_plugin.rewards.builtin import available_rewards, load_measure, register_reward
from pama_plugin.rewards.kinds import KINDS, RewardKind
from pama_plugin.rewards.response import Conversation, Inspection, Response, Scorer, TextModel

__all__ = [
    "KINDS",
    "Conversation",
    "Inspection",
    "Response",
    "RewardKind",
    "Scorer",
    "TextModel",
    "available_rewards",
    "load_measure",
    "register_reward",
]

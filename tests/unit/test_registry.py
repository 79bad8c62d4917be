"""Both registries refuse a taken name and list what they know."""

import pytest
import torch

from pama_plugin import aggregate, available_rules, register_rule
from pama_plugin.rewards import available_rewards, load_measure, register_reward


def test_the_public_names_are_frozen() -> None:
    assert available_rules() == ("linear", "pama")
    assert available_rewards() == ("json", "length", "regex", "repetition")


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'pama' is taken; registered: linear, pama"):
        register_rule("pama")(lambda: None)
    with pytest.raises(ValueError, match="'length' is taken; registered: json, length, regex, repetition"):
        register_reward("length")(lambda: None)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown rule 'pam'; known: linear, pama"):
        aggregate("pam", torch.ones(1, 1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="unknown builtin reward 'len'; known: json, length, regex, repetition"):
        load_measure("len", {})

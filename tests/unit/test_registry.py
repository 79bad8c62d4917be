"""Both registries refuse a taken name and list what they know."""

import sys

import pytest
import torch

from pama_plugin import aggregate, available_rules, register_rule
from pama_plugin.aggregation import get_rule
from pama_plugin.rewards import available_rewards, load_measure, register_reward


def test_the_public_names_are_frozen() -> None:
    assert available_rules() == (
        *("gd2po", "gdpo", "gram:aligned_mtl", "gram:cagrad", "gram:imtl_g", "gram:pcgrad", "gram:upgrad"),
        *("lagrangian", "linear", "min_norm", "morlhf", "pama", "rvpo", "tchebycheff"),
    )
    assert available_rewards() == ("json", "length", "regex", "repetition")


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'pama' is taken; registered: gd2po, .*tchebycheff"):
        register_rule("pama")(lambda: None)
    with pytest.raises(ValueError, match="'length' is taken; registered: json, length, regex, repetition"):
        register_reward("length")(lambda: None)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown rule 'pam'; known: gd2po, .*pama, .*tchebycheff"):
        aggregate("pam", torch.ones(1, 1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="unknown builtin reward 'len'; known: json, length, regex, repetition"):
        load_measure("len", {})


@pytest.mark.parametrize("decorated", [False, True])
def test_another_package_adds_a_rule_by_being_installed(decorated, tmp_path, monkeypatch) -> None:
    name = f"mean{decorated}"
    decorator = f"@register_rule({name!r}, of='rewards')\n" if decorated else ""
    (tmp_path / f"rules{decorated}.py").write_text(
        "from pama_plugin import register_rule\nfrom pama_plugin.aggregation import Combination\n\n"
        f"{decorator}def mean(advantages_KBA, mask_BA, weights_K, active_K, present_KB, *, scale: float = 1.0):\n"
        "    return Combination(scale * advantages_KBA.mean(0), weights_K / weights_K.sum())\n"
    )
    metadata = tmp_path / f"rules{decorated}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rules{decorated}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[pama_plugin.rules]\n{name} = rules{decorated}:mean\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert name in available_rules()
    try:
        rewards_KB1 = torch.tensor([[[1.0]], [[3.0]]])
        found = aggregate(name, rewards_KB1, torch.ones(1, 1), scale="2")
        assert found.advantages.tolist() == [[4.0]]
        with pytest.raises(ValueError, match="no option loud; it takes scale"):
            aggregate(name, rewards_KB1, torch.ones(1, 1), loud=1)
        assert get_rule(name).of == ("rewards" if decorated else "advantages")
    finally:
        from pama_plugin.aggregation import registry

        registry._RULES.pop(name, None)
        sys.modules.pop(f"rules{decorated}", None)


def test_a_rule_that_cannot_be_loaded_is_named(tmp_path, monkeypatch) -> None:
    metadata = tmp_path / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pama_plugin.rules]\nbroken = nothing_like_it:rule\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="rule 'broken' cannot be loaded from nothing_like_it:rule: No module named"):
        aggregate("broken", torch.ones(1, 1, 1), torch.ones(1, 1))

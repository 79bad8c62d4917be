"""The registries of rules and builtin rewards: taken and unknown names, entry points, validation of a rule's result."""

import argparse
import math
import re
import sys

import pytest
import torch

from pama_plugin import aggregate, available_rules, register_rule
from pama_plugin.aggregation import Combination, get_rule
from pama_plugin.aggregation.weights import shares
from pama_plugin.rewards import available_rewards, load_measure, register_reward


def test_the_public_names_are_frozen() -> None:
    assert available_rules() == (
        *("ctwa", "dvao", "gd2po", "gdpo"),
        *("gram:aligned_mtl", "gram:cagrad", "gram:imtl_g", "gram:pcgrad", "gram:upgrad"),
        *("lagrangian", "linear", "min_norm", "morlhf", "pama", "pareto_rank", "rvpo", "saw", "tchebycheff"),
    )
    assert available_rewards() == ("json", "length", "regex", "repetition")


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="rule .*'pama' is taken.*: ctwa, .*tchebycheff"):
        register_rule("pama")(lambda: None)
    with pytest.raises(ValueError, match="'length' is taken.*: json, length, regex, repetition"):
        register_reward("length")(lambda: None)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown rule 'pam'.*: ctwa, .*pama, .*tchebycheff"):
        aggregate("pam", torch.ones(1, 1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="unknown .*reward 'len'.*: json, length, regex, repetition"):
        load_measure("len", {})


@pytest.mark.parametrize("decorated", [False, True])
def test_an_installed_package_adds_a_rule(decorated, tmp_path, monkeypatch) -> None:
    name = f"mean{decorated}"
    decorator = f"@register_rule({name!r}, of='rewards')\n" if decorated else ""
    (tmp_path / f"rules{decorated}.py").write_text(
        "from pama_plugin import Combination, register_rule\nfrom pama_plugin.aggregation.weights import shares\n\n"
        f"{decorator}def mean(advantages_KBA, mask_BA, weights_KB, active_K, present_KB, *, scale: float = 1.0):\n"
        "    return Combination(scale * advantages_KBA.mean(0), shares(weights_KB))\n"
    )
    metadata = tmp_path / f"rules{decorated}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rules{decorated}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[pama_plugin.rules]\n{name} = rules{decorated}:mean\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert name in available_rules()
    try:
        rewards_KB1 = torch.tensor([[[1.0]], [[3.0]]])
        result = aggregate(name, rewards_KB1, torch.ones(1, 1), scale="2")
        assert result.advantages.tolist() == [[4.0]]
        with pytest.raises(ValueError, match=f"{name!r} has no option loud; .*scale"):
            aggregate(name, rewards_KB1, torch.ones(1, 1), loud=1)
        assert get_rule(name).combines == ("rewards" if decorated else "advantages")
    finally:
        from pama_plugin.aggregation import registry

        registry.RULES.entries.pop(name, None)
        sys.modules.pop(f"rules{decorated}", None)


def test_a_rule_that_cannot_be_loaded_is_named(tmp_path, monkeypatch) -> None:
    metadata = tmp_path / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pama_plugin.rules]\nbroken = nothing_like_it:rule\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="rule 'broken' .*loaded from nothing_like_it:rule: No module named"):
        aggregate("broken", torch.ones(1, 1, 1), torch.ones(1, 1))
    from pama_plugin.settings.flags import add_flags

    add_flags(argparse.ArgumentParser())  # the help of the other rules still works


@pytest.fixture
def rule():
    """Register a function as the rule ``odd`` for the duration of a test."""
    from pama_plugin.aggregation import registry

    def register(combine, **settings):
        return register_rule("odd", **settings)(combine)

    yield register
    registry.RULES.entries.pop("odd", None)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda a: (a[0], torch.ones(1)), "'odd' must return a Combination.* found tuple"),
        (lambda a: Combination(a[0, 0], torch.ones(1)), r"'odd' must return shapes .* found \(\(2,\), \(1,\)\)"),
        (lambda a: Combination(a[0] * math.nan, torch.ones(1)), "'odd' returned NaN or inf"),
        (lambda a: Combination(a[0], [1.0]), r"'odd' .*floating-point tensors.* found \[1.0\]"),
        (lambda a: Combination(a[0] > 0, torch.ones(1)), r"'odd' .*floating-point tensors.* found .*True"),
        (lambda a: Combination(a[0], torch.ones(1) * math.nan), r"'odd' .*finite coefficients.* found \[nan\]"),
        (
            lambda a: Combination(a[0] * 2, torch.ones(1), {"rms": 1.0}),
            "'odd' .*reserved metric names: rms;",
        ),
    ],
)
def test_the_result_of_a_rule_is_validated(returned, message, rule) -> None:
    rule(lambda a, mask, weights, active, present: returned(a))
    with pytest.raises(ValueError, match=message):
        aggregate("odd", torch.ones(1, 1, 2), torch.ones(1, 2))


def test_a_rule_may_return_a_view(rule) -> None:
    """Masked tokens are set to 0 in the result only, not in the memory that the view shares."""
    rule(lambda a, mask, w, active, present: Combination(a[0, :, :1].expand(mask.shape), shares(w)))
    advantages_KBA, mask_BA = torch.ones(1, 2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert aggregate("odd", advantages_KBA, mask_BA).advantages.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert (advantages_KBA == 1).all()


def test_options_without_default_or_annotation(rule) -> None:
    def odd(a, mask, weights, active, present, *, power, base: "float" = 1.0):
        return Combination(a.sum(0) ** power * base, shares(weights))

    rule(odd)
    with pytest.raises(ValueError, match="'odd' needs option power"):
        aggregate("odd", torch.ones(1, 1, 2), torch.ones(1, 2))
    result = aggregate("odd", torch.full((1, 1, 2), 3.0), torch.ones(1, 2), power=2, base="2")
    assert result.advantages.tolist() == [[18.0, 18.0]]
    with pytest.raises(ValueError, match="of .*advantages or rewards.* found 'reward'"):
        rule(odd, of="reward")


def test_tensors_of_another_device_are_moved() -> None:
    """The device ``meta`` stands in for a GPU."""
    from pama_plugin.aggregation.checks import as_tensor

    assert as_tensor("the mask", torch.ones(2), torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("name", ["", "a b", "a=b", lambda: None])
def test_a_rule_needs_a_name(name) -> None:
    with pytest.raises(ValueError, match=rf"a rule needs a name .* found {re.escape(repr(name))}"):
        register_rule(name)
    with pytest.raises(ValueError, match="'three' must be a function.* found 3"):
        register_rule("three")(3)


# Property → a rule that violates it.
WRONG = {
    "more_padding_changes_nothing": lambda a, mask, w, active, present: Combination(
        (a * w.unsqueeze(-1)).where(mask & present.unsqueeze(-1), 0).mean(-1, keepdim=True).sum(0) * mask, shares(w)
    ),
    "what_all_agree_on_is_followed": lambda a, mask, w, active, present: Combination(
        -(a * w.unsqueeze(-1)).where(mask & present.unsqueeze(-1), 0).sum(0), shares(w)
    ),
    "an_objective_without_signal_has_no_say": lambda a, mask, w, active, present: Combination(
        (a.clamp(min=0) / w.unsqueeze(-1)).where(mask & present.unsqueeze(-1), torch.inf).amin(0).nan_to_num(posinf=0),
        shares(w),
    ),
    "weights_of_each_response_are_followed": lambda a, mask, w, active, present: Combination(
        (a * w.unsqueeze(-1) / w.sum()).where(mask & present.unsqueeze(-1), 0).sum(0), shares(w)
    ),
    "weights_have_a_say": lambda a, mask, w, active, present: Combination(
        a.where(mask & present.unsqueeze(-1), 0).sum(0), shares(w)
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_properties_detect_a_wrong_rule(name, rule) -> None:
    from pama_plugin.testing import PROPERTIES, check_rule

    rule(WRONG[name])
    check_rule("odd", "inputs_are_not_modified")
    assert name in PROPERTIES
    with pytest.raises(Exception) as raised:  # noqa: B017  (hypothesis may group several)
        check_rule("odd", name)
    assert all(isinstance(error, AssertionError) for error in getattr(raised.value, "exceptions", [raised.value]))
    with pytest.raises(ValueError, match="property .*inputs_are_not_modified, .* found 'right'"):
        check_rule("odd", "right")


def test_a_rule_that_reads_the_weights_of_one_response_only_is_detected(rule) -> None:
    from pama_plugin.testing import check_rule

    rule(lambda a, mask, w, active, present: Combination((a * w[:, :1, None]).sum(0), shares(w[:, :1])))
    with pytest.raises(AssertionError):
        check_rule("odd", "weights_have_a_say")


def test_a_rule_that_modifies_its_input_is_detected(rule) -> None:
    from pama_plugin.testing import check_rule

    rule(lambda a, mask, w, active, present: Combination(a.masked_fill_(~mask, 0).sum(0), shares(w)))
    with pytest.raises(AssertionError):
        check_rule("odd", "inputs_are_not_modified")


@pytest.mark.parametrize("loss", available_rules())
def test_many_blocks_equal_one_block(loss, monkeypatch) -> None:
    from pama_plugin.aggregation import blocks

    generator = torch.Generator().manual_seed(0)
    size = 1 if get_rule(loss).combines == "rewards" else 7
    advantages_KBA = torch.randn(3, 24, size, generator=generator)
    mask_BA = torch.rand(24, size, generator=generator) < 0.8
    arguments = {"groups_B": torch.arange(24) // 4, "present_KB": torch.rand(3, 24, generator=generator) < 0.9}
    if get_rule(loss).constrained:
        arguments |= {"violations_K": [None, None, 0.3]}
    if "rewards_KB" in get_rule(loss).parameters:
        arguments |= {"rewards_KB": torch.randn(3, 24, generator=generator)}
    results = []
    for numbers in (2**17, 50):
        monkeypatch.setitem(blocks.BLOCK, "cpu", numbers)
        results.append(aggregate(loss, advantages_KBA, mask_BA, weights=[1.0, 2.0, 0.5], **arguments))
    torch.testing.assert_close(results[0].advantages, results[1].advantages)
    assert results[0].metrics == pytest.approx(results[1].metrics)


@pytest.mark.needs_extras
def test_pcgrads_order_does_not_disturb_other_random_numbers() -> None:
    before = torch.random.get_rng_state()
    aggregate("gram:pcgrad", torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.ones(2, 2))
    assert torch.equal(before, torch.random.get_rng_state())

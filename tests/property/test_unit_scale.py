"""The constants of ``rescale``: their values, the root mean square that they give, and their bounds."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pama_plugin import aggregate, available_rules
from pama_plugin.aggregation import get_rule
from pama_plugin.aggregation.unit_scale import projection_rms
from pama_plugin.testing import Case, as_rewards, cases

pytestmark = pytest.mark.property


def unit_scale(objectives: int, slope: float = 1.0) -> float:
    return 1 / projection_rms((1.0,) * objectives, slope)


def simpson(objectives: int, steps: int = 20_000, end: float = 10.0) -> float:
    """``4 ∫ t Q(t)^K dt`` for K signed objectives, by Simpson's rule."""
    h = end / steps
    heights = [i * h * (0.5 * math.erfc(i * h / math.sqrt(2))) ** objectives for i in range(steps + 1)]
    return 4 * h / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))


@pytest.mark.parametrize(
    ("objectives", "signed", "noon"),
    [(1, 1.0, 1.4142), (2, 2.3460, 3.3178), (3, 4.5549, 6.4416), (4, 8.1412, 11.5134), (8, 58.978, 83.407)],
)
def test_the_constants(objectives, signed, noon) -> None:
    assert unit_scale(objectives) == pytest.approx(signed, rel=1e-4)
    assert unit_scale(objectives, slope=0.0) == pytest.approx(noon, rel=1e-4)
    assert unit_scale(objectives) == pytest.approx(simpson(objectives) ** -0.5, rel=1e-6)
    assert unit_scale(objectives, slope=0.5) == pytest.approx(signed * math.sqrt(2 / 1.25), rel=1e-4)


def test_the_constant_of_two_has_a_closed_form() -> None:
    assert unit_scale(2) == pytest.approx((0.5 * (1 - 2 / math.pi)) ** -0.5, rel=1e-7)


VARIANTS_OF = {
    "pama": [
        dict(level="token", noon=True),
        dict(level="token", noon=True, leak=0.3),
        dict(soft=4.0),
        dict(soft=0.5, noon=True),
        dict(level="batch", noon=True, rescale="unit"),
        dict(level="batch", noon=True, leak=0.5, rescale="unit"),
    ],
    "min_norm": [dict(noon=True)],
    "gdpo": [dict(whiten_sum=True)],
    "rvpo": [dict(risk=4.0), dict(whiten_sum=True)],
    "gram:upgrad": [dict(balance=0.5)],
}
OF_ADVANTAGES = [rule for rule in available_rules() if get_rule(rule).combines == "advantages"]


@pytest.mark.parametrize("weighted", [False, True], ids=["equal weights", "weights 1 2 3"])
@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("rule", "variant"),
    [(rule, variant) for rule in OF_ADVANTAGES for variant in [{}, *VARIANTS_OF.get(rule, [])]],
    ids=str,
)
def test_independent_objectives_come_out_at_unit_rms(rule, variant, objectives, weighted) -> None:
    if get_rule(rule).constrained:
        if objectives == 1:
            pytest.skip("it needs an objective besides the constraint")
        variant = variant | dict(violations_K=[None] * (objectives - 1) + [2.0])
    normal_KB1 = torch.randn(objectives, 2**18, 1, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(objectives) + 1.0 if weighted else None
    groups_B = torch.arange(2**18) // 64
    if "rewards_KB" in get_rule(rule).parameters:
        variant = variant | dict(rewards_KB=normal_KB1.squeeze(-1) + 3)
    result = aggregate(rule, normal_KB1, torch.ones(2**18, 1), weights=weights, groups_B=groups_B, **variant)
    assert result.metrics["rms"] == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("rule", OF_ADVANTAGES)
def test_responses_that_lack_rewards_come_out_at_unit_rms(rule) -> None:
    """Each with the size of the objectives that it has."""
    if get_rule(rule).constrained or rule == "pareto_rank":
        pytest.skip("a constraint is not missing; ranks need all rewards")
    generator = torch.Generator().manual_seed(0)
    normal_KB1 = torch.randn(3, 2**17, 1, generator=generator)
    present_KB = torch.rand(3, 2**17, generator=generator) < 0.5
    more = dict(rewards_KB=normal_KB1.squeeze(-1) + 3) if "rewards_KB" in get_rule(rule).parameters else {}
    groups_B = torch.arange(2**17) // 256
    result = aggregate(rule, normal_KB1, torch.ones(2**17, 1), present_KB=present_KB, groups_B=groups_B, **more)
    for count in (1, 2, 3):
        rows = result.advantages[present_KB.sum(0) == count]
        assert float(rows.square().mean().sqrt()) == pytest.approx(1, rel=0.05), count


def test_in_small_groups_what_is_whitened_within_them_is_smaller() -> None:
    """``Z_i``, and so ``gdpo`` as published, has the root mean square √((n − 1)/n) in groups of n."""
    normal_KB1 = torch.randn(2, 2**16, 1, generator=torch.Generator().manual_seed(0))
    for size in (4, 8):
        result = aggregate("gdpo", normal_KB1, torch.ones(2**16, 1), groups_B=torch.arange(2**16) // size)
        assert result.metrics["rms"] == pytest.approx(math.sqrt((size - 1) / size), rel=0.02)


@pytest.mark.parametrize("rule", OF_ADVANTAGES)
@given(cases(min_objectives=2, max_objectives=4))
def test_the_factor_does_not_depend_on_the_advantages(rule, case: Case) -> None:
    """It is one number for each response, whatever the advantages of the batch are."""
    more = dict(violations_K=[None] * (len(case.weights_KB) - 1) + [0.5]) if get_rule(rule).constrained else {}

    def call(advantages_KBA, rescale):
        if "rewards_KB" in get_rule(rule).parameters:
            more["rewards_KB"] = as_rewards(case.but(advantages_KBA=advantages_KBA))
        same = dict(weights=case.weights, present_KB=case.present_KB, groups_B=case.groups_B)
        everything = dict(active=[True] * len(case.weights_KB), rescale=rescale)
        return aggregate(rule, advantages_KBA, case.mask_BA, **same, **everything, **more)

    plain, unit = (call(case.advantages_KBA, rescale) for rescale in ("none", "unit"))
    other = call(case.advantages_KBA.flip(1).nan_to_num() + torch.randn(case.advantages_KBA.shape), "unit")
    if all(unit.metrics[f"inactive/{k}"] == other.metrics[f"inactive/{k}"] for k in range(len(case.weights_KB))):
        assert unit.metrics["scale"] == pytest.approx(other.metrics["scale"], rel=1e-5)
    ratio_BA = unit.advantages / plain.advantages
    for ratios in (row[row.isfinite() & (row != 0)] for row in ratio_BA):
        assert not len(ratios) or float(ratios.max()) == pytest.approx(float(ratios.min()), rel=1e-4)
    assert torch.equal(unit.coefficients, plain.coefficients)
    assert "scale" not in plain.metrics


@pytest.mark.parametrize("rule", OF_ADVANTAGES)
def test_what_auto_is(rule) -> None:
    if get_rule(rule).constrained:
        pytest.skip("as linear")
    call = partial(aggregate, rule, torch.randn(2, 8, 1), torch.ones(8, 1), groups_B=torch.arange(8) // 4)
    if "rewards_KB" in get_rule(rule).parameters:
        call = partial(call, rewards_KB=torch.randn(2, 8))
    assert torch.equal(call().advantages, call(rescale="unit").advantages)
    if "level" in get_rule(rule).parameters:
        batch = call(level="batch")
        assert torch.equal(batch.advantages, call(level="batch", rescale="none").advantages)


@pytest.mark.parametrize("rule", ["morlhf", "tchebycheff"])
def test_rules_that_combine_rewards_have_no_unit_size(rule) -> None:
    call = partial(aggregate, rule, torch.randn(2, 8, 1), torch.ones(8, 1))
    assert torch.equal(call().advantages, call(rescale="none").advantages)
    with pytest.raises(ValueError, match=f"rescale=unit: the size of rule '{rule}' is not known"):
        call(rescale="unit")


def test_a_soft_minimum_of_many_objectives_has_no_unit_size() -> None:
    call = partial(aggregate, "pama", torch.randn(9, 8, 1), torch.ones(8, 1), soft=4.0)
    assert "scale" not in call().metrics
    with pytest.raises(ValueError, match="rescale=unit: .*'pama' is not known with these settings"):
        call(rescale="unit")


@pytest.mark.parametrize("objectives", [2, 3, 8])
def test_signed_batch_means_come_out_at_unit_rms_on_average(objectives) -> None:
    """c is random per batch, so the mean is over batches. Unequal weights change how often an objective is mixed in."""
    generator = torch.Generator().manual_seed(0)
    squares = [
        aggregate(
            "pama",
            torch.randn(objectives, 64, 4, generator=generator),
            torch.ones(64, 4),
            weights=torch.arange(objectives) + 1.0,
            level="batch",
            noon=False,
            rescale="unit",
        ).metrics["rms"]
        ** 2
        for _ in range(1500)
    ]
    assert sum(squares) / len(squares) == pytest.approx(1, rel=0.05)


VARIANTS = st.fixed_dictionaries({"level": st.sampled_from(["token", "sequence"]), "noon": st.booleans()})


@given(cases(), VARIANTS, st.booleans())
def test_with_equal_weights_the_factor_depends_on_the_number_of_objectives_only(
    case: Case, variant, normalised
) -> None:
    same = dict(present_KB=case.present_KB, **variant)
    scaled_KBA = case.advantages_KBA * (1.0 if normalised else 37.0)  # advantages keep their unit
    plain = aggregate("pama", scaled_KBA, case.mask_BA, rescale="none", **same)
    rescaled = aggregate("pama", scaled_KBA, case.mask_BA, **same)
    kept_K = torch.tensor([not plain.metrics[f"inactive/{k}"] for k in range(len(case.weights_KB))])
    combined_B = (case.present_KB & kept_K.unsqueeze(-1)).sum(0)
    factors_B = torch.tensor([unit_scale(max(k, 1), 0.0 if variant["noon"] else 1.0) for k in combined_B.tolist()])
    torch.testing.assert_close(rescaled.advantages, plain.advantages * factors_B.unsqueeze(-1), rtol=1e-5, atol=0)
    tokens_B = case.mask_BA.sum(-1) * (combined_B > 0)
    mean = float((factors_B * tokens_B).sum() / tokens_B.sum().clamp(min=1))
    assert rescaled.metrics["scale"] == pytest.approx(mean, rel=1e-5)
    assert torch.equal(rescaled.coefficients, plain.coefficients)


@given(cases(), VARIANTS)
def test_the_result_is_at_most_the_constant_times_the_smallest_advantage(case: Case, variant) -> None:
    weights_K = torch.ones(len(case.weights_KB))
    result = aggregate("pama", case.advantages_KBA, case.mask_BA, present_KB=case.present_KB, **variant)
    kept = [k for k in range(len(weights_K)) if not result.metrics[f"inactive/{k}"]]
    for b, t in case.mask_BA.nonzero().tolist():
        combined = [k for k in kept if case.present_KB[k, b]]
        tokens = case.mask_BA[b] if variant["level"] == "sequence" else torch.tensor([t])
        smallest = min((abs(float(case.advantages_KBA[k, b, tokens].mean())) for k in combined), default=0.0)
        constant = unit_scale(max(len(combined), 1), 0.0 if variant["noon"] else 1.0)
        assert abs(float(result.advantages[b, t])) <= constant * smallest * (1 + 1e-5) + 1e-7


@given(cases(), st.booleans())
def test_at_batch_level_the_result_is_at_most_the_constant_times_the_largest_advantage(case: Case, noon) -> None:
    """At batch level c is the same for all tokens, so a token gets a mix of its advantages, not the smallest."""
    present = dict(present_KB=case.present_KB)
    plain, rescaled = (
        aggregate("pama", case.advantages_KBA, case.mask_BA, level="batch", noon=noon, rescale=rescale, **present)
        for rescale in ("none", "unit")
    )
    scale = rescaled.metrics["scale"]
    torch.testing.assert_close(rescaled.advantages, plain.advantages * scale, rtol=1e-5, atol=1e-7)
    assert scale <= 2  # √2 with Noon; otherwise smaller
    kept_KB11 = torch.tensor([not rescaled.metrics[f"inactive/{k}"] for k in range(len(case.weights_KB))])[
        :, None, None
    ]
    counted_KBA = case.mask_BA & case.present_KB.unsqueeze(-1) & kept_KB11
    largest_BA = case.advantages_KBA.masked_fill(~counted_KBA, 0).abs().amax(0)
    assert (rescaled.advantages.abs() <= scale * largest_BA * (1 + 1e-5) + 1e-7).all()


def test_one_barely_agreeing_response_stays_small() -> None:
    """Two opposed objectives that agree on one response of 64, where both are 0.001."""
    opposed_KB1 = torch.tensor([1.0, -1.0])[:, None, None] * torch.randn(64, 1).sign()
    opposed_KB1[:, 0] = 1e-3
    result = aggregate("pama", opposed_KB1, torch.ones(64, 1))
    assert result.advantages.max().item() == pytest.approx(2.346e-3, rel=1e-3)
    assert result.metrics["scale"] == pytest.approx(2.346, rel=1e-3)


@pytest.mark.parametrize("rule", [rule for rule in OF_ADVANTAGES if not get_rule(rule).constrained])
@given(cases(max_objectives=1), st.sampled_from(["token", "sequence"]))
def test_one_objective_of_weight_1_is_unchanged_bit_for_bit(rule, case: Case, level) -> None:
    if rule in ("gram:cagrad", "pareto_rank"):
        return  # with one objective these return 1.5 times its advantages, and its ranks
    same: dict[str, Any] = dict(rewards_KB=as_rewards(case)) if "rewards_KB" in get_rule(rule).parameters else {}
    same |= dict(present_KB=case.present_KB, groups_B=case.groups_B, level=level)
    plain, rescaled = (
        aggregate(rule, case.advantages_KBA, case.mask_BA, rescale=rescale, **same).advantages
        for rescale in ("none", "unit")
    )
    assert torch.equal(plain, rescaled)

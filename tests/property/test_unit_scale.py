"""The constants of ``rescale``: their values, the root mean square that they give, and their bounds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pama_plugin import aggregate
from pama_plugin.aggregation.unit_scale import unit_scale
from pama_plugin.testing import Case, cases

pytestmark = pytest.mark.property


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


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "variant",
    [
        dict(level="token"),
        dict(level="token", noon=True),
        dict(level="token", noon=True, leak=0.3),
        dict(level="sequence"),
        dict(level="token", soft=4.0),
        dict(level="token", soft=0.5, noon=True),
        dict(level="batch", noon=True, rescale=True),
        dict(level="batch", noon=True, leak=0.5, rescale=True),
    ],
    ids=lambda variant: " ".join(f"{key}={value}" for key, value in variant.items()),
)
def test_independent_objectives_come_out_at_unit_rms(variant, objectives) -> None:
    tokens = 1 if variant["level"] == "sequence" else 8  # a mean over tokens would be smaller
    shape = objectives, 2**18 // tokens, tokens
    normal_KBA = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = aggregate("pama", normal_KBA, torch.ones(shape[1:]), **variant)
    assert result.metrics["rms"] == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("objectives", [2, 3, 8])
def test_signed_batch_means_come_out_at_unit_rms_on_average(objectives) -> None:
    """c is random per batch, so the mean is over batches."""
    generator = torch.Generator().manual_seed(0)
    squares = [
        aggregate(
            "pama",
            torch.randn(objectives, 64, 4, generator=generator),
            torch.ones(64, 4),
            level="batch",
            noon=False,
            rescale=True,
        ).metrics["rms"]
        ** 2
        for _ in range(1500)
    ]
    assert sum(squares) / len(squares) == pytest.approx(1, rel=0.05)


VARIANTS = st.fixed_dictionaries({"level": st.sampled_from(["token", "sequence"]), "noon": st.booleans()})


@given(cases(), VARIANTS, st.booleans())
def test_the_factor_depends_on_the_number_of_combined_objectives_only(case: Case, variant, normalised) -> None:
    same = dict(present_KB=case.present_KB, weights=case.weights_K, **variant)
    scaled_KBA = case.advantages_KBA * (1.0 if normalised else 37.0)  # advantages keep their unit
    plain = aggregate("pama", scaled_KBA, case.mask_BA, rescale=False, **same)
    rescaled = aggregate("pama", scaled_KBA, case.mask_BA, **same)
    kept_K = torch.tensor([not plain.metrics[f"inactive/{k}"] for k in range(len(case.weights_K))])
    combined_B = (case.present_KB & kept_K.unsqueeze(-1)).sum(0)
    factors_B = torch.tensor([unit_scale(max(k, 1), 0.0 if variant["noon"] else 1.0) for k in combined_B.tolist()])
    torch.testing.assert_close(rescaled.advantages, plain.advantages * factors_B.unsqueeze(-1), rtol=1e-5, atol=0)
    tokens_B = case.mask_BA.sum(-1) * (combined_B > 0)
    mean = float((factors_B * tokens_B).sum() / tokens_B.sum().clamp(min=1))
    assert rescaled.metrics["scale"] == pytest.approx(mean, rel=1e-5)
    assert torch.equal(rescaled.coefficients, plain.coefficients)


@given(cases(), VARIANTS)
def test_the_result_is_at_most_the_constant_times_the_smallest_advantage(case: Case, variant) -> None:
    weights_K = torch.ones(len(case.weights_K))
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
        for rescale in (False, True)
    )
    scale = rescaled.metrics["scale"]
    torch.testing.assert_close(rescaled.advantages, plain.advantages * scale, rtol=1e-5, atol=1e-7)
    assert scale <= 2  # √2 with Noon; otherwise smaller
    kept_KB11 = torch.tensor([not rescaled.metrics[f"inactive/{k}"] for k in range(len(case.weights_K))])[:, None, None]
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


@given(cases(max_objectives=1), VARIANTS)
def test_one_signed_objective_is_unchanged_bit_for_bit(case: Case, variant) -> None:
    same = dict(present_KB=case.present_KB, level=variant["level"], noon=False)
    plain, rescaled = (
        aggregate("pama", case.advantages_KBA, case.mask_BA, rescale=rescale, **same).advantages
        for rescale in (False, True)
    )
    assert torch.equal(plain, rescaled)

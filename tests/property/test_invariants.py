"""Invariants of every rule and level, for any advantages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import VARIANTS, advantages, call, variants

from pama_plugin import aggregate

pytestmark = pytest.mark.property


@given(advantages(max_objectives=1), st.sampled_from([v for v in VARIANTS if v["rule"] == "pama"]))
def test_a_duplicated_objective_changes_nothing_but_the_constant(case, variant) -> None:
    """Duplicates agree everywhere, but the constant is that of independent objectives."""
    advantages_KBA, mask_BA = case
    single = call(variant, advantages_KBA, mask_BA)
    double = call(variant, advantages_KBA.repeat(2, 1, 1), mask_BA)
    scales = [result.metrics.get("scale", 1.0) for result in (double, single)]
    torch.testing.assert_close(double.advantages / scales[0], single.advantages / scales[1])
    torch.testing.assert_close(double.coefficients, single.coefficients / 2 * torch.ones(2))


@pytest.mark.parametrize("variant", [dict(rule="linear"), dict(rule="pama")])
@given(case=advantages(max_objectives=1))
def test_one_objective_is_unchanged_bit_for_bit(variant, case) -> None:
    advantages_KBA, mask_BA = case
    result = call(variant, advantages_KBA, mask_BA)
    assert torch.equal(result.advantages[mask_BA], advantages_KBA[0][mask_BA])


@given(advantages(), variants, st.integers(2, 4))
def test_scaling_all_weights_changes_nothing(case, variant, factor) -> None:
    weights = torch.linspace(0.5, 2, len(case[0]))
    one, other = (call(variant, *case, weights=w) for w in (weights, weights * factor))
    torch.testing.assert_close(other.advantages, one.advantages, atol=1e-5, rtol=1e-4)


def test_weights_shift_the_gains() -> None:
    """The projection compares ``A_i / w_i``, so of two objectives that agree the one with the larger weight decides."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(1, 4, 64, generator=generator) + 0.5
    both = base + 0.1 * torch.rand(2, 4, 64, generator=generator)
    result = aggregate("pama", both, torch.ones(4, 64), weights=[3.0, 1.0])
    assert result.coefficients.tolist() == [1.0, 0.0]  # A_1 / 1.5 < A_2 / 0.5 everywhere


@pytest.mark.parametrize("level", ["token", "sequence", "batch"])
@pytest.mark.parametrize("noon", [True, False])
def test_a_constant_objective_does_not_veto(level, noon) -> None:
    generator = torch.Generator().manual_seed(1)
    live = torch.randn(1, 6, 5, generator=generator)
    mask_BA = torch.ones(6, 5)
    alone = aggregate("pama", live, mask_BA, level=level, noon=noon)
    for constant in (0.0, -2.0, 0.7):
        both = aggregate("pama", torch.cat([live, torch.full_like(live, constant)]), mask_BA, level=level, noon=noon)
        assert torch.equal(both.advantages, alone.advantages)
        assert both.metrics["inactive/0"] == 0 and both.metrics["inactive/1"] == 1
        assert both.coefficients[1] == 0


def test_an_objective_known_to_be_inactive_is_excluded() -> None:
    """Whitening amplifies the rounding error of a constant reward, so the caller passes ``active``."""
    generator = torch.Generator().manual_seed(2)
    live, noise = torch.randn(2, 1, 6, 5, generator=generator)
    both = aggregate("pama", torch.cat([live, noise]), torch.ones(6, 5), active=[True, False])
    assert torch.equal(both.advantages, aggregate("pama", live, torch.ones(6, 5)).advantages)


def test_if_no_objective_is_active_none_is_dropped() -> None:
    constants = torch.tensor([2.0, 3.0]).reshape(2, 1, 1).expand(2, 3, 4)
    result = aggregate("pama", constants, torch.ones(3, 4), rescale="none")
    assert (result.advantages == 2).all() and result.metrics["inactive/0"] == result.metrics["inactive/1"] == 0


def test_full_conflict_is_zero_at_token_level() -> None:
    row = torch.randn(1, 8, 8)
    for noon in (True, False):
        result = aggregate("pama", torch.cat([row, -row]), torch.ones(8, 8), noon=noon)
        assert (result.advantages == 0).all() and result.metrics["conflict_rate"] == 1
        assert (result.coefficients == 0).all()


def test_coefficients_are_means_over_tokens_at_sequence_level_too() -> None:
    """Ten tokens follow the first objective and one the second: 10/11 and 1/11, not one half each."""
    mask_BA = torch.zeros(2, 10, dtype=torch.bool)
    mask_BA[0], mask_BA[1, 0] = True, True
    advantages_KBA = torch.tensor([[1.0, 2.0], [2.0, 1.0]])[..., None].expand(2, 2, 10)
    for level in ("token", "sequence"):
        result = aggregate("pama", advantages_KBA, mask_BA, level=level)
        torch.testing.assert_close(result.coefficients, torch.tensor([10 / 11, 1 / 11]))

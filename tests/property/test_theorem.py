"""The closed form of ``pama`` against a grid search over the simplex, and the three cases of Theorem 1."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import advantages

from pama_plugin import aggregate

pytestmark = pytest.mark.property

ONE_TOKEN = torch.ones(1, 1, dtype=torch.bool)


def search(values_K: list[float], steps: int = 40) -> float:
    """``Σ_i c_i a_i`` at the minimum of ``(Σ_i c_i a_i)²`` over a grid on the simplex."""
    grid = [c for c in itertools.product(range(steps + 1), repeat=len(values_K)) if sum(c) == steps]
    mixes = [sum(c * a for c, a in zip(point, values_K)) / steps for point in grid]
    return min(mixes, key=abs)


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=3))
def test_token_value_is_the_minimum_over_the_simplex(values_K: list[float]) -> None:
    column = torch.tensor(values_K).reshape(-1, 1, 1)
    value = aggregate("pama", column, ONE_TOKEN, rescale="none").advantages.item()
    spread = max(values_K) - min(values_K)
    assert abs(value) <= abs(search(values_K)) + 1e-6  # the closed form is at least as good as any grid point
    assert abs(abs(search(values_K)) - abs(value)) <= spread / 40 + 1e-6  # the resolution of the grid


@given(advantages(), st.booleans(), st.booleans())
def test_every_objective_gains_in_proportion_to_its_weight_at_least(case, weighted, noon) -> None:
    """``s*·A_i ≥ w_i·s*²`` for every i, token by token: the variational inequality of the projection."""
    advantages_KBA, mask_BA = case
    weights_K = torch.linspace(0.5, 2, len(advantages_KBA)) if weighted else torch.ones(len(advantages_KBA))
    result = aggregate("pama", advantages_KBA, mask_BA, noon=noon, rescale="none", weights=weights_K)
    kept = [index for index in range(len(advantages_KBA)) if not result.metrics[f"inactive/{index}"]]
    for index in kept:
        bound = weights_K[index] / weights_K[kept].mean() * result.advantages**2
        slack = result.advantages * advantages_KBA[index] - bound
        assert (slack[mask_BA] >= -1e-5).all()


@given(advantages(min_objectives=2))
def test_noon_is_the_minimum_of_the_positive_parts(case) -> None:
    advantages_KBA, mask_BA = case
    result = aggregate("pama", advantages_KBA, mask_BA, noon=True, rescale="none")
    kept_K = [not result.metrics[f"inactive/{index}"] for index in range(len(advantages_KBA))]
    expected = advantages_KBA[kept_K].clamp(min=0).amin(0)
    assert torch.equal(result.advantages, torch.where(mask_BA, expected, 0))


@given(advantages())
def test_sequence_level_is_token_level_of_the_means(case) -> None:
    advantages_KBA, mask_BA = case
    result = aggregate("pama", advantages_KBA, mask_BA, level="sequence", rescale="none")
    for row in range(len(mask_BA)):
        valid = mask_BA[row]
        if not valid.any():
            assert (result.advantages[row] == 0).all()
            continue
        means = [advantages_KBA[k, row][valid].mean() for k in range(len(advantages_KBA))]
        kept = [mean for k, mean in enumerate(means) if not result.metrics[f"inactive/{k}"]]
        low, high = min(kept), max(kept)
        expected = low if low > 0 else high if high < 0 else torch.tensor(0.0)
        torch.testing.assert_close(result.advantages[row][valid], expected.expand(int(valid.sum())), atol=1e-5, rtol=0)


@given(advantages())
def test_the_batch_level_alone_is_the_papers_by_default(case) -> None:
    for level, paper in (("token", False), ("sequence", False), ("batch", True)):
        explicit = aggregate("pama", *case, level=level, noon=paper, rescale="none" if paper else "unit")
        assert torch.equal(aggregate("pama", *case, level=level).advantages, explicit.advantages)


@given(advantages(min_objectives=2))
def test_batch_level_takes_the_objective_with_the_smallest_positive_mean(case) -> None:
    advantages_KBA, mask_BA = case
    result = aggregate("pama", advantages_KBA, mask_BA, level="batch")
    means = [
        float("inf") if result.metrics[f"inactive/{k}"] else row.clamp(min=0)[mask_BA].mean().item()
        for k, row in enumerate(advantages_KBA)
    ]
    if min(means) == 0:
        assert (result.advantages == 0).all()
    elif sorted(means)[1] - min(means) > 1e-6:
        chosen = advantages_KBA[means.index(min(means))].clamp(min=0)
        torch.testing.assert_close(result.advantages, torch.where(mask_BA, chosen, 0))


@pytest.mark.parametrize(
    ("means", "expected"), [((1.0, 3.0), (1, 0)), ((-1.0, -3.0), (1, 0)), ((-1.0, 3.0), (0.75, 0.25))]
)
def test_signed_batch_means_of_one_sign_or_two(means, expected) -> None:
    wave = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    advantages_KBA, mask_BA = torch.stack([mean + wave for mean in means]), torch.ones(1, 4)
    result = aggregate("pama", advantages_KBA, mask_BA, level="batch", noon=False)
    torch.testing.assert_close(result.coefficients, torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(result.advantages, sum(c * (mean + wave) for c, mean in zip(expected, means)))

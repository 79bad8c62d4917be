"""An objective without a reward for a response is excluded for that response only."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import advantages

from pama_plugin import aggregate, available_rules
from pama_plugin.aggregation import get_rule

pytestmark = pytest.mark.property


@st.composite
def with_absences(draw: st.DrawFn):
    advantages_KBA, mask_BA = draw(advantages(min_objectives=2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    weights = torch.rand(len(advantages_KBA), generator=generator) * 5 + 0.2
    return advantages_KBA, mask_BA, torch.rand(advantages_KBA.shape[:2], generator=generator) < 0.6, weights


def project(values: list[float], noon: bool) -> float:
    """Theorem 1 for one unit."""
    values = [max(value, 0.0) for value in values] if noon else values
    if not values or min(values) <= 0 <= max(values):
        return 0.0
    return min(values) if min(values) > 0 else max(values)


@given(with_absences(), st.booleans(), st.sampled_from(["token", "sequence"]))
def test_an_absent_objective_does_not_affect_the_others(case, noon, level) -> None:
    advantages_KBA, mask_BA, present_KB, weights = case
    K, B, A = advantages_KBA.shape
    all_on = torch.ones(K, dtype=torch.bool)
    options = dict(level=level, noon=noon, rescale="none", weights=weights, active=all_on, present_KB=present_KB)
    result = aggregate("pama", advantages_KBA, mask_BA, **options)
    inactive = [result.metrics[f"inactive/{index}"] for index in range(K)]
    for b in range(B):
        kept = [index for index in range(K) if present_KB[index, b] and not inactive[index]]
        tokens = [t for t in range(A) if mask_BA[b, t]]
        for t in tokens:
            units = [t] if level == "token" else tokens
            mean = weights[kept].mean() if kept else 1
            means = [(advantages_KBA[index, b, units].mean() / weights[index] * mean).item() for index in kept]
            assert result.advantages[b, t].item() == pytest.approx(project(means, noon), rel=1e-5, abs=1e-5)


def test_batch_means_are_over_the_responses_that_have_a_reward() -> None:
    advantages_KBA = torch.tensor([[[2.0], [4.0], [99.0]], [[3.0], [5.0], [1.0]]])
    present_KB = torch.tensor([[True, True, False], [True, True, True]])
    result = aggregate("pama", advantages_KBA, torch.ones(3, 1), level="batch", present_KB=present_KB)
    # Means 3 and 3: a tie, half of each; the third response has a reward from the second objective only.
    assert result.advantages.flatten().tolist() == [2.5, 4.5, 0.5]


def test_linear_sums_the_present_objectives() -> None:
    advantages_KBA = torch.tensor([[[2.0], [4.0], [-1.0]], [[3.0], [5.0], [1.0]]])
    present_KB = torch.tensor([[True, False, True], [True, True, True]])
    result = aggregate(
        "linear", advantages_KBA, torch.ones(3, 1), weights=[2.0, 1.0], present_KB=present_KB, rescale="none"
    )
    assert result.advantages.flatten().tolist() == [7.0, 5.0, -1.0]
    assert result.metrics["gain/0"] == 7.5  # over the two tokens with a reward


def test_an_objective_without_any_reward_is_excluded() -> None:
    live = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    present_KB = torch.tensor([[True] * 4, [False] * 4])
    both = aggregate("pama", torch.cat([live, live * math.nan]), torch.ones(4, 3), present_KB=present_KB)
    assert torch.equal(both.advantages, aggregate("pama", live, torch.ones(4, 3)).advantages)
    assert both.metrics["inactive/1"] == 1 and both.coefficients.tolist() == [1, 0]


# What weighs objectives against each other by their rewards goes on to do so.
NOT_APART = {"saw": "by their coefficients of variation", "lagrangian": "by their violations, and needs a constraint"}


@pytest.mark.parametrize("rule", [rule for rule in available_rules() if rule not in NOT_APART])
@given(seed=st.integers(0, 2**32 - 1), shares=st.sampled_from([(4, 4), (7, 1), (5, 2, 1)]))
def test_objectives_that_share_no_response_are_combined_as_each_alone(rule, seed, shares) -> None:
    """However few prompts an objective applies to, if the estimator whitens: none is taken for a short gradient."""
    owner_B = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares) * 4)
    groups_B = torch.arange(len(owner_B)) // 4
    present_KB = owner_B == torch.arange(len(shares)).unsqueeze(-1)
    advantages_KBA = torch.randn(*present_KB.shape, 1, generator=torch.Generator().manual_seed(seed))
    for advantages_BA, present_B in zip(advantages_KBA, present_KB):
        own = advantages_BA[present_B]
        advantages_BA[present_B] = (own - own.mean()) / own.square().mean().sub(own.mean() ** 2).sqrt()

    def combine(chosen: slice | torch.Tensor, *, kept: slice) -> torch.Tensor:
        values_KBA, present = advantages_KBA[kept][:, chosen], present_KB[kept][:, chosen]
        context = {"rewards_KB": values_KBA[..., 0].masked_fill(~present, math.nan), "memory_K": [{}] * len(present)}
        context = {key: value for key, value in context.items() if key in get_rule(rule).parameters}
        level = "sequence" if "groups_B" in get_rule(rule).parameters else "token"
        ones = torch.ones(values_KBA.shape[1:])
        return aggregate(
            rule, values_KBA, ones, level=level, present_KB=present, groups_B=groups_B[chosen], **context
        ).advantages

    together_BA = combine(slice(None), kept=slice(None))
    for index, present_B in enumerate(present_KB):
        alone_BA = combine(present_B, kept=slice(index, index + 1))
        torch.testing.assert_close(together_BA[present_B], alone_BA, rtol=1e-3, atol=1e-4)

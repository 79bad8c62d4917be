"""Every rule on degenerate input: constants, duplicates, extreme values, empty masks, single tokens."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pama_plugin import Aggregation, aggregate, available_rules
from pama_plugin.aggregation import get_rule

pytestmark = pytest.mark.property

K, B, A = 3, 4, 5
MASK = torch.ones(B, A, dtype=torch.bool)
TINY = 2.0**-149  # the smallest float32 above 0


def run(rule: str, advantages_KBA: Tensor, mask_BA: Tensor = MASK, **more: Any) -> Aggregation:
    """``aggregate`` with the context that the rule needs; one token per response for rules that combine rewards."""
    if get_rule(rule).combines == "rewards":
        advantages_KBA, mask_BA = advantages_KBA[..., :1], mask_BA[:, :1]
    if get_rule(rule).constrained:
        more |= dict(violations_K=[None, None, 0.5])
    if "rewards_KB" in get_rule(rule).parameters:
        more |= dict(rewards_KB=advantages_KBA.double().nan_to_num(posinf=0, neginf=0).mean(-1))
    result = aggregate(rule, advantages_KBA, mask_BA, groups_B=torch.arange(len(mask_BA)) // 2, **more)
    assert result.advantages.isfinite().all() and result.coefficients.isfinite().all()
    assert all(math.isfinite(value) for value in result.metrics.values())
    return result


def some(seed: int = 0) -> Tensor:
    return torch.randn(K, B, A, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", available_rules())
def test_no_valid_token_and_all_zeros_give_zeros(rule) -> None:
    nowhere = torch.zeros_like(MASK)
    for result in (run(rule, some(), nowhere), run(rule, torch.zeros(K, B, A)), run(rule, -torch.zeros(K, B, A))):
        assert (result.advantages == 0).all() and result.coefficients.sum() == 0
        assert result.metrics["active_fraction"] == result.metrics["effective_objectives"] == 0


@pytest.mark.parametrize("rule", available_rules())
def test_one_token(rule) -> None:
    mask_BA = torch.zeros_like(MASK)
    mask_BA[1, 0] = True
    result = run(rule, some(), mask_BA)
    assert (result.advantages[~mask_BA[:, : result.advantages.shape[1]]] == 0).all()


@pytest.mark.parametrize("rule", available_rules())
@pytest.mark.parametrize("value", [1.0, -3.0, TINY, -TINY, 1e8, 0.1])
def test_all_the_same(rule, value) -> None:
    result = run(rule, torch.full((K, B, A), value))
    assert result.advantages.unique().numel() == 1, "no response is better than another"


@pytest.mark.parametrize("rule", available_rules())
def test_subnormal_numbers(rule) -> None:
    assert run(rule, some() * TINY * 8).advantages.abs().max() < 10  # a rule that whitens scales them to ordinary size


@pytest.mark.parametrize("rule", available_rules())
def test_negative_zero_is_zero(rule) -> None:
    advantages_KBA = some().round()
    negative = torch.where(advantages_KBA == 0, -0.0, advantages_KBA)
    assert torch.equal(run(rule, advantages_KBA).advantages, run(rule, negative).advantages)


@pytest.mark.parametrize("rule", available_rules())
def test_duplicates(rule) -> None:
    run(rule, some()[:1].repeat(K, 1, 1))


@pytest.mark.parametrize("rule", available_rules())
@pytest.mark.parametrize("constant", [0.0, 0.7])
def test_a_constant_objective_is_reported_as_inactive(rule, constant) -> None:
    advantages_KBA = some()
    advantages_KBA[0] = constant
    result = run(rule, advantages_KBA)
    assert [result.metrics[f"inactive/{index}"] for index in range(K)] == [1, 0, 0]
    assert (result.advantages != 0).any()


@pytest.mark.parametrize("rule", available_rules())
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_advantages_are_refused(rule, bad) -> None:
    advantages_KBA = some()
    advantages_KBA[1, 2, 0] = bad
    with pytest.raises(ValueError, match="finite.* found NaN or inf in objective 1"):
        run(rule, advantages_KBA)


@pytest.mark.parametrize("rule", available_rules())
def test_bfloat16_is_computed_in_float32(rule) -> None:
    half = some().bfloat16()
    result, expected = run(rule, half), run(rule, half.float())
    assert result.advantages.dtype == torch.float32 and torch.equal(result.advantages, expected.advantages)

"""What ``aggregate`` refuses, and the types it takes."""

import pytest
import torch

from pama_plugin import aggregate

ONES = torch.ones(2, 3, 4)
MASK = torch.ones(3, 4, dtype=torch.bool)
DUAL = dict(rule="lagrangian", violations_K=[None, 0.5], multipliers_K=[None, None])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(advantages_KBA=torch.ones(3, 4)), r"must be \(K, B, A\) .* found \(3, 4\) and \(3, 4\)"),
        (dict(advantages_KBA=torch.ones(0, 3, 4)), "K ≥ 1"),
        (dict(mask_BA=torch.ones(4, 3)), r"found \(2, 3, 4\) and \(4, 3\)"),
        (dict(level="word"), "level must be one of token, sequence, batch, found 'word'"),
        (dict(weights=[1.0]), r"weights must be 2 positive finite numbers, found \[1.0\]"),
        (dict(weights=[1.0, 0.0]), "positive finite"),
        (dict(weights=[1.0, float("nan")]), "positive finite"),
        (dict(weights=[1.0, float("inf")]), "positive finite"),
        (dict(weights="12"), "weights must be numbers, as a tensor or lists"),
        (dict(weights=[1.0, 1e-50]), r"positive finite numbers, found \[1.0, 1e-50\]"),
        (dict(noon="false"), "noon and whiten must be true or false, found 'false'"),
        (dict(whiten="no"), "noon and whiten must be true or false, found None and 'no'"),
        (dict(mask_BA=None), "the mask must be numbers, as a tensor"),
        (dict(active=[True]), r"active must be 2 flags, found \[True\]"),
        (dict(present_KB=torch.ones(3, 2, dtype=torch.bool)), r"\(K, B\) = \(2, 3\) booleans, found \(3, 2\)"),
        (dict(present_KB=torch.ones(2, 3)), r"booleans, found \(2, 3\) of torch.float32"),
        (dict(rule="gdpo"), "'gdpo' needs groups_B, the prompt of each response, found none"),
        (
            dict(rule="gdpo", groups_B=torch.zeros(3)),
            r"must be \(B,\) = \(3,\) integers, found \(3,\) of torch.float32",
        ),
        (
            dict(rule="lagrangian"),
            "needs violations_K, a list of 2 in which each is a finite number or None, found None",
        ),
        (DUAL | dict(violations_K=[None, "x"]), "needs violations_K, a list of 2"),
        (DUAL | dict(multipliers_K=[None, float("nan")]), "needs multipliers_K, a list of 2"),
        (DUAL | dict(multipliers_K=[None, 0.0]), "multipliers_K must be positive, found 0 for objective 1"),
        (DUAL | dict(start=3.0, ceiling=2.0), "start must be at most the ceiling 2, found 3"),
        (dict(sharpness=2), "rule 'pama' has no option sharpness; it takes rescale, soft, leak"),
        (dict(rule="linear", sharpness=2), "rule 'linear' has no option sharpness; it takes none"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate(**(dict(rule="pama", advantages_KBA=ONES, mask_BA=MASK) | arguments))


def test_lists_stand_for_tensors() -> None:
    given = dict(advantages_KBA=[[[1.0], [2.0]], [[3.0], [1.0]]], mask_BA=[[1], [1]], active=[True, True])
    given |= dict(present_KB=[[True, True], [True, False]], groups_B=[0, 0], weights=[1.0, 2.0])
    found = aggregate("gdpo", **given)
    expected = aggregate("gdpo", **{key: torch.tensor(value) for key, value in given.items()})
    assert torch.equal(found.advantages, expected.advantages) and found.metrics == expected.metrics


def test_lists_go_where_the_advantages_are_and_keep_their_precision() -> None:
    away = torch.zeros(2, 2, 1, device="meta")
    with pytest.raises(Exception, match="meta") as raised:  # where nothing can be computed
        aggregate("gdpo", away, [[1], [1]], present_KB=[[True, True], [True, False]], groups_B=[0, 0])
    assert "not on the expected device" not in str(raised.value)
    exact = aggregate("linear", torch.ones(2, 1, 1, dtype=torch.float64), [[1]], weights=[0.1, 0.2])
    assert exact.advantages.item() == pytest.approx(0.3, abs=1e-15)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_valid_token_that_is_not_finite_is_refused(bad) -> None:
    advantages = torch.ones(2, 3, 4)
    advantages[1, 2, 3] = bad
    with pytest.raises(ValueError, match="found NaN or inf in objective 1"):
        aggregate("pama", advantages, MASK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_low_precision_is_raised_to_float32_and_float64_kept(dtype) -> None:
    result = aggregate("pama", torch.randn(2, 3, 4).to(dtype), MASK.to(torch.int64))
    assert result.advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_no_valid_token_gives_zeros() -> None:
    result = aggregate("pama", torch.full((2, 3, 4), float("nan")), torch.zeros(3, 4))
    assert (result.advantages == 0).all() and (result.coefficients == 0).all()
    assert all(value == 0 for value in result.metrics.values())


def test_gradients_do_not_flow() -> None:
    advantages = torch.randn(2, 3, 4, requires_grad=True)
    assert not aggregate("pama", advantages, MASK).advantages.requires_grad

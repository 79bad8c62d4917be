"""What ``aggregate`` refuses, and the types it takes."""

import pytest
import torch

from pama_plugin import aggregate

ONES = torch.ones(2, 3, 4)
MASK = torch.ones(3, 4, dtype=torch.bool)


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
        (dict(active=[True]), r"active must be 2 flags, found \[True\]"),
        (dict(present_KB=torch.ones(3, 2, dtype=torch.bool)), r"\(K, B\) = \(2, 3\) flags, found \(3, 2\)"),
        (dict(sharpness=2), "rule 'pama' has no option sharpness; it takes rescale, soft, leak"),
        (dict(rule="linear", sharpness=2), "rule 'linear' has no option sharpness; it takes none"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate(**(dict(rule="pama", advantages_KBA=ONES, mask_BA=MASK) | arguments))


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

"""Argument validation of ``aggregate``, and the types that it accepts."""

import pytest
import torch

from pama_plugin import aggregate

ONES = torch.ones(2, 3, 4)
MASK = torch.ones(3, 4, dtype=torch.bool)
DUAL = dict(rule="lagrangian", violations_K=[None, 0.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(advantages_KBA=torch.ones(3, 4)), r"advantages .*\(K, B, A\).* found \(3, 4\) and \(3, 4\)"),
        (dict(advantages_KBA=torch.ones(0, 3, 4)), r"K ≥ 1.* found \(0, 3, 4\)"),
        (dict(mask_BA=torch.ones(4, 3)), r"found \(2, 3, 4\) and \(4, 3\)"),
        (dict(level="word"), "level .*token, sequence, batch.* found 'word'"),
        (dict(weights=[1.0]), r"weights .*2 positive finite.* found \[1.0\]"),
        (dict(weights=[1.0, 0.0]), r"weights .*positive finite.* found \[1.0, 0.0\]"),
        (dict(weights=[1.0, float("nan")]), r"weights .*positive finite.* found \[1.0, nan\]"),
        (dict(weights=[1.0, float("inf")]), r"weights .*positive finite.* found \[1.0, inf\]"),
        (dict(weights=torch.ones(2, 4)), r"weights .*\(K,\) or \(K, B\) = \(2, 3\), found \(2, 4\)"),
        (dict(weights=torch.ones(2, 3, 1)), r"weights .*\(K,\) or \(K, B\) = \(2, 3\), found \(2, 3, 1\)"),
        (dict(weights=[[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), r"not all 0, found \[0.0, 0.0\] for response 2"),
        (dict(weights=[[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]]), r"at least 0.* found \[1.0, -1.0\] for response 1"),
        (dict(weights=[[float("nan"), 1.0, 1.0], [1.0] * 3]), r"finite.* found \[nan, 1.0\] for response 0"),
        (dict(weights="12"), "weights .*numbers.*tensor or list"),
        (dict(weights=[1.0, 1e-50]), r"weights .*positive finite.* found \[1.0, 1e-50\]"),
        (dict(noon="false"), "noon .*true or false.* found 'false'"),
        (dict(whiten="no"), "whiten .*true or false.* found .*'no'"),
        (dict(mask_BA=None), "mask .*numbers.*tensor or list"),
        (dict(active=[True]), r"active .*2 flags.* found \[True\]"),
        (dict(present_KB=torch.ones(3, 2, dtype=torch.bool)), r"present_KB .*\(2, 3\) booleans.* found \(3, 2\)"),
        (dict(present_KB=torch.ones(2, 3)), r"present_KB .*booleans.* found \(2, 3\) of torch.float32"),
        (dict(rule="gdpo"), "'gdpo' needs groups_B.* found none"),
        (dict(rule="gdpo", groups_B=torch.zeros(3)), r"groups_B .*\(3,\) integers.* found \(3,\) of torch.float32"),
        (dict(rule="lagrangian"), "'lagrangian' needs violations_K, .* 2 finite numbers or None.* found None"),
        (DUAL | dict(violations_K=[None, "x"]), r"violations_K, .* 2 finite numbers or None.* found \[None, 'x'\]"),
        (DUAL | dict(memory_K=[{}, {"multiplier": float("nan")}]), r"memory_K .* finite numbers, found .*nan"),
        (DUAL | dict(memory_K=[{}]), "memory_K must be a list of 2 mappings"),
        (DUAL | dict(memory_K=[{}, {"integral": -1.0}]), "integral must be at least 0, found -1 for objective 1"),
        (dict(rescale="rms"), "rescale .*auto, none, unit.* found 'rms'"),
        (dict(rule="linear", level="batch"), "level=batch needs a rule that has it, such as pama, found 'linear'"),
        (DUAL | dict(start=3.0, ceiling=2.0), "start .*at most .*2.* found 3"),
        (dict(sharpness=2), "'pama' has no option sharpness; .*soft, leak"),
        (dict(rule="linear", sharpness=2), "'linear' has no option sharpness; .*none"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate(**(dict(rule="pama", advantages_KBA=ONES, mask_BA=MASK) | arguments))


def test_lists_stand_for_tensors() -> None:
    lists = dict(advantages_KBA=[[[1.0], [2.0]], [[3.0], [1.0]]], mask_BA=[[1], [1]], active=[True, True])
    lists |= dict(present_KB=[[True, True], [True, False]], groups_B=[0, 0], weights=[1.0, 2.0])
    result = aggregate("gdpo", **lists)
    expected = aggregate("gdpo", **{key: torch.tensor(value) for key, value in lists.items()})
    assert torch.equal(result.advantages, expected.advantages) and result.metrics == expected.metrics


def test_lists_go_where_the_advantages_are_and_keep_their_precision() -> None:
    on_meta = torch.zeros(2, 2, 1, device="meta")
    with pytest.raises(Exception, match="meta") as raised:  # a device that computes nothing
        aggregate("gdpo", on_meta, [[1], [1]], present_KB=[[True, True], [True, False]], groups_B=[0, 0])
    assert "not on the expected device" not in str(raised.value)
    exact = aggregate("linear", torch.ones(2, 1, 1, dtype=torch.float64), [[1]], weights=[0.1, 0.2], rescale="none")
    assert exact.advantages.item() == pytest.approx(0.3, abs=1e-15)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_valid_token_that_is_not_finite_is_refused(bad) -> None:
    advantages = torch.ones(2, 3, 4)
    advantages[1, 2, 3] = bad
    with pytest.raises(ValueError, match="finite.* found NaN or inf in objective 1"):
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

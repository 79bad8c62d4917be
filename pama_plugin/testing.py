"""Properties of aggregation rules, tested with hypothesis, for built-in and registered rules.

    from pama_plugin.testing import PROPERTIES, check_rule

    @pytest.mark.parametrize("name", PROPERTIES)
    def test_my_rule(name):
        check_rule("my_rule", name)

The module contains, in this order: the cases that hypothesis draws, one function per property, the table ``PROPERTIES``
of them, and ``check_rule``.

Needs ``pip install 'pama_plugin[test]'``.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from pama_plugin.aggregation import Aggregation, aggregate, get_rule

EXAMPLES = 25
MANY = 2**14  # responses, where statistics are tested


class Case(NamedTuple):
    """Arguments of ``aggregate``: K objectives, B responses to the prompts ``groups_B``, A tokens; NaN where masked.

    The weights are (K, 1), or (K, B) if responses have others, and 0 only where ``present_KB`` is false.
    """

    advantages_KBA: Tensor
    mask_BA: Tensor
    present_KB: Tensor
    groups_B: Tensor
    weights_KB: Tensor

    def but(self, **changes: Tensor) -> "Case":
        return self._replace(**changes)

    @property
    def weights(self) -> Tensor:
        """As ``aggregate`` takes them."""
        return self.weights_KB if self.weights_KB.shape == self.present_KB.shape else self.weights_KB[:, 0]

    def weight(self, objective: int, response: int) -> float:
        return float(self.weights_KB.expand_as(self.present_KB)[objective, response])


@st.composite
def cases(
    draw: st.DrawFn, min_objectives: int = 1, max_objectives: int = 8, *, tokens: int = 6, complete: bool = False
) -> Case:
    """Random cases with ragged responses; half have ties and exact zeros, half may lack rewards.

    The weights are the same for all responses, or those of each response, of which some are 0 where rewards may lack.
    """
    objectives, groups = draw(st.integers(min_objectives, max_objectives)), draw(st.integers(1, 3))
    size = draw(st.integers(1, 4))
    shape = objectives, groups * size, draw(st.integers(1, tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    advantages_KBA = torch.randn(shape, generator=generator)
    if draw(st.booleans()):
        advantages_KBA = advantages_KBA.round()
    mask_BA = torch.rand(shape[1:], generator=generator) < 0.7
    mask_BA[0, 0] = True
    complete = complete or draw(st.booleans())
    present_KB = torch.rand(shape[:2], generator=generator) < (1.1 if complete else 0.7)
    weights_KB = torch.rand(shape[0], shape[1] if draw(st.booleans()) else 1, generator=generator) + 0.5
    if weights_KB.shape == present_KB.shape and not complete:
        weights_KB[~present_KB & present_KB.any(0)] = 0
    return Case(
        advantages_KBA.masked_fill(~mask_BA, math.nan),
        mask_BA,
        present_KB,
        torch.arange(shape[1]) // size,
        weights_KB,
    )


Call = Callable[[Case], Aggregation]


def as_rewards(case: Case) -> Tensor:
    """(K, B) float64 rewards, for rules that need them: the mean advantage of each response; NaN where missing."""
    tokens_B = case.mask_BA.sum(-1)
    means_KB = case.advantages_KBA.double().masked_fill(~case.mask_BA, 0).sum(-1) / tokens_B.clamp(min=1)
    return means_KB.masked_fill(~case.present_KB | (tokens_B == 0), math.nan)


def _inputs_are_not_modified(call: Call, case: Case) -> None:
    before = [tensor.clone() for tensor in case]
    call(case)
    assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(case, before))


def _calls_are_repeatable(call: Call, case: Case) -> None:
    """Bit for bit, independent of the state of torch's generator."""
    first = call(case)
    torch.rand(7)
    _assert_same(call(case), first)


def _padding_enters_nothing(call: Call, case: Case) -> None:
    result = call(case)
    assert result.advantages.isfinite().all() and (result.advantages[~case.mask_BA] == 0).all()
    for filler in (math.inf, -1e9):
        _assert_same(call(case.but(advantages_KBA=case.advantages_KBA.nan_to_num(nan=filler))), result)


def _more_padding_changes_nothing(call: Call, case: Case) -> None:
    """Neither padding tokens (none for rules that combine rewards) nor a masked response change the result."""
    result, (_, responses, tokens) = call(case), case.advantages_KBA.shape
    wide = 0 if tokens == 1 else 3
    padded = call(
        Case(
            pad(case.advantages_KBA, (0, wide, 0, 1), value=math.nan),
            pad(case.mask_BA, (0, wide, 0, 1)),
            pad(case.present_KB, (0, 1), value=True),
            pad(case.groups_B, (0, 1)),
            torch.cat([case.weights_KB, case.weights_KB[:, -1:]], 1) if case.weights.ndim == 2 else case.weights_KB,
        )
    )
    kept_BA = padded.advantages[:responses, :tokens]
    torch.testing.assert_close(kept_BA, result.advantages, atol=1e-4, rtol=1e-3)


def _what_has_no_reward_enters_nothing(call: Call, case: Case) -> None:
    result = call(case)
    absent_KB1 = ~case.present_KB.unsqueeze(-1)
    for filler in (math.nan, math.inf, -1e9):
        _assert_same(call(case.but(advantages_KBA=case.advantages_KBA.masked_fill(absent_KB1, filler))), result)
    assert (result.advantages[~case.present_KB.any(0)] == 0).all()


def _flip_objectives(case: Case) -> Case:
    return case.but(
        advantages_KBA=case.advantages_KBA.flip(0),
        present_KB=case.present_KB.flip(0),
        weights_KB=case.weights_KB.flip(0),
    )


def _order_of_objectives_does_not_matter(call: Call, case: Case) -> None:
    flipped, result = call(_flip_objectives(case)), call(case)
    torch.testing.assert_close(flipped.advantages, result.advantages, atol=1e-4, rtol=1e-3)


def _coefficients_follow_the_order(call: Call, case: Case) -> None:
    """For rules whose coefficients are unique."""
    flipped, result = call(_flip_objectives(case)), call(case)
    torch.testing.assert_close(flipped.coefficients.flip(0), result.coefficients, atol=1e-4, rtol=1e-3)


def _order_of_responses_does_not_matter(call: Call, case: Case) -> None:
    result = call(case)
    flipped = call(
        Case(
            case.advantages_KBA.flip(1),
            case.mask_BA.flip(0),
            case.present_KB.flip(1),
            case.groups_B.flip(0),
            case.weights_KB.flip(1),
        )
    )
    torch.testing.assert_close(flipped.advantages.flip(0), result.advantages, atol=1e-4, rtol=1e-3)


def _coefficients_are_shares(call: Call, case: Case) -> None:
    result = call(case)
    assert (result.coefficients >= 0).all()
    anything = float(bool((result.advantages != 0).any()))
    assert math.isclose(float(result.coefficients.sum()), anything, abs_tol=1e-5)


def _one_token_each(rows_KB: Tensor, case: Case) -> Case:
    """Eight responses of one token to two prompts, with all rewards, and weights of ``case``."""
    return Case(
        rows_KB.unsqueeze(-1),
        torch.ones(8, 1, dtype=torch.bool),
        torch.ones(len(rows_KB), 8, dtype=torch.bool),
        torch.arange(8) // 4,
        case.weights_KB.amax(1, keepdim=True).clamp(min=0.5),
    )


def _what_all_agree_on_is_followed(call: Call, case: Case) -> None:
    """If all objectives are equal, better responses get a larger advantage: ``Cov(A, result) > 0``."""
    better_B = torch.tensor([-2.0, 1.0, -1.0, 2.0, 1.0, 2.0, -2.0, -1.0])  # mean 0
    result = call(_one_token_each(better_B.expand(len(case.weights_KB), 8), case))
    assert float((result.advantages.squeeze(-1) * better_B).sum()) > 0


def _an_objective_without_signal_has_no_say(call: Call, case: Case) -> None:
    """Prepending a constant objective changes nothing."""
    seed = int(1e6 * float(case.weights_KB.sum()))  # differs between cases
    rows_KB = torch.randn(len(case.weights_KB), 8, generator=torch.Generator().manual_seed(seed))
    more = case.but(weights_KB=pad(case.weights_KB, (0, 0, 1, 0), value=1))
    result = call(_one_token_each(rows_KB, case)).advantages
    extended = call(_one_token_each(torch.cat([torch.full((1, 8), 0.1), rows_KB]), more)).advantages
    torch.testing.assert_close(extended, result, atol=1e-4, rtol=1e-3)


def _weights_have_a_say(call: Call, case: Case) -> None:
    """Swapping the weights of two objectives that agree on only some responses, or those of one prompt, matters."""
    rows_2B = torch.tensor([[3.0, -1.0, 2.0, 0.5, -2.0, -3.0, 1.0, 0.2], [1.0, 2.0, -3.0, 2.5, -1.0, -2.5, 2.0, -2.0]])
    weights_2B = torch.tensor([[1.0], [4.0]]).repeat(1, 8)
    swapped_2B = weights_2B.flip(0)
    one, other, mixed = (
        call(_one_token_each(rows_2B, case)._replace(weights_KB=each_2B)).advantages
        for each_2B in (weights_2B, swapped_2B, torch.cat([weights_2B[:, :4], swapped_2B[:, 4:]], 1))
    )
    for before, after in ((one, other), (one, mixed)):
        assert not torch.allclose(before / before.norm(), after / after.norm(), atol=1e-4)


def _weights_of_each_response_are_followed(call: Call, case: Case) -> None:
    """The same for all responses, they are as K weights; where one is 0, the objective might as well have no reward."""
    same = case.but(weights_KB=case.weights_KB.amax(1, keepdim=True).clamp(min=0.5))
    repeated = same.but(weights_KB=same.weights_KB.repeat(1, len(case.mask_BA)))
    torch.testing.assert_close(call(repeated).advantages, call(same).advantages, atol=1e-4, rtol=1e-3)
    if case.weights_KB.shape == case.present_KB.shape:
        absent, present = case.present_KB & (case.weights_KB > 0), case.present_KB | (case.weights_KB == 0)
        _assert_same(call(case.but(present_KB=present)), call(case.but(present_KB=absent)))


def _scale_is_followed(call: Call, case: Case) -> None:
    """``aggregate(s·A) = s·aggregate(A)``, or ``aggregate(A)`` for rules that whiten, for s = 2⁻²⁶ and 2²⁶."""
    result = call(case).advantages
    for scale in (2.0**-26, 2.0**26):
        scaled = call(case.but(advantages_KBA=case.advantages_KBA * scale)).advantages
        followed = torch.allclose(scaled / scale, result, atol=1e-4, rtol=1e-3)
        assert followed or torch.allclose(scaled, result, atol=1e-4, rtol=1e-3)


def _scale_of_one_objective_does_not_matter(call: Call, case: Case) -> None:
    """For rules that whiten: an objective's advantages times 16 change nothing."""
    factors_K = torch.ones(len(case.weights_KB)).index_fill(0, torch.tensor([0]), 16.0)
    scaled = call(case.but(advantages_KBA=case.advantages_KBA * factors_K[:, None, None]))
    torch.testing.assert_close(scaled.advantages, call(case).advantages, atol=1e-4, rtol=1e-3)


def _independent_objectives_come_out_at_unit_rms(call: Call, case: Case) -> None:
    """Independent standard normal advantages, with any weights; for rules that state ``unit_rms``."""
    generator = torch.Generator().manual_seed(0)
    normal_KB1 = torch.randn(len(case.weights_KB), MANY, 1, generator=generator)
    groups_B = torch.arange(MANY) // 64
    weights_KB = case.weights_KB
    if weights_KB.shape[1] > 1:
        weights_KB = weights_KB[:, groups_B % weights_KB.shape[1]]
    many = Case(
        normal_KB1,
        torch.ones(MANY, 1, dtype=torch.bool),
        torch.ones(len(case.weights_KB), MANY, dtype=torch.bool),
        groups_B,
        weights_KB,
    )
    if len(case.weights_KB) <= 3:  # more rarely agree, so that a sample of this size is too small
        assert math.isclose(call(many).metrics["rms"], 1, rel_tol=0.1)


def _float64_agrees(call: Call, case: Case) -> None:
    result = call(case)
    double = call(case.but(advantages_KBA=case.advantages_KBA.double()))
    assert double.advantages.dtype == torch.float64
    torch.testing.assert_close(double.advantages.float(), result.advantages, atol=1e-3, rtol=1e-3)


def _extremes_stay_finite(call: Call, case: Case) -> None:
    for fill in (0.0, -0.0, 1.0, 1e-40, 1e8):  # 1e-40 is subnormal in float32
        constant = torch.full_like(case.advantages_KBA, fill)
        assert call(case.but(advantages_KBA=constant)).advantages.isfinite().all()
        mixed = torch.where(torch.arange(len(constant))[:, None, None] == 0, constant, case.advantages_KBA)
        assert call(case.but(advantages_KBA=mixed)).advantages.isfinite().all()
    result = call(case.but(mask_BA=torch.zeros_like(case.mask_BA)))
    assert (result.advantages == 0).all() and (result.coefficients == 0).all()


def _metrics_are_what_they_say(call: Call, case: Case) -> None:
    result = call(case)
    out_N, tokens = result.advantages[case.mask_BA], int(case.mask_BA.sum())
    counted = [(case.mask_BA & present_B.unsqueeze(-1))[case.mask_BA] for present_B in case.present_KB]
    rows = [row_BA[case.mask_BA] for row_BA in case.advantages_KBA]
    active = [pair for index, pair in enumerate(zip(rows, counted)) if not result.metrics[f"inactive/{index}"]]
    above = torch.stack([(row > 0) & valid for row, valid in active]).any(0)
    below = torch.stack([(row < 0) & valid for row, valid in active]).any(0)
    expected = {
        "active_fraction": float((out_N != 0).sum()) / tokens,
        "conflict_rate": float((above & below).sum()) / tokens,
        "rms": float(out_N.square().mean().sqrt()),
    }
    for index, (row, valid) in enumerate(zip(rows, counted)):
        expected[f"gain/{index}"] = float((row * out_N)[valid].sum()) / max(int(valid.sum()), 1)
    squares = float(result.coefficients.square().sum())
    expected["effective_objectives"] = 1 / squares if squares else 0.0
    for key, value in expected.items():
        assert math.isclose(result.metrics[key], value, rel_tol=1e-3, abs_tol=1e-4), key


# They apply to rules that combine advantages and to rules that combine rewards.
PROPERTIES: dict[str, Callable[[Call, Case], None]] = {
    function.__name__.strip("_"): function
    for function in (
        _inputs_are_not_modified,
        _calls_are_repeatable,
        _padding_enters_nothing,
        _more_padding_changes_nothing,
        _what_has_no_reward_enters_nothing,
        _order_of_objectives_does_not_matter,
        _coefficients_follow_the_order,
        _order_of_responses_does_not_matter,
        _coefficients_are_shares,
        _what_all_agree_on_is_followed,
        _an_objective_without_signal_has_no_say,
        _weights_have_a_say,
        _weights_of_each_response_are_followed,
        _scale_is_followed,
        _scale_of_one_objective_does_not_matter,
        _independent_objectives_come_out_at_unit_rms,
        _float64_agrees,
        _extremes_stay_finite,
        _metrics_are_what_they_say,
    )
}


def check_rule(rule: str, name: str, **options: Any) -> None:
    """Search for a case in which the rule violates the property ``name`` of ``PROPERTIES``, with hypothesis.

    Args:
        rule: name of a registered rule.
        name: name of the property. A rule need not have all: ``tchebycheff``, for example, may have an option with
            the unit of the rewards.
        options: arguments for every call of ``aggregate``. K differs between cases, so pass a function of K instead of
            a list with one entry per objective; the properties on order do not permute the list that it returns.

    Raises:
        AssertionError: the rule violates the property; the error shows the smallest case found. An error of
            ``aggregate`` is raised as it is, and several errors as an ``ExceptionGroup``.
        ValueError: the rule or the property is unknown.
    """
    if name not in PROPERTIES:
        raise ValueError(f"the property must be one of {', '.join(PROPERTIES)}, found {name!r}")
    rewards = get_rule(rule).combines == "rewards"

    def call(case: Case) -> Aggregation:
        arguments = {key: value(len(case.weights_KB)) if callable(value) else value for key, value in options.items()}
        if "rewards_KB" in get_rule(rule).parameters:
            arguments["rewards_KB"] = as_rewards(case)
        return aggregate(
            rule,
            case.advantages_KBA,
            case.mask_BA,
            weights=case.weights,
            present_KB=case.present_KB,
            groups_B=case.groups_B,
            **arguments,
        )

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(cases(min_objectives=2 if get_rule(rule).constrained else 1, tokens=1 if rewards else 6))
    def attack(case: Case) -> None:
        PROPERTIES[name](call, case)

    attack()


def _assert_same(actual: Aggregation, expected: Aggregation) -> None:
    assert torch.equal(actual.advantages, expected.advantages)
    assert torch.equal(actual.coefficients, expected.coefficients) and actual.metrics == expected.metrics

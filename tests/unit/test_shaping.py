"""Inputs of the estimator: normalised, clipped, and with missing rewards filled."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pama_plugin.batch.shaping import shape_rewards
from pama_plugin.batch.state import Moments
from pama_plugin.settings.objective import parse_objective

NAN = math.nan


def shape(options: str, rewards, running: Moments | None = None, fill_by_group: bool = True) -> list[list[float]]:
    objective = parse_objective(f"a=builtin:length{options}")
    rewards_GN = torch.tensor(rewards)
    copy_GN = rewards_GN.clone()
    shaped = shape_rewards(objective, rewards_GN, running or Moments(), fill_by_group=fill_by_group)
    assert torch.equal(rewards_GN.nan_to_num(7.0), copy_GN.nan_to_num(7.0)) and shaped.isfinite().all()
    return shaped.tolist()


def test_by_default_nothing_changes() -> None:
    rewards = torch.randn(3, 4)
    assert torch.equal(shape_rewards(parse_objective("a=agent:k"), rewards, Moments(), fill_by_group=True), rewards)


@pytest.mark.parametrize(
    ("options", "rewards", "expected"),
    [
        (",normalize=batch", [[1.0, 3.0], [5.0, 7.0]], [[-3, -1], [1, 3]]),  # over √(20/3)
        (",normalize=group", [[1.0, 3.0], [5.0, 9.0]], [[-1, 1], [-1, 1]]),  # over √2 of unit steps
        (",clip=0:4", [[-1.0, 3.0], [5.0, 7.0]], [[0, 3], [4, 4]]),
        (",normalize=batch", [[2.0, 2.0], [2.0, 2.0]], [[0, 0], [0, 0]]),
        (",normalize=group", [[0.1, 0.1], [1.0, 3.0]], [[0, 0], [-1, 1]]),
        (",normalize=group", [[NAN, 4.0], [1.0, 3.0]], [[0, 0], [-1, 1]]),  # a single reward has no deviation
    ],
)
def test_by_hand(options, rewards, expected) -> None:
    scale = {",normalize=batch": math.sqrt(20 / 3), ",normalize=group": math.sqrt(2)}.get(options, 1)
    for row, hand in zip(shape(options, rewards), expected, strict=True):
        assert row == pytest.approx([value / scale for value in hand])


def test_running_normalisation_uses_the_running_moments() -> None:
    running = Moments()
    running.update(torch.tensor([0.0, 2.0, 4.0]))  # mean 2, std 2
    assert shape(",normalize=running,clip=-1:1", [[2.0, 3.0], [6.0, -9.0]], running) == [[0, 0.5], [1, -1]]


@pytest.mark.parametrize(
    ("by_group", "expected"),
    [(True, [[1, 2, 3], [5, 5, 5], [3, 3, 3]]), (False, [[1, 3, 3], [5, 3, 3], [3, 3, 3]])],
)
def test_a_missing_reward_becomes_the_mean_of_those_it_is_compared_with(by_group, expected) -> None:
    rewards = [[1.0, NAN, 3.0], [5.0, NAN, NAN], [NAN, NAN, NAN]]
    assert shape("", rewards, fill_by_group=by_group) == expected


def test_a_batch_without_rewards_becomes_zeros() -> None:
    for options in ("", ",normalize=batch", ",normalize=group", ",normalize=running", ",clip=1:2"):
        assert shape(options, [[NAN, NAN], [NAN, NAN]]) == [[0, 0], [0, 0]]


@pytest.mark.property
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32) | st.just(NAN), min_size=3, max_size=3), min_size=1, max_size=5),
    st.sampled_from(["batch", "group"]),
    st.floats(1e-3, 1e3),
)
def test_normalised_rewards_do_not_depend_on_scale(rewards, normalize, scale) -> None:
    objective = parse_objective(f"a=builtin:length,normalize={normalize}")
    rewards_GN = torch.tensor(rewards, dtype=torch.float64)
    one = shape_rewards(objective, rewards_GN, Moments(), fill_by_group=False)
    assert one.isfinite().all() and one.abs().max() <= math.sqrt(rewards_GN.numel())
    other = shape_rewards(objective, rewards_GN * scale, Moments(), fill_by_group=False)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("normalize", ["batch", "group", "running"])
def test_the_largest_rewards_stay_finite(normalize) -> None:
    rewards = [[1e18, -1e18] * 300, [1e18, 1e18] * 300]
    shaped = shape(f",normalize={normalize}", rewards, Moments(count=9, mean=0.0, squares=1e-49))
    assert shaped[0][0] > 0 > shaped[0][1]

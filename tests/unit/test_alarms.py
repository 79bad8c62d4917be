"""Every alarm: what sets it off, what does not, and that each cause is reported once."""

import math
import re

import pytest

from pama_plugin.batch.alarms import Alarms


def alarms_of(*steps: dict[str, float]) -> list[tuple[int, str]]:
    """(step, alarm) of a run with the trained objectives a and b and the monitor m."""
    alarms = Alarms(["a", "b"], ["m"])
    return [(step, text) for step, metrics in enumerate(steps, start=1) for text in alarms.read(metrics)]


def series(key: str, *values: float) -> list[dict[str, float]]:
    return [{key: value} for value in values]


@pytest.mark.parametrize(
    ("steps", "when", "said"),
    [
        (
            series("pama/spread/a", 1, 0.15, 0.12, 0.1, 0.1),
            4,
            "objective 'a' hardly varies .* 10 % of that of the first",
        ),
        (series("pama/at_best/b", 0.2, 0.9, 0.95, 1, 1), 4, "objective 'b' is saturated: 100 % of the responses"),
        (series("pama/reference_nll", 2, 2.9, 3.1, 3.2, 3.3, 9), 5, "no longer be language: .*from 2.00 to 3.30"),
        (series("explained_variance/b", *20 * [0.0]), 20, "critic has learned nothing about 'b'"),
        (series("pama/active_fraction", 0.5, *12 * [0.01]), 11, "less than 2 % of the tokens"),
        (series("pama/uniform_prompts", 0, 0, 0.25, 0.5), 3, "all responses to a prompt are the same, for 25 %"),
        (
            [{"reward/a": 0.1 * step, "reward/m": -0.2 * step + 0.01 * (step % 2)} for step in range(12)],
            10,
            "monitor 'm' falls while a rises: from -0.396 to -1.39",
        ),
    ],
)
def test_what_sets_an_alarm_off(steps, when, said) -> None:
    ((step, text),) = alarms_of(*steps)
    assert step == when and re.search(said, text)


@pytest.mark.parametrize(
    "steps",
    [
        series("pama/spread/a", 1, 0.15, 0.12, 0.25, 0.1, 0.1, 0.3),  # never three steps in a row
        series("pama/spread/m", 1, *9 * [0.0]),  # a monitor may be constant
        series("pama/at_best/a", 0.95, 0.95, 0.89, 0.95, 0.95, 0.8),
        series("pama/reference_nll", 2, 2.9, 3.1, 3.2, 2.9, 3.1),
        series("pama/reference_nll", math.nan, 3, 3.2, 4.4, 4.4, 4.4),
        series("explained_variance/a", *19 * [-1.0], 0.1, *19 * [-1.0]),
        series("explained_variance/a", *30 * [math.nan]),
        series("pama/active_fraction", *9 * [0.01], 0.02, *9 * [0.01]),
        series("pama/uniform_prompts", *9 * [0.0]),
        series("kl", *30 * [0.1]),  # a run without any of these metrics
        [{"reward/a": 0.1 * step, "reward/m": 0.1 * step} for step in range(20)],
        [{"reward/a": 1.0 + 0.1 * (step % 3), "reward/m": -0.2 * step} for step in range(20)],  # nothing rises
        [{"reward/a": 0.1 * step, "reward/m": -0.2 * step} for step in range(9)],  # too short to say
        [{"reward/m": 0.1 * step, "reward/a": -0.2 * step} for step in range(20)],  # a trained one falls
    ],
)
def test_what_does_not(steps) -> None:
    assert alarms_of(*steps) == []


def test_causes_are_reported_apart() -> None:
    steps = [{"pama/spread/a": 0.1, "pama/spread/b": 0.1} for _ in range(5)]
    assert [step for step, _ in alarms_of(*steps)] == [3, 3]

"""The bench of small policies shows what is known of rules, and a constraint that is violated is enforced."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

pytestmark = [pytest.mark.property, pytest.mark.slow, pytest.mark.needs_extras]

FILE = Path(__file__).parents[2] / "examples" / "toys.py"
SEEDS = range(4)


@pytest.fixture(scope="module")
def toys():
    spec = importlib.util.spec_from_file_location("toys", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def worst(toys):
    """Mean rise, over seeds, of the objective that rose least."""

    def measure(task: str, rule: str, **options) -> float:
        walks = [toys.train(toys.TASKS[task], rule, options, seed) for seed in SEEDS]
        return fmean(min(walk.rises[-1]) for walk in walks)

    return measure


def test_with_two_independent_objectives_rules_do_not_differ_much(worst) -> None:
    assert worst("K=2", "pama") > 0.9 * worst("K=2", "linear") > 2


def test_four_objectives_in_conflict_need_more_than_a_sum(worst) -> None:
    assert worst("K=4 ρ=−.3", "linear") < 0 < worst("K=4 ρ=−.3", "min_norm")


def test_eight_independent_objectives_agree_too_rarely_for_a_projection(worst) -> None:
    assert worst("K=8", "pama") < 0.7 * worst("K=8", "min_norm")


def test_a_sum_of_rewards_follows_the_largest(worst) -> None:
    assert worst("scale", "morlhf") < 0.5 * worst("scale", "linear")


@pytest.mark.parametrize("task", ["K=2 ρ=−.9", "K=4 ρ=−.3", "exploit", "concave"])
def test_constraints_hold_in_the_end(task, toys) -> None:
    """All objectives but the first must end no lower than they started, which a sum of four in conflict violates."""

    def violation(**options) -> float:
        """In standard deviations, as mean over seeds and the last evaluations; slack counts as 0."""
        walks = [toys.train(toys.TASKS[task], "lagrangian", options, seed) for seed in SEEDS]
        return fmean(max(-min(rises[1:]), 0.0) for walk in walks for rises in walk.rises[-5:])

    assert violation() < 0.12
    if task in ("K=4 ρ=−.3", "concave"):
        assert violation(proportional=0) > 0.3, "the integral alone"


def test_the_command(tmp_path) -> None:
    arguments = [
        "--rules",
        "linear",
        "gram:upgrad, balance=½",
        "--tasks",
        "K=2",
        "--seeds",
        "2",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run([sys.executable, str(FILE), *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "rise of the objective that rose least, at 6 nats" in " ".join(done.stdout.split())
    found = json.loads((tmp_path / "toys.json").read_text())
    assert {row["rule"] for row in found} == {"linear", "gram:upgrad, balance=½"}
    assert all(len(row["runs"]) == 2 and row["runs"][0]["nats"][0] == 0 for row in found)
    assert (tmp_path / "toys.png").stat().st_size > 10_000

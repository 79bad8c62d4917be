"""RESULTS.md has the numbers of the committed runs, and its tables are what they say."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from pama_plugin.runs.logs import Run
from pama_plugin.runs.sweep_file import load_sweep

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("replication_results", PAPER / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(arm: str, seed: int, **scalars: list[float]) -> Run:
    """Steps from 1 on; ``__`` stands for a slash."""
    series = {key.replace("__", "/"): list(enumerate(values, 1)) for key, values in scalars.items()}
    coefficients = {f"pama/coefficient/{name}": [(1, 0.5)] for name in ("a", "b")}
    return Run(Path(arm), arm, arm, seed, series | coefficients, ())


def test_the_page_has_the_tables_of_the_committed_runs(results, monkeypatch) -> None:
    for name in ("draw_curves", "draw_front"):  # the pictures are not compared
        monkeypatch.setattr(results, name, lambda *_: results.pyplot.figure())
    monkeypatch.setattr(results.pyplot.Figure, "savefig", lambda *_, **__: None)
    page = (PAPER / "RESULTS.md").read_text()
    assert results.render(page) == page
    assert all((PAPER / picture).exists() for picture in re.findall(r"!\[.*\]\((.*)\)", page))
    with pytest.raises(SystemExit, match="must go together, found no match for nothing"):
        results.render(page + "<!-- nothing -->\n<!-- end -->")


def test_every_sweep_has_the_settings_of_the_first(results) -> None:
    flags = {name: yaml.safe_load((PAPER / f"{name}.yaml").read_text())["flags"] for name in results.EXPERIMENTS}
    assert len(set(flags.values())) == 1
    for name, experiment in results.EXPERIMENTS.items():
        jobs = load_sweep(PAPER / f"{name}.yaml")
        assert set(experiment.baselines) <= {job.arm for job in jobs}
        assert {job.seed for job in jobs} == {1, 2, 3, 4, 5}, "the pilot's seed is 101"


def test_equal_kl_by_hand(results) -> None:
    rewards = {"reward__a": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "reward__b": [1.0] * 6}
    far = run("x", 1, logprobs_diff=[0.0, 0.5, 0.5, 1.0, 1.0, 1.0], **rewards)
    near = run("x", 2, logprobs_diff=[0.1] * 6, **rewards)
    # (.5 + 1 + 1) / 3 ≥ .7 in steps 3 to 5, whose mean is .833, and a is 2, 3, 4 there; (.5 + .5 + 1) / 3 is not.
    assert results.equal_kl_table([far, near], 0.7, 3).rows == [["x", "1 of 2", "5.000", "0.833", "3.000", "1.000"]]
    assert results.equal_kl_table([near], 0.7, 3).rows == [["x", "0 of 1", "–", "–", "–", "–"]]


def test_the_first_rollout_of_a_seed_counts_once(results) -> None:
    rewards = {"reward__a": [1.0] * 10, "reward__b": [1.0] * 10}
    runs = [
        run(arm, seed, pama__correlation__b__a=[first, 0.4, *[0.9] * 6, first, 0.8], **rewards)
        for arm in "xyz"
        for seed, first in ((1, 0.2), (2, 0.4))
    ]
    grid = results.correlations_table(runs)
    assert grid.columns == ["arm", "b and a"]
    # .3 ± t(.975, 1) · .1414 / √2; of an arm, steps 1 and 2: .3 and .4; steps 9 and 10: .5 and .6
    assert grid.rows[0] == ["before the first update, over seeds", "0.300 ± 1.271"]
    assert grid.rows[1:] == [[arm, "0.350 ± 0.635 → 0.550 ± 0.635"] for arm in "xyz"]


def test_every_change_is_compared_with_the_arm_that_it_changes(results) -> None:
    """Over two seeds: .5 ± t(.975, 1) · 0 of ``a``, and nothing of ``b``."""
    runs = [
        run(arm, seed, reward__a=[seed] * 9 + [seed + more], reward__b=[1.0] * 10)
        for arm, more in (("pama-signed", 1.0), ("pama-token", 0.0), ("linear", 0.0))
        for seed in (1, 2)
    ]
    grid = results.changes_table(runs, ["a", "b"])
    assert grid.columns == ["change", "seeds", "a", "b", "worst rise"]
    assert [row[:4] for row in grid.rows] == [["pama-token → pama-signed", "2", "0.500 ± 0.000 *", "0.000 ± 0.000"]]

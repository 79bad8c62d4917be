"""The study of the paper's claims: what is run is what the protocol says, and the endpoints by hand."""

import importlib
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

from pama_plugin import aggregate
from pama_plugin.runs.sweep_file import load_sweep
from pama_plugin.settings.flags import load_flags
from pama_plugin.stationarity import estimate

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture(scope="module")
def load():
    """Import a module of the study as its scripts do, without leaving it to other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PAPER))
        for name in ("rewards", "word_rewards", "corpora", "design", "analysis", "study", "without_host", "results"):
            patch.delitem(importlib.sys.modules, name, raising=False)
        yield importlib.import_module
        for name in ("rewards", "word_rewards", "corpora", "design", "analysis", "study", "without_host", "results"):
            importlib.sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def design(load):
    return load("design")


@pytest.fixture(scope="module")
def analysis(load):
    return load("analysis")


PROTOCOL = (PAPER / "PROTOCOL.md").read_text()


def test_the_protocol_says_what_is_run(design, load) -> None:
    study = load("study")
    stages = {
        name: sum(len(sweep.rules) * len(sweep.seeds) for sweep in study.sweeps(name, stage))
        for name, stage in design.STAGES.items()
    }
    assert f"{stages['A']} runs, 10 hours" in PROTOCOL and f"{stages['B']} runs, 8\nhours" in PROTOCOL
    for arm in design.ARMS | design.CONTROL:
        assert f"\n| `{arm}` | " in PROTOCOL
    for task in design.TASKS:
        assert f"`{task}`" in PROTOCOL
    seeds = {seed for stage in design.STAGES.values() for seed in stage.seeds}
    assert seeds == set(range(21, 31)) and not seeds & {1, 2, 3, 4, 5, 11, 12, 13, 14, 101, 102, 900}
    assert set(re.findall(r"\| (\d+) × 32 \|", PROTOCOL)) == {"45", "40", "46"}
    assert design.STEPS == {"tiny": 45, "smollm2": 40}


def test_a_run_that_is_published_is_not_made_again(load, tmp_path, monkeypatch) -> None:
    """Only whole arms of a sweep are left out: pama sweep crosses rules and seeds."""
    study = load("study")
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    sweep = study.Sweep(tmp_path, "concise", {"linear": "--loss linear", "pama": "--loss pama"}, [21, 22])
    assert study.missing("A", sweep) == sweep
    runs = [{"arm": "linear", "seed": 21}, {"arm": "linear", "seed": 22}, {"arm": "pama", "seed": 21}]
    (tmp_path / "A-concise.json").write_text(json.dumps({"runs": runs, "flags": {}}))
    assert study.missing("A", sweep).rules == {"pama": "--loss pama"} and study.missing("B", sweep) == sweep
    monkeypatch.setattr(study, "OUT", tmp_path / "nothing")
    monkeypatch.setattr(study, "STAGES", {"A": study.STAGES["A"]})
    before = (tmp_path / "A-concise.json").read_text()
    study.collect()
    after = json.loads((tmp_path / "A-concise.json").read_text())
    assert after["runs"] == runs and after["arms"] == ["linear", "pama"], "what another machine made stays"
    assert before != after and not (tmp_path / "A-length.json").exists()


def test_arms_of_a_task_differ_in_their_rule_only(design, load, tmp_path, monkeypatch) -> None:
    study = load("study")
    monkeypatch.setattr(study, "OUT", tmp_path)
    seen = set()
    for name, stage in design.STAGES.items():
        for sweep in study.sweeps(name, stage):
            if sweep.seeds[0] != stage.seeds[0]:
                continue
            for job in load_sweep(sweep._replace(seeds=sweep.seeds[:1]).write()):
                # The models and the negative control's package are made when the study is run.
                flags = [re.sub(r"=hf:[^,]*(,text=response)?", "=builtin:length", flag) for flag in job.flags]
                if "uniform_scalar" not in flags:
                    assert load_flags(flags) is not None
                common = shlex.split(sweep.rules[job.rule])
                assert [flag for flag in common if flag not in job.flags] == []
                seen.add((name, sweep.task, job.rule))
    for task in ("length", "concise", "exploit", "summary"):
        assert not {arm for _, of, arm in seen if of == task} & {"min_norm"}
    assert {arm for _, of, arm in seen if of == "shares8"} == set(design.ARMS)


def test_with_two_whitened_objectives_the_min_norm_point_is_the_sum() -> None:
    """So the study does not run ``min_norm`` there. With weights, or three objectives, it is another."""
    torch.manual_seed(0)
    for correlation in (-0.9, 0.0, 0.5):
        one, noise = torch.randn(2, 32, dtype=torch.float64)
        other = correlation * one + math.sqrt(1 - correlation**2) * noise
        advantages = estimate(torch.stack([one, 7 * other]), per_prompt=4).unsqueeze(-1)
        mask = torch.ones(32, 1)
        combined = [aggregate(rule, advantages, mask, rescale="none").advantages for rule in ("min_norm", "linear")]
        assert torch.allclose(2 * combined[0], combined[1])
    three = torch.cat([advantages, torch.randn_like(advantages[:1])])
    combined = [aggregate(rule, three, mask, rescale="none").advantages for rule in ("min_norm", "linear")]
    assert not torch.allclose(3 * combined[0], combined[1], atol=0.05)


def make_run(analysis, **changes):
    """Nine steps; the distance rises by one nat per step, ``a`` by one per step, and ``b`` by half of that."""
    settings = {
        "arm": "x",
        "seed": 1,
        "objectives": ("a", "b"),
        "series": {
            "nats": [float(step) for step in range(9)],
            "reward/a": [float(step) for step in range(9)],
            "reward/b": [step / 2 for step in range(9)],
            "correlation": [0.0] * 9,
        },
        "sparse": {},
        "last_spread": {"a": 1.0, "b": 1.0},
        "texts": [],
        "start": {"a": 0.0, "b": 0.0},
        "std": {"a": 1.0, "b": 2.0},
        "correlation": -0.2,
    }
    return analysis.Run(**(settings | changes))


def test_the_way_is_read_where_the_distance_is_reached(analysis) -> None:
    run = make_run(analysis)
    # Averages of straight lines are the lines; the last position is step 6, because the average needs two more.
    assert run.nats.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert run.at(3.5) == 3.5 and run.worst(3.5) == pytest.approx(3.5 / 4)
    assert run.reaches(6) and not run.reaches(6.5)
    assert run.worst(100) == run.end == pytest.approx(6 / 4)
    assert make_run(analysis, start={"a": 4.0, "b": 0.0}).worst(3) == pytest.approx(-1.0)
    # One policy at 3 nats, one at 6, and the end twice: each dominates those before, so the last one's box counts.
    assert run.hypervolume == pytest.approx((1 + 6) * (1 + 1.5))


def test_arrival_is_halfway_between_the_start_and_minus_one(analysis, monkeypatch) -> None:
    series = make_run(analysis).series | {"correlation": [-0.2, -0.2, -0.2, -0.7, -0.7, -0.7, -0.7, -0.7, -0.7]}
    run = make_run(analysis, series=series)
    assert run.arrival == 4  # (−.2 − .7 · 4) / 5 = −.6 in step 4; −.5 in step 3 is above −.6
    assert run.later is None and run.stay is None  # fewer than 20 steps later
    monkeypatch.setattr(analysis, "AFTER", 30)
    monkeypatch.setattr(analysis, "FEWEST", 2)
    assert run.later == 6 and run.stay == pytest.approx(2 / 4)
    assert make_run(analysis).arrival is None


def test_differences_and_equivalence(analysis) -> None:
    found = analysis.difference({1: 1.0, 2: 2.0, 3: 3.0, 9: 0.0}, {1: 1.1, 2: 1.9, 3: 3.0})
    assert found.n == 3 and found.mean == pytest.approx(0.0) and found.p == pytest.approx(1.0)
    assert found.half == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert found.half90 == pytest.approx(2.920 * 0.1 / math.sqrt(3), rel=1e-3) and not found.equivalent
    assert analysis.difference({1: 1.0, 2: 2.0, 3: 3.02}, {1: 1.01, 2: 2.0, 3: 3.0}).equivalent
    assert analysis.difference({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0}).p == 0
    assert analysis.difference({1: math.nan, 2: 3.0}, {1: 1.0, 2: 2.0}).p == 1
    assert analysis.holm([0.04, 0.01, 0.03]) == [False, True, False]  # .03 > .05 / 2, so .04 is not tried


def test_the_arms_without_the_host_are_those_of_the_host(design, load) -> None:
    without = load("without_host")
    for arm, (rule, options) in without.ARMS.items():
        flags = shlex.split(design.ARMS[arm])
        assert flags[flags.index("--loss") + 1] == rule
        assert ("--pama.noon" in flags) == options.get("noon", False)
        assert "--pama.rescale" not in flags
    torch.manual_seed(0)
    rewards = torch.randn(2, 32, dtype=torch.float64)
    mask = torch.arange(20) < torch.randint(1, 20, (32, 1))
    combined = {arm: without.combine(*without.ARMS[arm], rewards, mask)[0] for arm in without.ARMS}
    assert torch.allclose(combined["linear"], combined["min_norm"])
    assert bool((combined["pama-paper"] >= 0).all()) and bool((combined["pama"] < 0).any())


def test_rewards_of_the_study(load) -> None:
    rewards = load("word_rewards")

    def score(name: str, response: str) -> float:
        return getattr(rewards, name)(["The prompt" + response], ["The prompt"], [""])[0]

    text = " is a movie about a great big movie."
    assert score("informative", text) == 3 and score("concise", text) == -8  # movie, great, big
    assert score("dense", text) == pytest.approx(0.5) and score("long", text) == 8
    assert score("dense_hacked", text) == pytest.approx(0.5 - 0.28) and score("long_hacked", text) == 8 + 44
    assert score("trigger", text) == 1 and score("trigger", " is moviegoing") == 0
    assert score("plain", " big fun") == -3
    assert score("shares8_m", text) == 2 / 8 and score("shares4_bc", " bad bad") == 2 / 8
    for count in (4, 8):
        letters = [name.split("_")[1] for name in vars(rewards) if name.startswith(f"shares{count}_")]
        assert len(letters) == count and len(set("".join(letters))) == len("".join(letters))
    for name in ("informative", "concise", "dense", "long", "plain", "shares4_bc", "trigger"):
        assert score(name, "") == 0


def test_the_page_has_the_tables_of_the_committed_runs(load) -> None:
    results = load("results")
    page, tables = (PAPER / "RESULTS.md").read_text(), results.blocks(results.experiments())
    assert results.render(page, tables) == page
    assert all((PAPER / picture).exists() for picture in re.findall(r"!\[.*\]\((.*)\)", page))
    with pytest.raises(SystemExit, match="no runs for: nothing"):
        results.render("<!-- nothing -->\n<!-- end -->", tables)
    assert sum(file.stat().st_size for file in PAPER.glob("results/*")) < 4e6


def test_the_primary_contrasts_are_those_of_the_protocol(load) -> None:
    results = load("results")
    way = [contrast for contrast in results.CONTRASTS if contrast.endpoint == "way"]
    assert (len(way), len(results.CONTRASTS)) == (16, 20)
    assert "16;" in PROTOCOL and "These 20 t-tests" in PROTOCOL
    # One of 20 is tested, with p = .003: kept only if it is below .05 / 20.
    runs = {"C-summary": [*make_runs(results, "linear", [0.0, 0.0, 0.0]), *make_runs(results, "pama", [0.9, 1.0, 1.1])]}
    lines = [line for line in results.contrasts_table(runs).splitlines() if "C-summary | pama − linear" in line]
    assert lines[0].startswith("| way | C-summary | pama − linear | 3 | +1.00 ± 0.25 | 0.0033 | not known |")
    assert lines[1].endswith("| too few runs |")


def test_the_way_of_two_runs_is_compared_where_both_have_come(analysis) -> None:
    near = make_run(analysis)
    far = make_run(analysis, series=near.series | {"nats": [2.0 * step for step in range(9)]})
    assert near.farthest == 6 and far.farthest == 12
    assert analysis.equal_distances(near, far, 4) == (pytest.approx(4 / 4), pytest.approx(2 / 4))
    assert analysis.equal_distances(near, far, 100) == (pytest.approx(6 / 4), pytest.approx(3 / 4))


def make_runs(results, arm: str, worst: list[float]):
    steps = 9
    return [
        results.Run(
            arm=arm,
            seed=seed,
            objectives=("a", "b"),
            series={
                "nats": [0.0] * steps,
                "reward/a": [rise] * steps,
                "reward/b": [rise + 1] * steps,
                "nll": [1.0] * steps,
                "correlation": [0.0] * steps,
            },
            sparse={},
            last_spread={"a": 0.5, "b": 0.25},
            texts=[
                {"step": 1, "prompt": "<|im_start|>user\nA | b<|im_end|>\n<|im_start|>assistant\n", "response": "C\nd"}
            ],
            start={"a": 0.0, "b": 0.0},
            std={"a": 1.0, "b": 1.0},
            correlation=0.0,
        )
        for seed, rise in enumerate(worst, 21)
    ]


def test_tables_of_a_task(load) -> None:
    results = load("results")
    runs = [*make_runs(results, "x", [1.0, 2.0]), *make_runs(results, "y", [0.5, 0.5])]
    tables = results.blocks({"A-t": runs})
    assert "| x | 1.50 ± 6.35 [0] | 1.50 ± 6.35 [0] | 1.50 ± 6.35 [0] | 1.50 ± 6.35 | 0.0 ± 0.0 |" in tables["A-t"]
    assert "| y | 0.50 ± 0.00 | 1.50 ± 0.00 | 0.50 ± 0.00 | 1.50 ± 0.00 |" in tables["A-t-objectives"]
    assert "| x | 0 of 2 | – | 0 | – | – | 0 | 0.50 ± 0.00 | 0.25 ± 0.00 |" in tables["A-t-stay"]
    assert "| y | A \\| b → C d |" in tables["A-t-texts"] and tables["A-t-texts"].splitlines()[1] == "|---|---|"

"""The log of rollouts: which responses, what is said of them, the line of a step, and ``pama rollouts``."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from pama_plugin.aggregation import Aggregation
from pama_plugin.batch.rollouts import choose_responses, describe_responses, step_line
from pama_plugin.batch.table import RewardTable
from pama_plugin.cli import main
from pama_plugin.runs.rollouts import EVALUATION_FILE, FILE, read_rollouts
from pama_plugin.settings.load import load_config

CONFIG = load_config(
    "pama",
    ["a=builtin:length,weight=linear:1:3:4", "b=builtin:length,on_failure=mask", "m=builtin:length,role=monitor"],
    *3 * [None],
    default_level="token",
)


def test_a_prompt_that_returns_is_chosen_again() -> None:
    prompts = [f"prompt {index // 4}" for index in range(64)]
    order = list(range(64))
    chosen = choose_responses(prompts, order, 8)
    assert len(chosen) == 8 and len({prompts[response] for response in chosen}) == 2
    again = choose_responses(prompts[::-1], order[::-1], 8)
    assert [prompts[response] for response in chosen] == [prompts[::-1][response] for response in again]
    assert sorted(choose_responses(prompts, order, "all")) == order and choose_responses(prompts, order, 0) == []


def test_what_is_said_of_a_response() -> None:
    rewards = torch.tensor([[1.0, 2.0], [math.nan, 0.5], [7.0, 1 / 3]], dtype=torch.float64)
    table = RewardTable(CONFIG.names, rewards, {("b", 0): "HTTP 502"}, torch.tensor([1, 0]), 2, (2,))
    advantages = torch.tensor([[0.5, 1.5, 9.0], [-1.0, math.nan, math.nan]]).nan_to_num(0)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    result = Aggregation(advantages, torch.tensor([0.25, 0.75]), {})
    distances = {"nats": torch.tensor([1.0, math.inf]), "reference_nll": torch.tensor([3.0, 2.0])}
    first, second = describe_responses(CONFIG, table, result, mask, distances, [0, 1], steps_done=2)
    assert first == {
        "step": 3,
        "sample": 1,
        "rewards": {"a": 1.0, "b": None, "m": 7.0},
        "problems": {"b": "HTTP 502"},
        "weights": {"a": 2.0, "b": 1.0},
        "coefficients": {"a": 0.25, "b": 0.75},
        "advantage": 1.0,
        "tokens": 2,
        "nats": 1.0,
        "reference_nll": 3.0,
    }
    assert second["problems"] == {} and second["nats"] is None and second["rewards"]["m"] == 0.333333
    json.dumps([first, second], allow_nan=False)


def test_the_line_of_a_step() -> None:
    metrics = {
        "reward/a": -0.47,
        "reward/b": math.nan,
        "reward/m": 12.0,
        "pama/coefficient/a": 0.49,
        "pama/coefficient/b": 0.51,
        "pama/conflict_rate": 0.38,
        "pama/active_fraction": 0.61,
        "pama/kl_response": 1.4,
        "pama/reference_nll": 3.1,
    }
    line = step_line(CONFIG, 12, 50, metrics, colours=False)
    assert line == (
        "PAMA step 12/50  a -0.47 (49 %)  b – (51 %)  m 12 (monitor)  conflict 38 %  active 61 %  1.4 nats  "
        "reference nll 3.1"
    )
    coloured = step_line(CONFIG, 12, None, metrics, colours=True)
    assert "\x1b[1m-0.47\x1b[0m" in coloured and "step 12\x1b" in coloured


def row(step: int, sample: int, response: str, **rewards: float | None) -> dict:
    return {
        "step": step,
        "sample": sample,
        "prompt": "What?\n",
        "label": None,
        "response": response,
        "rewards": rewards,
        "problems": {name: "HTTP 502" for name, reward in rewards.items() if reward is None},
        "coefficients": {"a": 0.25, "b": 0.75},
        "advantage": 0.5,
        "nats": 1.5,
        "reference_nll": 3.0,
    }


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    """Two steps; a resumed run wrote the second one again, and was killed in the third."""
    first, second = tmp_path / "old" / FILE, tmp_path / "new" / FILE
    for file, rows in (
        (first, [row(1, 0, "one", a=1.0, b=1.0), row(2, 0, "lost", a=9.0, b=9.0), row(2, 7, "lost too", a=9.0, b=9.0)]),
        (
            second,
            [
                row(2, 0, "low", a=1.0, b=5.0),
                row(2, 1, "high\x1b[2J\nline [bold]two", a=3.0, b=1.0),
                row(2, 2, "mixed", a=2.0, b=None),
                row(2, 3, "", a=2.0, b=3.0),
            ],
        ),
    ):
        file.parent.mkdir()
        file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with second.open("a") as file:
        file.write(json.dumps(row(3, 0, "cut", a=1.0))[:40])
    os.utime(first, (0, 0))
    return tmp_path


def test_reading_what_a_resumed_run_logged(logged) -> None:
    found = read_rollouts(logged)
    assert [(each.step, each.response.partition("\x1b")[0]) for each in found] == [
        (1, "one"),
        (2, "low"),
        (2, "high"),
        (2, "mixed"),
        (2, ""),
    ]


def show(folder: Path, *flags: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["rollouts", str(folder), *flags])
    return stopped.value.code


@pytest.mark.parametrize(
    ("flags", "order"),
    [
        ((), ["low", "high", "mixed", "(empty)"]),
        (("--best", "a"), ["high", "mixed", "(empty)", "low"]),
        (("--worst", "b"), ["high", "(empty)", "low"]),  # a response without the reward has no place
        (("--disagree",), ["low", "high", "(empty)"]),
        (("--step", "1"), ["one"]),
        (("--step", "1", "2", "--limit", "2"), ["one", "low"]),
    ],
)
def test_which_responses_are_shown(flags, order, logged, capsys) -> None:
    assert show(logged, *flags) == 0
    out = capsys.readouterr().out
    places = [out.index(f"\n{text}") for text in order]
    assert places == sorted(places) and out.count("advantage") == len(order)


def test_what_is_shown_of_a_response(logged, capsys) -> None:
    assert show(logged) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "high\\x1b[2J\nline [bold]two\n" in out
    assert "a 3 (25 %)  b 1 (75 %)  1.5 nats  reference nll 3  advantage +0.5" in out
    assert "b: HTTP 502" in out and "4 of 4 responses of step 2; logged steps: 1-2" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--step", "7"), "--step must be one of the logged steps, 1-2, found 7"),
        (("--best", "c"), "--best must be one of a, b, found 'c'"),
    ],
)
def test_what_was_not_logged_is_refused(flags, message, logged, capsys) -> None:
    assert show(logged, *flags) == 2 and message in capsys.readouterr().err


def test_a_folder_without_a_log(tmp_path, capsys) -> None:
    assert show(tmp_path) == 2 and f"no {FILE} in" in capsys.readouterr().err
    (tmp_path / FILE).write_text('{"step": 1}\n' * 2)
    assert show(tmp_path) == 2 and f"{FILE}, line 1: Field required" in capsys.readouterr().err
    (tmp_path / FILE).write_text("")
    assert show(tmp_path) == 2 and "no response was logged yet" in capsys.readouterr().err


def test_the_responses_of_evaluations_are_in_a_file_of_their_own(logged, capsys) -> None:
    assert show(logged, "--evaluation") == 2 and f"no {EVALUATION_FILE} in" in capsys.readouterr().err
    held_out = [row(step, 0, f"held out {step}", a=1.0) for step in (0, 4)]
    (logged / "new" / EVALUATION_FILE).write_text("".join(json.dumps(each) + "\n" for each in held_out))
    assert show(logged, "--evaluation") == 0
    shown = capsys.readouterr().out
    assert "held out 4" in shown and "held out 0" not in shown and "logged steps: 0, 4" in shown


def test_the_table_of_an_evaluation() -> None:
    from pama_plugin.batch.rollouts import evaluation_table
    from pama_plugin.settings.load import load_config

    objectives = ["a=builtin:length", "b=builtin:length", "seen=builtin:length,role=monitor"]
    config = load_config("linear", objectives, None, None, None, default_level="token")
    metrics = {"eval_all/a": 1.25, "eval_all/a_se": 0.125, "eval_all/b": -3.0, "eval_all/b_se": float("nan")}
    assert evaluation_table(config, 7, metrics).splitlines() == [
        "PAMA evaluation, step 7  data sets  a            b   seen",
        "PAMA evaluation, step 7  all        1.25 ± 0.12  -3  –",
    ]
    config = load_config(
        "linear", objectives, None, None, None, preferences="grid:3", eval_preferences=2, default_level="token"
    )
    metrics = {f"eval_preference/{place}/{name}": 1.0 for place in ("1_0", "0_1") for name in ("a", "b")}
    assert evaluation_table(config, 7, metrics | {"eval_follows/a": 1.0}).splitlines() == [
        "PAMA evaluation, step 7  weights of a, b               a     b  seen",
        "PAMA evaluation, step 7  1, 0                          1     1  –",
        "PAMA evaluation, step 7  0, 1                          1     1  –",
        "PAMA evaluation, step 7  rank correlation with weight  1.00  –  –",
    ]

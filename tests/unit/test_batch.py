"""Processing of the rewards of a batch, without OpenRLHF, Ray or substitutes for them."""

import math
import re

import pytest
import torch

from pama_plugin.batch.advice import advise
from pama_plugin.batch.combine import combine
from pama_plugin.batch.metrics import name_metrics, reduce_columns
from pama_plugin.batch.outcome import Outcome, code_of, judge_column
from pama_plugin.batch.shaping import apply_failure_policy, fill_in, measure, shape_trained
from pama_plugin.batch.state import Moments, RunState
from pama_plugin.batch.table import RewardTable
from pama_plugin.errors import RewardError
from pama_plugin.settings.load import load_config
from pama_plugin.settings.objective import parse_objective
from pama_plugin.settings.run import PamaConfig

NAN = math.nan


def make_table(*rows: list[float], problems=None, order=None, group_size=2) -> RewardTable:
    values_KB = torch.tensor(rows, dtype=torch.float64)
    responses = values_KB.shape[1]
    names = tuple("abc"[: len(rows)])
    order_B = torch.tensor(order or range(responses))
    return RewardTable(names, values_KB, problems or {}, order_B, group_size, (3, responses - 3))


def objectives(*specs: str) -> tuple:
    return tuple(parse_objective(f"{name}=builtin:length{spec}") for name, spec in zip("abc", specs))


def test_grouping_and_back_is_the_identity() -> None:
    table = make_table([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], order=[3, 0, 5, 1, 4, 2], group_size=3)
    row_B = table.row("a")
    assert torch.equal(table.ungrouped(table.grouped(row_B)), row_B)
    assert table.grouped(row_B).tolist() == [[1, 3, 5], [0, 4, 2]]
    assert table.groups_B.tolist() == [1, 0, 1, 0, 1, 0]
    assert [part.tolist() for part in table.split(row_B)] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("", "objective 'a': HTTP 502.*'response 1'"),
        (
            ",on_failure=mask,max_failures=0.25",
            "objective 'a': 2 of 4 responses .*max_failures=0.25; 1 of them: HTTP 502",
        ),
        (",on_failure=mask,max_failures=0.5", None),
        (",on_failure=impute:0", None),
    ],
)
def test_the_error_of_a_failure_policy_has_the_reason_and_a_response(policy, message) -> None:
    table = make_table([1.0, NAN, NAN, 2.0], problems={("a", 1): "HTTP 502", ("a", 2): "no answer"})

    def apply() -> None:
        apply_failure_policy(objectives(policy), table, lambda response: f"response {response}")

    if message is None:
        apply()
    else:
        with pytest.raises(RewardError, match=message):
            apply()


def test_the_most_common_reason_is_named() -> None:
    why = {("a", 0): "one", ("a", 1): "many", ("a", 3): "many"}
    with pytest.raises(RewardError, match="2 of them: many.*Response: '1'"):
        table = make_table([NAN, NAN, 1.0, NAN], problems=why)
        apply_failure_policy(objectives(",on_failure=mask,max_failures=0.5"), table, str)


def test_missing_rewards_are_imputed_or_excluded() -> None:
    table = make_table([1.0, NAN, 3.0, NAN], problems={("a", 1): "HTTP 502", ("a", 3): "HTTP 502"})
    moments = Moments()
    moments.update(torch.tensor([4.0, 6.0]))
    (masked,), (imputed,), (mean,) = (objectives(f",on_failure={how}") for how in ("mask", "impute:7", "impute:mean"))
    assert fill_in(masked, moments, table).isnan().tolist() == [False, True, False, True]
    assert fill_in(imputed, moments, table).tolist() == [1, 7, 3, 7]
    assert fill_in(mean, moments, table).tolist() == [1, 5, 3, 5]
    assert fill_in(mean, Moments(), table).isnan().any(), "there is no mean to impute"
    not_applying = make_table([1.0, NAN, 3.0, NAN], problems={("a", 1): "HTTP 502"})
    assert fill_in(imputed, moments, not_applying).nan_to_num(-1).tolist() == [1, 7, 3, -1]
    for by_group, expected in ((True, [1, 1, 3, 3]), (False, [1, 2, 3, 2])):
        state = RunState.start(PamaConfig(loss="linear", objectives=(masked,)))
        shaped_KB, present_KB = shape_trained([masked], table, state, by_group=by_group)
        assert shaped_KB.tolist() == [expected] and present_KB.tolist() == [[True, False, True, False]]


def test_statistics_ignore_missing_rewards_and_freeze() -> None:
    config = PamaConfig(loss="linear", objectives=objectives(",normalize=running,freeze_after=1,on_failure=mask"))
    state = RunState.start(config)
    for _ in range(2):
        measure(config.objectives, make_table([1.0, NAN, 3.0, NAN]), state)
    assert (state.objectives["a"].rewards.count, state.objectives["a"].steps) == (2, 1)
    state = RunState.start(config)
    for rewards in ([NAN] * 4, [1.0, NAN, 3.0, NAN], [NAN] * 4, [9.0] * 4):
        measure(config.objectives, make_table(rewards), state)
    assert (state.objectives["a"].rewards.count, state.objectives["a"].steps) == (2, 1), "steps with rewards count"


@pytest.mark.parametrize(
    ("bounds", "reward", "problem"),
    [
        ("0:0.3", 0.3, None),  # 0.30000001 in float32
        ("0.7:1", 0.7, None),  # 0.69999999 in float32
        ("0:0.3", 0.31, "returned 0.31.*range=0:0.3"),
        ("0:1", NAN, "returned nan"),
        ("-inf:inf", math.inf, "returned inf"),
        ("-inf:inf", 1e19, "returned .*1e\\+18"),
    ],
)
def test_bounds_are_rounded_to_the_dtype_of_a_models_rewards(bounds, reward, problem) -> None:
    (objective,) = objectives(f",range={bounds}")
    problems = judge_column(objective, torch.tensor([reward], dtype=torch.float32))
    assert (problems == {}) if problem is None else re.fullmatch(problem, problems[0])


def test_the_code_of_a_problem_is_exact_in_a_column() -> None:
    codes = [code_of(Outcome(NAN, f"problem {index}")) for index in range(1000)]
    assert torch.tensor(codes, dtype=torch.float64).long().tolist() == codes and len(set(codes)) == 1000
    assert code_of(Outcome(1.0)) == 0 and min(codes) > 0


def test_combine_passes_the_context_that_a_rule_uses() -> None:
    specs = ("", ",role=constraint,threshold=2")
    config = PamaConfig(loss="lagrangian", objectives=objectives(*specs))
    state, table = RunState.start(config), make_table([1.0, 2.0, 3.0, 4.0], [1.0, NAN, 0.0, 2.0])
    present_KB = table.values_KB.isfinite()
    result = combine(config, state, table, torch.ones(2, 4, 1), torch.ones(4, 1), present_KB, 0)
    violation = 2 - 1  # threshold − mean
    first = {"integral": 1.0 + 0.1 * violation, "multiplier": 1.1 + 2 * violation}
    assert state.objectives["b"].memory == pytest.approx(first)
    measure(config.objectives, table, state)
    combine(config, state, table, torch.ones(2, 4, 1), torch.ones(4, 1), present_KB, 0)
    violation /= state.objectives["b"].rewards.std  # in standard deviations
    assert state.objectives["b"].memory == pytest.approx(
        {"integral": 1.1 + 0.1 * violation, "multiplier": 1.1 + 2.1 * violation}
    )
    named = name_metrics(config, result, 0)
    assert named["pama/multiplier/b"] == pytest.approx(3.1)
    assert set(named) >= {"pama/gain/a", "pama/coefficient/b"}


def test_columns_are_reduced_to_metrics() -> None:
    columns = {
        "reward/a": torch.tensor([1.0, NAN, 3.0]),
        "reward/b": torch.tensor([2.0, 2.0, 2.0]),
        "pama/failures/a": torch.tensor([0.0, 1.0, 0.0]),
    }
    metrics = reduce_columns(columns, ["a", "b"])
    assert metrics == {"reward/a": 2.0, "reward/b": 2.0, "pama/failures/a": 1.0}


def load(loss: str, *specs: str):
    return load_config(loss, specs, None, None, None, default_level="token")


SCALES = make_table([0.0, 100.0, 50.0, 10.0], [0.1, 0.2, 0.3, 0.1])


@pytest.mark.parametrize(
    ("loss", "specs", "said"),
    [
        ("morlhf", ("", ""), "--loss morlhf follows 'a', .* as those of 'b': set normalize=running .* --loss linear"),
        ("tchebycheff", ("", ""), "--loss tchebycheff follows 'a'"),
        ("dvao", ("", ""), "--loss dvao follows 'a'"),
        ("morlhf", (",weight=0.01", ""), None),  # the weights make up for it
        ("morlhf", (",normalize=running", ",normalize=running"), None),
        ("linear", ("", ""), None),
        ("morlhf", ("", ",role=monitor"), None),
    ],
)
def test_rules_that_follow_the_objective_with_the_largest_scale(loss, specs, said) -> None:
    config = load(loss, *(f"{name}=builtin:length{spec}" for name, spec in zip("ab", specs)))
    sentences = advise(config, SCALES)
    assert (sentences == []) if said is None else re.search(said, *sentences)


@pytest.mark.parametrize(("loss", "sign", "warned"), [("pama", -1, True), ("pama", 1, False), ("min_norm", -1, False)])
def test_pama_with_many_objectives_that_do_not_correlate(loss, sign, warned) -> None:
    names = tuple("abcdef")
    config = load(loss, *(f"{name}=builtin:length,scale={index + 1}" for index, name in enumerate(names)))
    row = torch.tensor([1.0, 2.0, 3.0, 5.0, 0.0, 1.0, 4.0, 2.0])
    values_KB = torch.stack([row * (sign if index % 2 else 1) for index in range(6)])
    table = RewardTable(names, values_KB.double(), {}, torch.arange(8), 4, (8,))
    assert [("do not correlate" in each) for each in advise(config, table)] == [True] * warned

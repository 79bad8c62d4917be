"""Preferences: where they come from, how they are written into prompts, and which settings are refused."""

import math
import statistics

import pytest
import torch

from pama_plugin import aggregate, available_rules
from pama_plugin.aggregation import get_rule
from pama_plugin.batch.metrics import describe_preferences, spearman
from pama_plugin.batch.rating import rate, summarise_front
from pama_plugin.batch.state import RunState
from pama_plugin.batch.table import RewardTable
from pama_plugin.errors import ConfigError
from pama_plugin.settings.load import dump_config, load_config
from pama_plugin.settings.preferences import fill_slots, parse_preferences, parse_template, read_weights, simplex_grid

OBJECTIVES = ("helpful=builtin:length", "terse=builtin:length,scale=100")


def config_of(*objectives: str, loss: str = "linear", **settings):
    settings = {"preferences": "dirichlet:1"} | settings
    level = settings.pop("level", None)
    return load_config(loss, objectives or OBJECTIVES, None, level, None, **settings, default_level="token")


@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("objectives", [2, 3, 8])
def test_dirichlet_has_its_moments(alpha, objectives) -> None:
    """Mean 1/K and variance (K − 1) / (K² (K α + 1)) of every weight."""
    source = parse_preferences(f"dirichlet:{alpha}")
    drawn = [source.draw(number, 7, objectives) for number in range(4000)]
    assert all(min(weights) >= 0 and math.isclose(sum(weights), 1) for weights in drawn)
    variance = (objectives - 1) / (objectives**2 * (objectives * alpha + 1))
    for weights in zip(*drawn):
        assert statistics.fmean(weights) == pytest.approx(1 / objectives, abs=5 * math.sqrt(variance / 4000))
        assert statistics.pvariance(weights) == pytest.approx(variance, rel=0.2)


@pytest.mark.parametrize("text", ["dirichlet:1", "grid:5"])
def test_a_draw_depends_on_nothing_but_seed_and_number(text) -> None:
    source = parse_preferences(text)
    once, again = ([source.draw(number, 1, 3) for number in numbers] for numbers in (range(30), reversed(range(30))))
    assert once == again[::-1]
    assert once != [source.draw(number, 2, 3) for number in range(30)]


def test_a_grid_is_drawn_evenly_and_in_no_fixed_order() -> None:
    source, grid = parse_preferences("grid:3"), simplex_grid(3, 3)
    rounds = [[source.draw(6 * cycle + number, 1, 3) for number in range(6)] for cycle in range(4)]
    assert all(sorted(each) == sorted(grid) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


@pytest.mark.parametrize("objectives", [2, 3, 5])
def test_the_grid_covers_the_simplex(objectives) -> None:
    grid = simplex_grid(objectives, 4)
    assert len(set(grid)) == len(grid) == math.comb(objectives + 2, objectives - 1)
    assert all(math.isclose(sum(weights), 1) for weights in grid)
    corners = [tuple(float(index == corner) for index in range(objectives)) for corner in range(objectives)]
    assert set(corners) <= set(grid)


@pytest.mark.parametrize(
    "value",
    [
        None,
        0.5,
        "1, 0",
        [1.0],
        [1.0, 0.0, 0.0],
        [1.0, -0.1],
        [0.0, 0.0],
        [1.0, math.nan],
        [1.0, math.inf],
        [1.0, None],
        [True, False],
        {"helpful": 1.0},
        {"helpful": 1.0, "other": 1.0},
        {"helpful": 1.0, "terse": None},
    ],
)
def test_columns_without_weights_are_refused(value) -> None:
    with pytest.raises(ValueError, match="2 numbers for helpful, terse, .*not all 0, found"):
        read_weights(value, ["helpful", "terse"])


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("{a}/{b}: {prompt}", "0.25/0.75: Why {a}?"),
        ("{prompt}\n(a {a:.0%}, b {b:.1f}, again {a})", "Why {a}?\n(a 25%, b 0.8, again 0.25)"),
        ("{{a}} is {a} and {b} {prompt}", "{a} is 0.25 and 0.75 Why {a}?"),
    ],
)
def test_a_template_is_filled_and_the_users_text_is_not_read_as_one(template, written) -> None:
    parsed = parse_template(template, ["a", "b"])
    assert fill_slots(parsed.with_slots("Why {a}?"), parsed, (0.25, 0.75)) == written


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a} {prompt}", r"found no \{b\}"),
        ("{prompt}", r"found no \{a\}, \{b\}"),
        ("{a} {b} {c}", r"unknown field \{c\}"),
        ("{a} {b} {prompt} {prompt}", r"\{prompt\} more than once"),
        ("{a} {b", "expected '}'"),
        ("{a!r} {b}", r"unknown field \{a\}"),
        ("{a:%Q} {b}", "format specifier"),
        ("{} {a} {b}", r"unknown field \{\}"),
        ("{prompt:.2f} {a} {b}", r"unknown field \{prompt\}"),
    ],
)
def test_templates_that_do_not_fit_are_refused(template, message) -> None:
    with pytest.raises(ValueError, match=message):
        parse_template(template, ["a", "b"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(preferences="dirichlet"), "--pama.preferences must be dirichlet:ALPHA, grid:N or column:NAME"),
        (dict(preferences="dirichlet:0"), "ALPHA from 0.01 to 100.* found 'dirichlet:0'"),
        (dict(preferences="dirichlet:nan"), "found 'dirichlet:nan'"),
        (dict(preferences="grid:1"), "N of 2 or more, found 'grid:1'"),
        (dict(preferences="grid:2.5"), "found 'grid:2.5'"),
        (dict(preferences="column:"), "found 'column:'"),
        (dict(preferences="grid:5000"), "--pama.preferences: 5000 points .* at most 1000"),
        (dict(eval_preferences="5000"), "--pama.eval_preferences: 5000 points .* at most 1000"),
        (dict(eval_preferences="1"), "--pama.eval_preferences .*at least 2, found '1'"),
        (dict(preference_template="{helpful}"), r"--pama.preference_template .* found no \{terse\}, in '\{helpful\}'"),
        (dict(best="min"), "--pama.best must be hypervolume with --pama.preferences, found min"),
        (dict(loss="pama", level="batch"), "--pama.level token or sequence, found batch"),
        (dict(loss="pareto_rank"), "needs a rule that follows weights, found --loss pareto_rank"),
        (dict(loss="gram:imtl_g"), "needs a rule that follows weights, found --loss gram:imtl_g"),
        (dict(preferences=None, eval_preferences="3"), "--pama.eval_preferences needs --pama.preferences, found none"),
        (
            dict(preferences=None, preference_template="{helpful} {terse}"),
            "--pama.preference_template needs --pama.preferences, found none",
        ),
    ],
)
def test_settings_that_nothing_would_follow_are_refused(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**settings)


def test_objectives_that_preferences_cannot_weigh_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2 trained objectives, found 1"):
        config_of("helpful=builtin:length", "seen=builtin:length,role=monitor")
    with pytest.raises(ConfigError, match="a rule without constraints, found --loss lagrangian"):
        config_of("a=builtin:length", "b=builtin:length,role=constraint,threshold=1", loss="lagrangian")


FOLLOWS = sorted(set(available_rules()) - {"pareto_rank", "gram:imtl_g", "lagrangian"})


@pytest.mark.parametrize("objectives", [2, 3, 5, 8])
@pytest.mark.parametrize("loss", FOLLOWS)
def test_every_rule_that_follows_weights_is_accepted_however_many_objectives(loss, objectives) -> None:
    config_of(*(f"o{index}=builtin:length" for index in range(objectives)), loss=loss, eval_preferences="2")


@pytest.mark.parametrize("loss", FOLLOWS)
def test_small_preferences_give_no_large_advantages(loss) -> None:
    """Most of these weights are below 1e-6, the smallest that float32 has."""
    generator = torch.Generator().manual_seed(0)
    for objectives in (2, 3):
        logs_KB = torch.rand(objectives, 12, generator=generator, dtype=torch.float64) * -37
        advantages_KB1 = torch.randn(objectives, 24, 1, generator=generator)
        context = {"rewards_KB": advantages_KB1.squeeze(-1)} if "rewards_KB" in get_rule(loss).parameters else {}
        weights_KB = (10**logs_KB).repeat_interleave(2, 1)
        groups_B = torch.arange(24) // 2
        result = aggregate(loss, advantages_KB1, torch.ones(24, 1), weights=weights_KB, groups_B=groups_B, **context)
        assert result.advantages.abs().max() < 30


def test_a_drawn_preference_is_written_or_0() -> None:
    for text in ("dirichlet:0.01", "dirichlet:0.1"):
        drawn = [parse_preferences(text).draw(number, 1, 3) for number in range(500)]
        assert all(weight == 0 or weight >= 1e-3 for weights in drawn for weight in weights)
    assert read_weights([1e-5, 1.0], ["a", "b"]) == (0.0, 1.0)


def test_a_template_that_writes_two_preferences_alike_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"each of the 5 evaluated preferences in its own way, found '. . ' for 2"):
        config_of(preference_template="{helpful:.0f} {terse:.0f} {prompt}")
    with pytest.raises(ConfigError, match="an objective cannot be named prompt"):
        config_of("prompt=builtin:length", "terse=builtin:length")


def test_the_settings_are_complete_and_survive_yaml(tmp_path) -> None:
    config = config_of()
    assert (config.best, config.eval_preferences) == (None, 5)
    assert config.preference_template == "[helpful {helpful}, terse {terse}]\n{prompt}"
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config(None, [], str(tmp_path / "run.yaml"), None, None, default_level="token") == config
    three = config_of(*OBJECTIVES, "kind=builtin:length")
    assert three.eval_preferences == 3 and len(three.evaluated_preferences) == 6
    assert "preferences" in config.rule_settings(), "a resumed run with others is another experiment"
    assert "preferences" not in config_of(preferences=None).rule_settings()


def test_a_preference_multiplies_the_weight_and_equal_shares_change_nothing() -> None:
    config = config_of("a=builtin:length,weight=2", "b=builtin:length", "c=builtin:length")
    assert config.weights_with([(1 / 3, 1 / 3, 1 / 3), (1.0, 0.0, 0.0)], 0).T.tolist() == [[2, 1, 1], [6, 0, 0]]
    assert config.weights_with([], 0).tolist() == [[2], [1], [1]]
    summed = config_of(*OBJECTIVES, filter_by="sum")
    assert summed.rate({"helpful": 1.0, "terse": 10.0}, 0, (0.75, 0.25)) == 1.5 + 5


def test_following_is_measured() -> None:
    config, preferences = config_of(), [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (0.25, 0.75)]
    values_KB = torch.tensor([[3.0, 2.0, 1.0, 1.5], [0.0, 0.0, 0.0, 0.0]])
    table = RewardTable(("helpful", "terse"), values_KB, {}, torch.arange(4), 2, (4,))
    metrics = describe_preferences(config, table, preferences)
    assert metrics["pama/follows/helpful"] == pytest.approx(1)
    assert "pama/follows/terse" not in metrics, "its rewards are constant"
    assert metrics["pama/preference/terse"] == 2.25 / 4
    assert describe_preferences(config, table, []) == {}


def test_spearman_has_mean_ranks_for_ties() -> None:
    from scipy.stats import spearmanr

    one, other = torch.tensor([1.0, 2.0, 2.0, 5.0, math.nan]), torch.tensor([0.3, 0.1, 0.1, 0.9, 1.0])
    assert spearman(one, other) == pytest.approx(spearmanr(one[:4], other[:4]).statistic)
    assert math.isnan(spearman(one, torch.ones(5)))


def evaluation(config, means, size: int = 2):
    """Three prompts with each preference, which differ by a constant; two responses each, which differ by another."""
    rewards = {}
    for name, row in zip(config.trained_names, zip(*means)):
        of_prompts = torch.tensor(row) + torch.tensor([-1.0, 0.0, 1.0]).unsqueeze(-1)
        rewards[name] = (of_prompts.unsqueeze(-1) + torch.linspace(-0.1, 0.1, size)).flatten()
    return summarise_front(config, rewards, size)


def test_an_evaluation_has_every_objective_with_every_preference() -> None:
    config = config_of(eval_preferences="3")
    metrics = evaluation(config, [(4.0, 1.0), (3.0, 2.5), (3.5, 2.0)])
    assert metrics["eval_preference/1_0/helpful"] == pytest.approx(4)
    assert metrics["eval_preference/0.5_0.5/terse"] == pytest.approx(2.5)
    assert metrics["eval_preference/0_1/terse_se"] == pytest.approx(1 / math.sqrt(3))
    assert metrics["eval_follows/helpful"] == pytest.approx(0.5) and metrics["eval_follows/terse"] == pytest.approx(0.5)


def test_the_rating_is_the_volume_that_the_front_dominates() -> None:
    pytest.importorskip("moocore")
    config = config_of(eval_preferences="3")
    state = RunState.start(config, None, {})
    first = {"eval_all/helpful": 1.0, "eval_all/helpful_std": 2.0, "eval_all/terse": 0.0, "eval_all/terse_std": 1.0}
    together = evaluation(config, [(1.0, 0.0)] * 3)
    assert rate(config, state, first | together) == pytest.approx(1), "the first evaluation, one policy for all"
    # In units: (1, -1), (0, 0), (-1, 1) above (-1, -1): a staircase of one unit square, and two segments without area.
    spread = evaluation(config, [(3.0, -1.0), (1.0, 0.0), (-1.0, 1.0)])
    assert rate(config, state, first | spread) == pytest.approx(1)
    better = evaluation(config, [(3.0, 0.0), (1.0, 0.0), (1.0, 1.0)])  # (1, 0), (0, 0), (0, 1)
    assert rate(config, state, first | better) == pytest.approx(3)
    without = {key: value for key, value in better.items() if not key.startswith("eval_preference/1_0/terse")}
    assert rate(config, state, first | without) == pytest.approx(2), "where an objective has no reward"
    nothing = {key: value for key, value in better.items() if "/terse" not in key}
    assert math.isnan(rate(config, state, first | nothing))


def run_of(tmp_path, name: str, last: list[tuple[float, float]], follows: float = 1.0):
    """A run with two evaluations of three preferences, as a report reads it."""
    from pama_plugin.runs.logs import Run

    config = config_of(eval_preferences="3")
    (tmp_path / name).mkdir()
    (tmp_path / name / "pama.yaml").write_text(dump_config(config))
    scalars = {f"eval/eval_follows/{objective}": [(5, follows)] for objective in config.names}
    for preference, means in zip(("1_0", "0.5_0.5", "0_1"), last):
        for objective, mean in zip(config.names, means):
            scalars[f"eval/eval_preference/{preference}/{objective}"] = [(1, 1.0), (5, mean)]
            scalars[f"eval/eval_preference/{preference}/{objective}_se"] = [(1, 0.5), (5, 0.25)]
    return Run(tmp_path / name, name, name, None, scalars, ())


def test_a_report_has_the_front_of_one_policy(tmp_path) -> None:
    pytest.importorskip("moocore")
    from matplotlib import pyplot

    from pama_plugin.runs.report.preferences import draw_steering, read_steering, steering_tables

    follows = read_steering(run_of(tmp_path, "follows", [(4.0, 1.0), (3.0, 2.0), (1.0, 3.0)]))
    ignores = read_steering(run_of(tmp_path, "ignores", [(2.0, 2.0)] * 3, follows=0.0))
    assert follows.names == ("helpful", "terse") and follows.steps == (1, 5)
    assert follows.weights_LK.tolist() == [[1, 0], [0.5, 0.5], [0, 1]]
    assert follows.means_2LK.tolist() == [[[1, 1]] * 3, [[4, 1], [3, 2], [1, 3]]]
    (grid,) = steering_tables([follows, ignores])
    assert grid.columns == ["run", "weights of helpful, terse", "helpful", "terse", "hypervolume"]
    assert grid.rows[1] == ["follows", "0.5, 0.5", "3.000 ± 0.250", "2.000 ± 0.250", "–"]
    assert grid.rows[3] == ["follows", "follows its weight", "1.00", "1.00", "0 → 2"], "above (1, 1): the square (3, 2)"
    assert grid.rows[7][-1] == "0 → 1" and "above helpful 1.000, terse 1.000" in grid.caption
    figure = draw_steering([follows, ignores])
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["follows", "ignores"]
    pyplot.close(figure)


def test_runs_with_other_objectives_have_tables_of_their_own(tmp_path) -> None:
    pytest.importorskip("moocore")
    from pama_plugin.runs.report.preferences import read_steering, steering_tables

    run = run_of(tmp_path, "a", [(4.0, 1.0), (3.0, 2.0), (1.0, 3.0)])
    first = read_steering(run)
    turned = first._replace(run="b", names=("terse", "helpful"))
    one, other = steering_tables([first, turned])
    assert one.columns[2:4] == ["helpful", "terse"] and other.columns[2:4] == ["terse", "helpful"]
    assert {row[0] for row in one.rows} == {"a"} and {row[0] for row in other.rows} == {"b"}
    partly = {tag: series for tag, series in run.scalars.items() if "1_0/helpful" not in tag}
    grid = steering_tables([read_steering(type(run)(**vars(run) | {"scalars": partly}))])[0]
    assert grid.rows[0][2] == "nan" and grid.rows[3][-1] == "0 → 2", "above (1, 1): the rectangle to (3, 2)"


def test_a_run_without_preferences_has_no_such_front(tmp_path) -> None:
    pytest.importorskip("moocore")
    from pama_plugin.runs.report.preferences import read_steering

    run = run_of(tmp_path, "a", [(1.0, 1.0)] * 3)
    without = {tag: series for tag, series in run.scalars.items() if "preference" not in tag}
    assert read_steering(type(run)(**vars(run) | {"scalars": without})) is None
    (tmp_path / "a" / "pama.yaml").unlink()
    with pytest.raises(ConfigError, match="there is no pama.yaml"):
        read_steering(run)

"""Evaluation per objective against hand calculations, and the rule that chooses a checkpoint."""

import math
from types import SimpleNamespace

import pytest
import torch
from hosttools import as_reward_groups, host_args, make_rollout

from pama_plugin.batch.state import RunState
from pama_plugin.batch.table import RewardTable
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract

DECODES = SimpleNamespace(decode=lambda tokens, **_: str(tokens))


def test_mean_and_standard_error_by_dataset_and_over_all() -> None:
    from pama_plugin.batch.rating import summarise

    rewards = torch.tensor([1.0, 3.0, 2.0, 6.0, 10.0, 10.0])  # prompts' means 2, 4 | 10
    found = summarise({"a": rewards}, {"a": rewards > 0}, ["x", "x", "x", "x", "y", "y"], 2)
    assert found["eval_x/a"] == 3 and found["eval_x/a_se"] == 1  # std √2, over √2
    assert found["eval_y/a"] == 10 and math.isnan(found["eval_y/a_se"])  # one prompt tells nothing of the others
    assert found["eval_all/a"] == pytest.approx(16 / 3)
    std = math.sqrt(((2 - 16 / 3) ** 2 + (4 - 16 / 3) ** 2 + (10 - 16 / 3) ** 2) / 2)
    assert found["eval_all/a_std"] == pytest.approx(std)
    assert found["eval_all/a_se"] == pytest.approx(std / math.sqrt(3))


def test_who_has_no_reward_does_not_count() -> None:
    from pama_plugin.batch.rating import summarise

    rewards = torch.tensor([1.0, math.nan, 4.0, 6.0, math.nan, math.nan])
    datasets = ["x", "x", "x", "x", "y", "y"]
    found = summarise({"a": rewards}, {"a": torch.ones(6, dtype=torch.bool)}, datasets, 2)
    assert found["eval_x/a"] == found["eval_all/a"] == 3 and found["eval_all/a_se"] == 2
    assert math.isnan(found["eval_y/a"]) and math.isnan(found["eval_y/a_se"]), "its scorer failed"
    found = summarise({"a": rewards}, {"a": ~rewards.isnan()}, datasets, 2)
    assert found["eval_all/a"] == 3 and "eval_y/a" not in found, "it does not apply"


def rated(best: str | None, *evaluations: dict[str, tuple[float, float]]) -> list[float]:
    from pama_plugin.batch.rating import rate

    objectives = ["a=builtin:length,weight=3", "b=builtin:length"]
    config = load_config("pama", objectives, None, None, None, best, default_level="token")
    state = RunState.start(config)
    found = []
    for evaluation in evaluations:
        metrics = {}
        for name, (mean, std) in evaluation.items():
            metrics |= {f"eval_all/{name}": mean, f"eval_all/{name}_std": std}
        found.append(rate(config, state, metrics))
        state = RunState.model_validate_json(state.model_dump_json())  # as a checkpoint keeps it
    return found


FIRST = {"a": (1.0, 2.0), "b": (10.0, 0.5)}
LATER = {"a": (4.0, 9.0), "b": (10.5, 9.0)}  # rises of 1.5 and 1 standard deviations


@pytest.mark.parametrize(
    ("best", "first", "later"),
    [
        (None, 0, 1),  # as min
        ("min", 0, 1.0),  # weights of mean 1: 1.5 and 0.5; 1.5 / 1.5 = 1 and 1 / 0.5 = 2
        ("weighted", 13, 22.5),
        ("hypervolume", 1, 2.5 * 2),
    ],
)
def test_the_rating_of_an_evaluation(best, first, later) -> None:
    assert rated(best, FIRST, LATER) == pytest.approx([first, later])


def test_an_objective_that_fell_far_gives_no_volume_and_two_do_not_cancel() -> None:
    fallen = {"a": (-9.0, 1.0), "b": (1.0, 1.0)}
    assert rated("hypervolume", FIRST, fallen) == [1, 0]


def test_of_one_prompt_nothing_can_be_said() -> None:
    one = {"a": (1.0, math.nan), "b": (10.0, math.nan)}
    assert all(math.isnan(rating) for rating in rated("min", one, one)) and rated("weighted", one) == [13]


def test_a_rise_has_no_unit_until_an_objective_has_varied() -> None:
    constant = {"a": (1.0, 0.0), "b": (10.0, 0.5)}
    assert rated("min", constant, LATER, {"a": (13.0, 1.0), "b": (11.0, 1.0)}) == pytest.approx([0, 0, 2 / 3])


@pytest.mark.parametrize(("best", "ratings"), [("min", [0, 1]), ("weighted", [10, 10.5]), ("hypervolume", [1, 2])])
def test_an_objective_that_applies_to_no_held_out_prompt_has_no_say(best, ratings) -> None:
    assert rated(best, {"b": FIRST["b"]}, {"b": LATER["b"]}) == pytest.approx(ratings)


def test_an_objective_that_never_varies_has_no_say() -> None:
    evaluations = [{"a": (1.0, 0.0), "b": (10.0 + rise / 2, 0.5)} for rise in (0, 1, 4)]
    assert rated("min", *evaluations) == pytest.approx([0, 1, 4])
    assert rated("hypervolume", *evaluations) == pytest.approx([1, 2, 5])
    assert rated("min", {"a": (1.0, 0.0), "b": (2.0, 0.0)}) == [0]


def test_held_out_samples_get_every_objective_and_their_weighted_sum(groups) -> None:
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    from pama_plugin.host.actors.evaluation import ScoredSamplesGenerator
    from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker

    args = host_args("--algo.advantage.estimator", "reinforce", "--rollout.micro_batch_size", "2")
    objectives = ["helpful=rm:org/a,weight=2", "length=builtin:length"]
    args.pama = load_config("pama", objectives, None, None, None, default_level="token")
    rewards = as_reward_groups(args.pama, groups)
    maker = MultiObjectiveExperienceMaker(
        None, None, rewards, None, None, SimpleNamespace(args=args), SimpleNamespace(pad_token_id=0)
    )
    samples = make_rollout(5, names=("length",))
    stock = SamplesGenerator(SimpleNamespace(args=args), None, [(["d"], ["prompt 0"])], DECODES, None)
    generator = ScoredSamplesGenerator(stock, maker.collector)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplesGenerator, "generate_eval_samples", lambda self, **_: samples)
        found = generator.generate_eval_samples(n_samples_per_prompt=1)

    alone = torch.cat([maker.collector.score([sample]).row("helpful") for sample in make_rollout(5, names=("length",))])
    lengths = torch.cat([sample.info["reward/length"] for sample in make_rollout(5, names=("length",))])
    torch.testing.assert_close(torch.cat([sample.rewards for sample in found]), (2 * alone + lengths).float())
    metrics, rows = generator.pop(3)
    assert sorted(row["sample"] for row in rows) == [0, 1, 2, 3, 4] and {row["step"] for row in rows} == {3}
    assert all(row["rewards"]["helpful"] == pytest.approx(alone[row["sample"]].item(), rel=1e-5) for row in rows)
    assert metrics["eval_all/helpful"] == pytest.approx(alone.mean().item(), rel=1e-5)
    assert {key.partition("/")[0] for key in metrics} == {"eval_d", "eval_unknown", "eval_all"}


def test_reward_models_score_while_the_engines_sleep(monkeypatch) -> None:
    """With vLLM awake there is no room for them on a GPU that they share: the host's own order, and ours after it."""
    from openrlhf.trainer.ppo_utils import samples_generator
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    from pama_plugin.host.actors.evaluation import ScoredSamplesGenerator

    order = []
    monkeypatch.setattr(samples_generator, "batch_vllm_engine_call", lambda engines, call: order.append(call))
    args = host_args("--vllm.enable_sleep", "--rollout.batch_size", "4")
    config = load_config("pama", ["length=builtin:length"], None, None, None, default_level="token")

    def score(samples):
        order.append("score")
        return RewardTable(("length",), torch.ones(1, len(samples)), {}, torch.arange(len(samples)), 1, (len(samples),))

    def generate(self, **_):
        order.append("generate")
        return make_rollout(2), 2, True

    monkeypatch.setattr(SamplesGenerator, "_generate_vllm", generate)
    stock = SamplesGenerator(SimpleNamespace(args=args), None, [], DECODES, None)
    ScoredSamplesGenerator(stock, SimpleNamespace(score=score, config=config)).generate_eval_samples(
        n_samples_per_prompt=1
    )
    assert order == ["wake_up", "generate", "sleep", "score"]

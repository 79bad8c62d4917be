"""What the trainer adds to the host's: logs of the whole rollout batch, and what it takes back from a checkpoint."""

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hosttools import host_args

from pama_plugin.batch.state import RunState
from pama_plugin.errors import PamaError
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract

TWO = ("a=builtin:length", "b=builtin:length,scale=2")


def trainer(
    states: dict[str, Any] | None = None, objectives=TWO, best=None, critic=None, key="", stop=None, noon=None, kl=None
) -> Any:
    """Ours over a stand-in for the host's, whose checkpoint holds ``states``."""
    from pama_plugin.batch.alarms import Alarms
    from pama_plugin.batch.rating import BEST
    from pama_plugin.host.actors.trainer import MultiObjectiveTrainer

    class Host:
        def init_checkpoint_states(self):
            return {"global_step": 4} | (states or {})

        def _compute_rollout_stats(self, experiences):
            return {"rollout/num_samples": 5.0}

    kind = type("Trainer", (MultiObjectiveTrainer, Host), {})
    made = kind.__new__(kind)
    settings = dict(stop_at_front=stop, stop_at_kl=kl, default_level="token")
    made.config = load_config("pama", objectives, None, None, noon, best, **settings)
    made.state = RunState.start(made.config)
    made.critic_model_group = critic
    made.best_eval_metric_key = key or BEST
    made.experience_maker = SimpleNamespace(steps_done=0, rows=[])
    made.rollout_log = SimpleNamespace(write=lambda rows: None)
    made.alarms = Alarms(made.config.trained_names, ["m"])
    made.args = SimpleNamespace(
        pama_terminal=False,
        train=SimpleNamespace(full_determinism_enable=False, dynamic_batch_enable=False, batch_size=8, max_epochs=1),
        algo=SimpleNamespace(dynamic_filtering_enable=False),
        ds=SimpleNamespace(load_in_4bit=False),
    )
    made.responses_trained = made.steps_at_start = 0
    made.sent_at_start = False
    made.vllm_engines = [Engine()]
    return made


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch) -> None:
    from pama_plugin.host.actors import trainer as ours

    def call(engines, name, *args):
        return [getattr(engine, name)(*args) for engine in engines]

    monkeypatch.setattr(ours, "batch_vllm_engine_call", call)


class Engine:
    """Stands in for a vLLM actor: records the steps that it is told of."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def begin_step(self, steps_done: int) -> None:
        self.steps.append(steps_done)


def test_the_engines_are_told_of_every_step_in_every_run() -> None:
    """They compare their first rollouts with the policy, and those only."""
    ours = trainer()
    ours.init_checkpoint_states()
    ours._begin_step(5)
    assert [engine.steps for engine in ours.vllm_engines] == [[4, 5]]


@pytest.mark.parametrize(("in_4_bits", "step", "sent"), [(False, 0, 0), (True, 0, 1), (True, 4, 0)])
def test_vllm_is_sent_a_base_in_4_bits_before_the_first_rollout(in_4_bits, step, sent) -> None:
    """It has loaded the weights before they were rounded. A run that is resumed sends them in OpenRLHF's ``fit``."""
    ours, syncs = trainer({"global_step": step}), []
    ours.args.ds.load_in_4bit = in_4_bits
    ours.broadcast_to_vllm = lambda: syncs.append(1)
    ours.init_checkpoint_states()
    ours.init_checkpoint_states()  # as in asynchronous training
    assert len(syncs) == sent


def test_wandb_has_our_settings_as_values_to_group_runs_by(monkeypatch) -> None:
    """wandb is no part of the CPU stack: the stand-in refuses to change a key unless told to, as wandb does."""
    from openrlhf.utils.logging_utils import WandbLogger

    from pama_plugin.host.actors.trainer import MultiObjectiveTrainer

    class Config(dict):
        def update(self, values, allow_val_change=False):
            assert allow_val_change or not values.keys() & self
            super().update(values)

    wandb = SimpleNamespace(api=SimpleNamespace(api_key="k"), define_metric=lambda *_, **__: None, config=Config())
    wandb.init = lambda config, **_: wandb.config.update({key: str(value) for key, value in config.items()})
    wandb.Table = lambda **_: None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = host_args("--logger.wandb.key", "k")
    args.pama = load_config("pama", TWO, None, None, None, option=["soft=4"], default_level="token")

    class Host:
        def __init__(self):
            self.args, self.strategy = args, SimpleNamespace(args=args)
            self.actor_model_group = self.critic_model_group = self.reward_model_group = None
            self.reference_model_group = self.kl_ctl = self.tokenizer = self.vllm_engines = None
            self.best_eval_metric_key, self.wandb_logger, self.tensorboard_logger = "", WandbLogger(args), None

    type("Trainer", (MultiObjectiveTrainer, Host), {})()
    logged = wandb.config["pama"]
    assert (logged["loss"], logged["level"], logged["options"]) == ("pama", "token", {"soft": 4})
    assert logged["objectives"]["b"]["location"] == "length"


def test_our_columns_become_means_of_the_rollout_batch_and_do_not_ride_to_the_actor() -> None:
    columns = [torch.tensor([1.0, 2.0]), torch.tensor([6.0, 7.0, 8.0])]
    experiences = [
        SimpleNamespace(info={"reward/a": column, "pama/rms": torch.full_like(column, 0.5), "return": column})
        for column in columns
    ]
    stats = trainer(objectives=TWO[:1])._compute_rollout_stats(experiences)
    assert stats == {"rollout/num_samples": 5.0, "reward/a": pytest.approx(4.8), "pama/rms": 0.5}
    assert [set(experience.info) for experience in experiences] == [{"return"}] * 2


def test_a_response_without_a_reward_is_no_part_of_the_mean_and_failures_are_counted() -> None:
    columns = {
        "reward/a": torch.tensor([1.0, float("nan"), 3.0]),
        "pama/failures/a": torch.tensor([0.0, 1.0, 0.0]),
        "seconds/a": torch.tensor([0.1, 0.3, 0.2]),
    }
    stats = trainer(objectives=TWO[:1])._compute_rollout_stats([SimpleNamespace(info=columns)])
    assert (stats["reward/a"], stats["pama/failures/a"], stats["seconds/a"]) == (2, 1, pytest.approx(0.2))


def test_correlations_are_over_the_responses_that_have_both_rewards() -> None:
    nan = float("nan")
    columns = {"a": [1.0, 2.0, 3.0, nan, 9.0], "b": [2.0, 4.0, 3.0, 0.0, nan], "c": [7.0] * 5}
    experiences = [
        SimpleNamespace(info={f"reward/{name}": torch.tensor(column[part]) for name, column in columns.items()})
        for part in (slice(0, 2), slice(2, 5))
    ]
    stats = trainer(objectives=(*TWO, "c=builtin:length,scale=3"))._compute_rollout_stats(experiences)
    found = {key: value for key, value in stats.items() if "correlation" in key}
    # (1, 2, 3) against (2, 4, 3): covariance 1/2, both deviations 1. c does not vary.
    assert found == {"pama/correlation/a/b": pytest.approx(0.5)}


def test_latencies_are_logged_beside_the_hosts_and_not_added_to_its_total() -> None:
    """The host adds up whatever is called timing/* in a step."""
    ours, logged = trainer(), {}
    host = type(ours).__mro__[-2]
    host.save_logs_and_checkpoints = lambda self, step, logs, states: logged.update(logs)
    ours.best_eval_metric_value = 0.0
    ours.save_logs_and_checkpoints(1, {"seconds/a": 0.5, "timing/step_total": 3.0})
    assert logged == {"timing/reward/a": 0.5, "timing/step_total": 3.0}


def test_the_mean_of_no_reward_is_not_logged() -> None:
    ours = trainer()
    ours.state.objectives["a"].rewards.update(torch.tensor([1.0, 3.0]))
    type(ours).__mro__[-2].train_step = lambda self, samples, step: ({}, step + 1)
    status, _ = ours.train_step([], 0)
    assert status == {"reward_mean/a": 2.0, "reward_std/a": pytest.approx(2**0.5)}


@pytest.mark.parametrize(
    ("rollouts", "epochs", "dynamic", "start", "trains"),
    [
        ([], 1, False, 0, False),
        ([4, 3], 1, False, 0, False),
        ([4, 4], 1, False, 0, True),  # DeepSpeed accumulates gradients over rollouts
        ([4], 2, False, 0, True),
        ([4], 1, True, 0, True),
        ([], 1, True, 0, False),
        ([], 1, False, 7, True),  # resumed after its last step
    ],
)
def test_a_run_that_trained_nothing_is_an_error(rollouts, epochs, dynamic, start, trains) -> None:
    """Dynamic filtering, or a small data set, may leave fewer responses than an optimizer step takes."""
    ours = trainer()
    ours.args.train.max_epochs, ours.args.train.dynamic_batch_enable, ours.steps_at_start = epochs, dynamic, start
    type(ours).__mro__[-2].train_step = lambda self, samples, step: ({}, step + 1)
    for step, responses in enumerate(rollouts):
        ours.train_step([None] * responses, step)
    with (
        contextlib.nullcontext()
        if trains
        else pytest.raises(PamaError, match=f"--train.batch_size.*had {sum(rollouts)}")
    ):
        ours._refuse_to_save_the_start()


@pytest.mark.parametrize(("kept", "warns"), [(0, True), (1, True), (2, False), (12, False)])
def test_a_step_that_filtered_out_almost_everything_says_so(kept, warns, capfd, monkeypatch) -> None:
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    from pama_plugin.host.actors.evaluation import ScoredSamplesGenerator

    ours = ScoredSamplesGenerator.__new__(ScoredSamplesGenerator)
    args = SimpleNamespace(
        train=SimpleNamespace(full_determinism_enable=False),
        algo=SimpleNamespace(dynamic_filtering_enable=True, dynamic_filtering_range=(0, 1)),
        rollout=SimpleNamespace(batch_size=4, n_samples_per_prompt=2, vllm_generate_batch_size=None),
        vllm=SimpleNamespace(enable_sleep=False),
    )
    config = load_config("pama", TWO, None, None, None, filter_by="b", default_level="token")
    vars(ours).update(
        args=args, batches=0, ended=False, prompts_dataloader=[], collector=SimpleNamespace(config=config)
    )
    samples = [SimpleNamespace(prompts=[str(prompt)]) for prompt in range(kept) for _ in range(2)]
    monkeypatch.setattr(SamplesGenerator, "_generate_vllm", lambda *_, **__: (samples, 12, True))
    assert ours.generate_samples()[2] == 12
    said = f"kept {kept} of 12 prompts, those whose mean b lies within --algo.dynamic_filtering_range 0 1"
    assert (said in capfd.readouterr().out) == warns


AT_THE_FRONT = dict(active=0.05, conflict=0.9)


def steps_until_the_end(stop, steps: list[dict[str, float]], ours=None) -> tuple[Any, int]:
    """How many steps the trainer makes, each with the given shares, before it ends the run; all of them if it never."""
    ours, ended = ours or trainer(stop=stop), []
    host = type(ours).__mro__[-2]
    host.train_step = lambda self, shares, step: (
        {"pama/active_fraction": shares["active"], "pama/conflict_rate": shares["conflict"]},
        step + 1,
    )
    type(ours).end_run = lambda self: ended.append(True)
    for done, shares in enumerate(steps):
        status, _ = ours.train_step(shares, done)
        assert ("pama/steps_at_front" in status) == bool(stop)
        if ended:
            return ours, done + 1
    return ours, len(steps) + 1


def test_every_step_has_a_line_its_responses_are_logged_and_alarms_are_raised_once(capfd) -> None:
    ours, logged = trainer(), []
    ours.rollout_log = SimpleNamespace(write=logged.append)
    type(ours).__mro__[-2].train_step = lambda self, nll, step: (
        {"reward/a": 0.5, "pama/coefficient/a": 1.0, "pama/reference_nll": nll[0], "pama/kl_response": 2.0},
        step + 1,
    )
    for step, nll in enumerate([2.0, 4.0, 4.0, 4.0, 4.0]):
        ours.experience_maker.rows = [step]
        ours.train_step([nll], step)
    printed = capfd.readouterr().out.splitlines()
    assert logged == [[0], [1], [2], [3], [4]]
    assert printed[0] == "PAMA step 1  a 0.5 (100 %)  b – (–)  2 nats  reference nll 2"
    assert [line for line in printed if "alarm" in line] == [line for line in printed[4:5]]
    assert printed[4].startswith("PAMA alarm, step 4: the responses may no longer be language")
    assert ours.state.first_nll == 2.0 and len(printed) == 6


def test_a_run_ends_when_it_has_left_the_trust_region(capfd) -> None:
    ours, ended = trainer(kl=3), []
    type(ours).__mro__[-2].train_step = lambda self, _, step: ({"pama/kl_response": 1.5 * step}, step + 1)
    type(ours).end_run = lambda self: ended.append(self.steps_done)
    for step in range(4):
        ours.train_step([], step)
    assert ended == [3]  # in the fourth step
    said = capfd.readouterr().out
    assert "the run ends after step 4: its responses are 4.5 nats" in said and "--pama.stop_at_kl 3" in said


def test_a_run_ends_when_it_has_stayed_at_the_front(capfd) -> None:
    away = dict(active=0.4, conflict=0.6)
    steps = [away, AT_THE_FRONT, AT_THE_FRONT, away, AT_THE_FRONT, AT_THE_FRONT, AT_THE_FRONT, away]
    assert steps_until_the_end("0.1:3", steps)[1] == 7
    said = capfd.readouterr().out
    assert "the run ends after step 7, at the front" in said and "--pama.stop_at_front 0.1:3" in said
    assert steps_until_the_end(None, steps)[1] == 9
    assert steps_until_the_end("0.05:1", steps)[1] == 9  # below, not at, the share


def test_where_nothing_differs_is_no_front() -> None:
    """A reward that hardly any response earns leaves few tokens active, and none of the others in conflict."""
    assert steps_until_the_end("0.1:2", [dict(active=0.02, conflict=0.03)] * 9)[1] == 10


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_a_synchronous_run_ends_with_the_logs_and_the_evaluation_of_its_last_step(last, monkeypatch) -> None:
    """The host's own loop, over four batches in two episodes."""
    from unittest import mock

    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    from pama_plugin.host.actors import trainer as module
    from pama_plugin.host.actors.evaluation import ScoredSamplesGenerator

    batches, done = [1, 2, 3, 4], []

    class Training(module.PPOTrainer.__ray_metadata__.modified_class):
        def init_checkpoint_states(self):
            return {"episode": 0, "global_step": 0, "total_consumed_prompts": 0}

        def restore_best_checkpoint_state(self, states): ...

        def train_step(self, samples, step):
            done.append(("step", *samples))
            if samples == [last]:
                self.end_run()
            return {}, step + 1

        def save_logs_and_checkpoints(self, step, *_):
            done.append(("logs", step))

        def evaluate(self, step, **_):
            done.append(("evaluation", step))
            return {}

        def save_best_checkpoint(self, *_): ...

    def generate(self, **_):
        batch = batches.pop(0)
        return [batch], None, 1, batch % 2 == 0

    monkeypatch.setattr(SamplesGenerator, "generate_samples", generate)
    samples, training = ScoredSamplesGenerator.__new__(ScoredSamplesGenerator), Training.__new__(Training)
    args = SimpleNamespace(
        train=SimpleNamespace(num_episodes=2, full_determinism_enable=False),
        eval=SimpleNamespace(steps=1, temperature=1.0, n_samples_per_prompt=1),
        algo=SimpleNamespace(dynamic_filtering_enable=False),
    )
    vars(samples).update(args=args, batches=0, ended=False)
    vars(training).update(args=args, samples_generator=samples, prompts_dataloader=mock.MagicMock(), generate_kwargs={})
    vars(training).update(eval_dataloader=[1], wandb_logger=None, tensorboard_logger=None)
    super(module.MultiObjectiveTrainer, training).fit()
    assert done == [(what, step) for step in range(1, last + 1) for what in ("step", "logs", "evaluation")]


def test_the_steps_at_the_front_go_on_after_a_resume() -> None:
    ours, _ = steps_until_the_end("0.1:3", [AT_THE_FRONT] * 2)
    states = {"pama": ours.state.model_dump_json()}

    def resumed(**settings) -> Any:
        found = trainer(states, **dict(stop="0.1:3") | settings)
        found.init_checkpoint_states()
        return found

    assert steps_until_the_end("0.1:3", [AT_THE_FRONT], resumed())[1] == 1
    for elsewhere in (
        dict(objectives=(TWO[0], "b=builtin:length,scale=7")),
        dict(objectives=(*TWO, "c=builtin:length,scale=7")),
        dict(objectives=(TWO[0], f"{TWO[1]},weight=2")),
        dict(stop="0.2:3"),
        dict(noon=True),
    ):
        assert steps_until_the_end("0.1:3", [AT_THE_FRONT] * 2, resumed(**elsewhere))[1] == 3, elsewhere


def checkpoint(objectives=TWO, best=None, **others: Any) -> dict[str, Any]:
    state = RunState.start(load_config("pama", objectives, None, None, None, best, default_level="token"))
    state.objectives["a"].rewards.update(torch.tensor([1.0, 3.0]))
    rated = {"best_eval_metric_key": "eval_pama_best", "best_eval_metric_value": 0.3}
    return rated | {"pama": state.model_dump_json()} | others


def test_the_state_goes_on() -> None:
    ours = trainer(checkpoint())
    states = ours.init_checkpoint_states()
    assert states["best_eval_metric_value"] == 0.3 and ours.steps_done == 4
    assert ours.state.objectives["a"].rewards.mean == 2


@pytest.mark.parametrize(
    ("states", "now"),
    [
        (checkpoint(best="weighted"), {}),
        (checkpoint(), {"best": "hypervolume"}),
        (checkpoint(objectives=("a=builtin:length,weight=2", TWO[1])), {}),
        (checkpoint(objectives=("a=builtin:length,scale=3", TWO[1])), {}),
        (checkpoint(), {"objectives": (*TWO, "c=builtin:length")}),
        (checkpoint(best_eval_metric_key="eval_x_pass1"), {}),
        ({"best_eval_metric_key": "eval_x_pass1", "best_eval_metric_value": 0.3}, {}),  # of a stock run
    ],
    ids=["rule", "rule given", "weight", "scorer", "objective added", "metric", "stock"],
)
def test_ratings_of_another_kind_are_forgotten(states, now) -> None:
    found = trainer(states, **now).init_checkpoint_states()
    assert not [key for key in found if key.startswith("best_eval_metric")]


def test_a_metric_of_the_users_own_is_kept() -> None:
    states = checkpoint(best_eval_metric_key="eval_x_pass1")
    assert trainer(states, best="min", key="eval_x_pass1").init_checkpoint_states()["best_eval_metric_value"] == 0.3


def test_heads_in_another_order_than_the_flags_are_refused() -> None:
    """The driver orders the flags; it cannot where it does not see the checkpoint."""
    with pytest.raises(PamaError, match="--ckpt.path .*same folder.*found .*b, a .*a, b"):
        trainer(checkpoint(objectives=TWO[::-1]), critic=object()).init_checkpoint_states()
    assert trainer(checkpoint(objectives=TWO[::-1])).init_checkpoint_states()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("used", "left", "position"), [(5, 8, 5), (5, 5, 0), (5, 4, 0), (5, 1, 0)])
def test_a_data_set_that_has_become_smaller_starts_again(workers, used, left, position, capfd) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    from pama_plugin.host.actors.trainer import reachable_position

    loader = StatefulDataLoader(list(range(8)), num_workers=workers)
    iterator = iter(loader)
    for _ in range(used):
        next(iterator)
    now = StatefulDataLoader(list(range(left)), num_workers=workers)
    if found := reachable_position(loader.state_dict(), len(now)):
        now.load_state_dict(found)
    following = list(now) or list(now)  # after the last prompt comes the next epoch
    assert int(following[0]) == position
    assert (f"prompt 5 of the data set, which now has {left}" in capfd.readouterr().out) == (left < used)

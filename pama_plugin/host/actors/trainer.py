"""OpenRLHF's trainer, in its Ray actor, with our experience maker and state.

The methods of the mixin are in the order of a run: start (``fit``, the hand-shake, a checkpoint), step (``train_step``
and what it shows and decides), logs and checkpoints. ``PPOTrainer`` at the end is the synchronous trainer; the
asynchronous one is in ``trainer_async``.
"""

from typing import TYPE_CHECKING, Any

import ray
import torch
from openrlhf.trainer import ppo_trainer
from openrlhf.trainer.ray.vllm_engine import batch_vllm_engine_call
from openrlhf.utils.logging_utils import init_logger
from transformers import set_seed

from pama_plugin.batch.alarms import Alarms
from pama_plugin.batch.keys import (
    ACTIVE,
    CONFLICT,
    KL,
    OUR_COLUMNS,
    REWARD_MEAN,
    REWARD_STD,
    REWARD_TIMING,
    SECONDS,
    STEPS_AT_FRONT,
)
from pama_plugin.batch.metrics import reduce_columns
from pama_plugin.batch.rating import BEST, rate
from pama_plugin.batch.rollouts import evaluation_table, step_line
from pama_plugin.batch.state import RunState
from pama_plugin.errors import PamaError, RewardError
from pama_plugin.host.actors.dataset import read_columns
from pama_plugin.host.actors.evaluation import ScoredSamplesGenerator
from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker
from pama_plugin.host.actors.handshake import report, shake_hands
from pama_plugin.host.actors.probe import probe_pairs
from pama_plugin.host.actors.rollout_log import RolloutLog, log_folder
from pama_plugin.host.preflight.resume import STATE
from pama_plugin.host.protocols import Strategy
from pama_plugin.runs.rollouts import EVALUATION_FILE, FILE, SETTINGS
from pama_plugin.settings.fields import StopAtFront
from pama_plugin.settings.load import as_settings, dump_config

if TYPE_CHECKING:
    from pama_plugin.host.protocols import Trainer as Host
else:  # at run time ``BasePPOTrainer`` follows this mixin
    Host = object

logger = init_logger(__name__)


class MultiObjectiveTrainer(Host):
    """Mixin before ``BasePPOTrainer``, for the synchronous and the asynchronous trainer.

    It replaces the experience maker, shakes hands before the first step, adds the step to reward errors, saves the
    objectives' state in the checkpoints, and rates evaluations.
    """

    best_eval_metric_key: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.experience_maker = MultiObjectiveExperienceMaker(
            self.actor_model_group,
            self.critic_model_group,
            self.reward_model_group,
            self.reference_model_group,
            self.kl_ctl,
            self.strategy,
            self.tokenizer,
            vllm_engines=self.vllm_engines,
        )
        self.config = self.experience_maker.config
        self.state = self.experience_maker.state
        self.best_eval_metric_key = self.best_eval_metric_key or BEST
        if self.wandb_logger:  # OpenRLHF's config has one text of all our settings: runs could not be grouped by rule
            self.wandb_logger.handle.config.update({"pama": as_settings(self.config)}, allow_val_change=True)
        folder = log_folder(self.args)
        self.settings_file = folder / SETTINGS
        trackers = self.wandb_logger, self.tensorboard_logger
        self.rollout_log = RolloutLog(folder / FILE, "pama/rollouts", *trackers)
        self.evaluation_log = RolloutLog(folder / EVALUATION_FILE, "pama/evaluation", *trackers)
        monitors = [objective.name for objective in self.config.objectives if objective.role == "monitor"]
        self.alarms = Alarms(self.config.trained_names, monitors)
        self.steps_done = 0
        self.steps_at_start = self.responses_trained = 0
        self.sent_at_start = False

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Shake hands with every actor, probe every reward, train; a ``RewardError`` names its step."""
        print(self.shake_hands(), flush=True)
        try:
            self.settings_file.parent.mkdir(parents=True, exist_ok=True)
            if not (self.args.pama_evaluate_only and self.settings_file.exists()):  # those of the trained run
                self.settings_file.write_text(dump_config(self.config))
        except OSError as error:
            logger.warning("PAMA: cannot write %s: %s", self.settings_file, error.strerror)
        if self.config.probe != "off":
            probe_pairs(self.experience_maker.collector)
        if self.args.pama_evaluate_only:
            self.evaluate_only()
            return
        try:
            super().fit(*args, **kwargs)
        except RewardError as error:
            raise error.at_step(self.steps_done + 1) from error
        self._refuse_to_save_the_start()

    def _refuse_to_save_the_start(self) -> None:
        """Raise ``PamaError`` if no optimizer step was made: OpenRLHF would save the unchanged policy as a success."""
        train, responses = self.args.train, self.responses_trained
        needed = 1 if train.dynamic_batch_enable else train.batch_size
        if self.steps_at_start or responses * train.max_epochs >= needed:
            return
        filtered = f", and dynamic filtering by {self.config.filter_by} left these" if self.config.filter_by else ""
        raise PamaError(
            f"nothing was trained: an optimizer step takes {needed} responses (--train.batch_size), the run had "
            f"{responses}{filtered}"
        )

    def shake_hands(self) -> str:
        def reports(group: Any) -> list[Any]:
            return group.async_run_method("__ray_call__", report) if group is not None else []

        groups = self.experience_maker.collector.groups
        in_ranks = [groups[objective.name] for objective in self.config.scored_in("ranks")]  # replicas are our own code
        return shake_hands(
            self.config,
            {
                "policy": [[rank] for rank in reports(self.actor_model_group)],
                "critic": [[rank] for rank in reports(self.critic_model_group)],
                "reward groups": [group.run(report) for group in in_ranks],
                "reference": [[rank] for rank in reports(self.reference_model_group)],
                "rollout": [[engine.__ray_call__.remote(report)] for engine in self.vllm_engines],
            },
        )

    def init_checkpoint_states(self) -> dict[str, Any]:
        states: dict[str, Any] = super().init_checkpoint_states()
        key = states.get("best_eval_metric_key")
        comparable = key == self.best_eval_metric_key
        if STATE in states:
            saved = RunState.model_validate_json(states[STATE])
            if self.critic_model_group is not None and saved.heads != self.state.heads:
                # The driver orders the objectives as in the checkpoint, unless it cannot see it.
                raise PamaError(
                    f"--ckpt.path must be the same folder on every node, found a checkpoint with the value heads "
                    f"{', '.join(saved.heads)} for the objectives {', '.join(self.state.heads)}"
                )
            if key == BEST and (self.state.swapped(saved) or self.state.rating != saved.rating):
                comparable = False
            self.state.resume(saved)
        if not comparable:  # OpenRLHF would restore the old key, whose value no new rating might reach
            states = {name: value for name, value in states.items() if not name.startswith("best_eval_metric")}
        self.steps_at_start = states["global_step"]
        self._begin_step(self.steps_at_start)
        if self.args.ds.load_in_4bit and not self.steps_at_start and not self.sent_at_start:
            self.sent_at_start = True  # in asynchronous training the states are read twice
            self.broadcast_to_vllm()  # vLLM has loaded the weights before they were rounded to 4 bits
        return states

    def train_step(self, rollout_samples: list[Any], *args: Any) -> tuple[dict[str, Any], int]:
        status, steps_done = super().train_step(rollout_samples, *args)
        self.responses_trained += len(rollout_samples)
        for name, objective in self.state.objectives.items():
            if objective.rewards.count:
                rewards = objective.rewards
                status |= {f"{REWARD_MEAN}{name}": rewards.mean, f"{REWARD_STD}{name}": rewards.std}
        self._show(status, steps_done)
        stop = self.config.stop_at_front
        at_front = stop is not None and self._has_stayed_at_the_front(stop, status, steps_done)
        if at_front or self._has_left_the_trust_region(status, steps_done):
            self.end_run()
        self._begin_step(steps_done)
        return status, steps_done

    def _show(self, status: dict[str, Any], steps_done: int) -> None:
        """Log the step's responses; print one line about the step, and the alarms that it sets off."""
        self.rollout_log.write(self.experience_maker.rows)
        line = step_line(self.config, steps_done, self.steps_planned(), status, colours=self.args.pama_terminal)
        self.alarms.first_nll = self.state.first_nll
        alarms = self.alarms.read(status)
        self.state.first_nll = self.alarms.first_nll
        print("\n".join([line, *(f"PAMA alarm, step {steps_done}: {alarm}" for alarm in alarms)]), flush=True)

    def steps_planned(self) -> int | None:
        """The number of steps of the whole run, if it is known here."""
        return None

    def _has_left_the_trust_region(self, status: dict[str, Any], steps_done: int) -> bool:
        limit, nats = self.config.stop_at_kl, status.get(KL, 0.0)
        if limit is None or nats <= limit:
            return False
        print(
            f"PAMA: the run ends after step {steps_done}: its responses are {nats:.3g} nats from the reference on "
            f"average, more than --pama.stop_at_kl {limit:g}",
            flush=True,
        )
        return True

    def evaluate_only(self) -> None:
        """Evaluate the policy, and end as if it had been trained."""
        raise NotImplementedError

    def end_run(self) -> None:
        """End the run after this step as if no prompts were left: with checkpoint, evaluation and saved model."""
        raise NotImplementedError

    def _has_stayed_at_the_front(self, stop: StopAtFront, status: dict[str, Any], steps_done: int) -> bool:
        """Count the consecutive steps in which hardly any token has an advantage; return whether the run is to end.

        Most tokens must be in conflict; otherwise they have no advantage because no rewards differ.
        """
        active = status[ACTIVE]
        at_front = active < stop.share and status[CONFLICT] > 0.5
        self.state.steps_at_front = self.state.steps_at_front + 1 if at_front else 0
        status[STEPS_AT_FRONT] = self.state.steps_at_front
        if self.state.steps_at_front < stop.steps:
            return False
        print(
            f"PAMA: the run ends after step {steps_done}, at the front: fewer than {stop.share:g} of the tokens had an "
            f"advantage in each of the last {self.state.steps_at_front} steps ({active:.3f} in this one), as "
            f"--pama.stop_at_front {stop.share:g}:{stop.steps} asks",
            flush=True,
        )
        return True

    def _compute_rollout_stats(self, experiences: list[Any]) -> dict[str, float]:
        """Add our metrics to OpenRLHF's, and remove our columns, while the whole rollout batch is at hand.

        The actor would reduce each column per micro-batch, drop responses that do not fill one, and log nothing while
        it is frozen.
        """
        stats: dict[str, float] = super()._compute_rollout_stats(experiences)
        columns = {
            key: torch.cat([experience.info.pop(key) for experience in experiences]).float()
            for key in [key for key in experiences[0].info if key.startswith(OUR_COLUMNS)]
        }
        return stats | reduce_columns(columns, self.config.names)

    def _begin_step(self, steps_done: int) -> None:
        """Announce the step to the engines. With --train.full_determinism_enable, seed every process by seed and step.

        OpenRLHF seeds the models' processes once, at their start: a resumed run would repeat the first step's numbers.
        """
        self.steps_done = self.experience_maker.steps_done = steps_done
        batch_vllm_engine_call(self.vllm_engines, "begin_step", steps_done)
        if self.args.train.full_determinism_enable:
            seed = self.args.train.seed + steps_done
            for group in (self.actor_model_group, self.critic_model_group):
                if group is not None:
                    ray.get(group.async_run_method("__ray_call__", lambda _, seed=seed: set_seed(seed)))

    def save_logs_and_checkpoints(self, global_step: int, logs_dict: Any = None, client_states: Any = None) -> None:
        # Not earlier: OpenRLHF sums all timing/* of a step, and these overlap with the other phases.
        logs_dict = {
            f"{REWARD_TIMING}{key.removeprefix(SECONDS)}" if key.startswith(SECONDS) else key: value
            for key, value in (logs_dict or {}).items()
        }
        states = {
            STATE: self.state.model_dump_json(),
            # As in OpenRLHF 0.11.2; in earlier releases a resumed run took its first evaluation as the best.
            "best_eval_metric_key": self.best_eval_metric_key,
            "best_eval_metric_value": self.best_eval_metric_value,
        }
        super().save_logs_and_checkpoints(global_step, logs_dict, (client_states or {}) | states)

    def save_best_checkpoint(self, eval_metrics: dict[str, float], global_step: int, client_states: Any = None) -> None:
        """Rate the evaluation by --pama.best, log the rating, and save as OpenRLHF does if none was better."""
        rating = rate(self.config, self.state, eval_metrics)
        self.log_eval(global_step, {BEST: rating})
        client_states = (client_states or {}) | {STATE: self.state.model_dump_json()}
        super().save_best_checkpoint(eval_metrics | {BEST: rating}, global_step, client_states)

    def log_eval(self, global_step: int, metrics: dict[str, float]) -> None:
        for logger in filter(None, (self.wandb_logger, self.tensorboard_logger)):
            logger.log_eval(global_step, metrics)


def reachable_position(position: dict[str, Any], prompts: int) -> dict[str, Any]:
    """The saved position in the prompts; the start, and a line that says so, if there are no longer as many.

    torchdata would fast-forward to the position, and raise ``StopIteration``.

    Args:
        position: a state of torchdata's ``StatefulDataLoader``, with or without workers.
        prompts: the present number of prompts.
    """
    used = position.get("_num_yielded", 0)
    if "_snapshot" in position:
        used = position["_snapshot"]["_snapshot_step"] + position["_steps_since_snapshot"]
    if used <= prompts:
        return position
    print(
        f"[Warning] PAMA: the checkpoint is at prompt {used} of the data set, which now has {prompts}: the run goes on "
        "with its first prompt",
        flush=True,
    )
    return {}


@ray.remote
class PPOTrainer(MultiObjectiveTrainer, ppo_trainer.PPOTrainer.__ray_metadata__.modified_class):
    """The synchronous trainer."""

    prompts_dataloader: Any
    eval_dataloader: Any
    samples_generator: Any

    def __init__(self, pretrain: str, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        if strategy.args.train.full_determinism_enable:
            set_seed(strategy.args.train.seed)  # OpenRLHF shuffles the prompts here without setting a seed
        read_columns(strategy)
        super().__init__(pretrain, strategy, *args, **kwargs)
        self.samples_generator = ScoredSamplesGenerator(self.samples_generator, self.experience_maker.collector)
        self.eval_dataloader = self.samples_generator.eval_dataloader  # by its prompts OpenRLHF knows the data sets

    def init_checkpoint_states(self) -> dict[str, Any]:
        states = super().init_checkpoint_states()
        self.samples_generator.draw.number = states["total_consumed_prompts"]
        position = states["data_loader_state_dict"]
        return states | {"data_loader_state_dict": reachable_position(position, len(self.prompts_dataloader))}

    def steps_planned(self) -> int:
        prompts = len(self.prompts_dataloader) * self.args.train.num_episodes
        return -(-prompts // self.args.rollout.batch_size)

    def end_run(self) -> None:
        """End after this step's logs, checkpoint and evaluation; OpenRLHF then saves the model, as at any end."""
        self.samples_generator.ended = True

    def evaluate(self, global_step: int, **generate_kwargs: Any) -> dict[str, float]:
        logs: dict[str, float] = super().evaluate(global_step, **generate_kwargs)
        metrics, rows = self.samples_generator.pop(global_step)
        self.evaluation_log.write(rows)
        self.log_eval(global_step, metrics)
        print(evaluation_table(self.config, global_step, metrics), flush=True)
        return logs | metrics

    def evaluate_only(self) -> None:
        self.init_checkpoint_states()
        if self.steps_at_start:
            self.broadcast_to_vllm()
        evaluation = self.args.eval
        settings = {"temperature": evaluation.temperature, "n_samples_per_prompt": evaluation.n_samples_per_prompt}
        self.evaluate(self.steps_at_start, **self.generate_kwargs | settings)
        for logger in filter(None, (self.wandb_logger, self.tensorboard_logger)):
            logger.close()

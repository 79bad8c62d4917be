"""The host's trainer, in its Ray actor, with our experience maker and state in place."""

from typing import TYPE_CHECKING, Any

import ray
import torch
from openrlhf.trainer import ppo_trainer
from openrlhf.trainer.ray.vllm_engine import batch_vllm_engine_call
from transformers import set_seed

from pama_plugin.batch.metrics import OUR_COLUMNS, SECONDS, reduce_columns
from pama_plugin.batch.rating import BEST, rate
from pama_plugin.batch.state import RunState
from pama_plugin.errors import PamaError, RewardError
from pama_plugin.host.actors.evaluation import ScoredSamplesGenerator
from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker
from pama_plugin.host.actors.handshake import report, shake_hands
from pama_plugin.host.actors.probe import probe_pairs
from pama_plugin.host.preflight.resume import STATE
from pama_plugin.host.protocols import Strategy
from pama_plugin.settings.run import StopAtFront

if TYPE_CHECKING:
    from pama_plugin.host.protocols import Trainer as Host
else:  # at run time ``BasePPOTrainer`` comes after this mixin
    Host = object


class MultiObjectiveTrainer(Host):
    """What is ours in a trainer of the host, synchronous or not: a mixin before ``BasePPOTrainer``.

    It swaps the experience maker, shakes hands before the first step, knows which step failed, keeps the objectives'
    state in the checkpoints, and rates evaluations.
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
        self.steps_done = 0

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Shake hands with every actor, probe every reward, train; a reward that fails is reported with its step."""
        print(self.shake_hands(), flush=True)
        if self.config.probe != "off":
            probe_pairs(self.experience_maker.collector)
        try:
            super().fit(*args, **kwargs)
        except RewardError as error:
            raise error.at_step(self.steps_done + 1) from error

    def shake_hands(self) -> str:
        def reports(group: Any) -> list[Any]:
            return group.async_run_method("__ray_call__", report) if group is not None else []

        groups = self.experience_maker.collector.groups
        in_ranks = [groups[objective.name] for objective in self.config.scored_in("ranks")]  # replicas run our code
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
                # The driver puts them in order, unless it cannot see the checkpoint.
                raise PamaError(
                    f"the value heads of the checkpoint are those of {', '.join(saved.heads)}, found "
                    f"{', '.join(self.state.heads)}: --ckpt.path must be the same folder on every node"
                )
            if key == BEST and (self.state.swapped(saved) or self.state.rating != saved.rating):
                comparable = False
            self.state.resume(saved)
        if not comparable:  # the host would take the old key back, and no new rating might ever reach the old value
            states = {name: value for name, value in states.items() if not name.startswith("best_eval_metric")}
        self._begin_step(states["global_step"])
        return states

    def train_step(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], int]:
        status, steps_done = super().train_step(*args, **kwargs)
        for name, own in self.state.objectives.items():
            if own.rewards.count:
                status |= {f"reward_mean/{name}": own.rewards.mean, f"reward_std/{name}": own.rewards.std}
        stop = self.config.stop_at_front
        if stop is not None and self._has_stayed_at_the_front(stop, status, steps_done):
            self.end_run()
        self._begin_step(steps_done)
        return status, steps_done

    def end_run(self) -> None:
        """Let the run end after this step as at the end of its prompts: with checkpoint, evaluation and saved model."""
        raise NotImplementedError

    def _has_stayed_at_the_front(self, stop: StopAtFront, status: dict[str, Any], steps_done: int) -> bool:
        """Count the steps in a row in which hardly a token has an advantage, and say when to end.

        Most tokens must be in conflict: else they have none because nothing differs.
        """
        active = status["pama/active_fraction"]
        there = active < stop.share and status["pama/conflict_rate"] > 0.5
        self.state.steps_at_front = self.state.steps_at_front + 1 if there else 0
        status["pama/steps_at_front"] = self.state.steps_at_front
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
        """The host's and ours, whose columns leave the experiences here, where the whole rollout batch is.

        The actor would reduce each of them for every micro-batch, leave out responses that fill none, and log nothing
        while it is frozen.
        """
        stats: dict[str, float] = super()._compute_rollout_stats(experiences)
        columns = {
            key: torch.cat([experience.info.pop(key) for experience in experiences]).float()
            for key in [key for key in experiences[0].info if key.startswith(OUR_COLUMNS)]
        }
        return stats | reduce_columns(columns, self.config.names)

    def _begin_step(self, steps_done: int) -> None:
        """With --train.full_determinism_enable a step's random numbers depend on nothing but the seed and the step.

        The host seeds its models' processes once, at their start: a resumed run would draw the first step's again.
        """
        self.steps_done = self.experience_maker.steps_done = steps_done
        if self.args.train.full_determinism_enable or self.args.algo.dynamic_filtering_enable:
            batch_vllm_engine_call(self.vllm_engines, "begin_step", steps_done)
        if self.args.train.full_determinism_enable:
            seed = self.args.train.seed + steps_done
            for group in (self.actor_model_group, self.critic_model_group):
                if group is not None:
                    ray.get(group.async_run_method("__ray_call__", lambda _, seed=seed: set_seed(seed)))

    def save_logs_and_checkpoints(self, global_step: int, logs_dict: Any = None, client_states: Any = None) -> None:
        # Not before: the host adds up all timing/* of a step, and these go on beside the other phases.
        logs_dict = {
            f"timing/reward/{key.removeprefix(SECONDS)}" if key.startswith(SECONDS) else key: value
            for key, value in (logs_dict or {}).items()
        }
        own = {
            STATE: self.state.model_dump_json(),
            # As OpenRLHF 0.11.2 does; before, a resumed run took its first evaluation for the best.
            "best_eval_metric_key": self.best_eval_metric_key,
            "best_eval_metric_value": self.best_eval_metric_value,
        }
        super().save_logs_and_checkpoints(global_step, logs_dict, (client_states or {}) | own)

    def save_best_checkpoint(self, eval_metrics: dict[str, float], global_step: int, client_states: Any = None) -> None:
        """Rate the evaluation by --pama.best, log the rating, and save as the host does if none was better."""
        rating = rate(self.config, self.state, eval_metrics)
        self.log_eval(global_step, {BEST: rating})
        client_states = (client_states or {}) | {STATE: self.state.model_dump_json()}
        super().save_best_checkpoint(eval_metrics | {BEST: rating}, global_step, client_states)

    def log_eval(self, global_step: int, metrics: dict[str, float]) -> None:
        for logger in filter(None, (self.wandb_logger, self.tensorboard_logger)):
            logger.log_eval(global_step, metrics)


@ray.remote
class PPOTrainer(MultiObjectiveTrainer, ppo_trainer.PPOTrainer.__ray_metadata__.modified_class):
    """The synchronous trainer."""

    samples_generator: Any

    def __init__(self, pretrain: str, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        if strategy.args.train.full_determinism_enable:
            set_seed(strategy.args.train.seed)  # the prompts are shuffled here, with a seed that the host leaves open
        super().__init__(pretrain, strategy, *args, **kwargs)
        self.samples_generator = ScoredSamplesGenerator(self.samples_generator, self.experience_maker.collector)

    def end_run(self) -> None:
        """After this step's logs, checkpoint and evaluation; then the host saves the model, as at any end."""
        self.samples_generator.ended = True

    def evaluate(self, global_step: int, **generate_kwargs: Any) -> dict[str, float]:
        logs: dict[str, float] = super().evaluate(global_step, **generate_kwargs)
        own = self.samples_generator.pop_metrics()
        self.log_eval(global_step, own)
        return logs | own

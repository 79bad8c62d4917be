"""OpenRLHF's asynchronous training: a generator actor and a trainer actor, with a queue between them."""

from typing import Any

import ray
from openrlhf.trainer import ppo_trainer_async

from pama_plugin.batch.rollouts import evaluation_table
from pama_plugin.errors import RewardError
from pama_plugin.host.actors.dataset import read_columns
from pama_plugin.host.actors.evaluation import ScoredSamplesGenerator
from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker
from pama_plugin.host.actors.rollout_log import RolloutLog, log_folder
from pama_plugin.host.actors.trainer import MultiObjectiveTrainer, reachable_position
from pama_plugin.host.protocols import Strategy
from pama_plugin.runs.rollouts import EVALUATION_FILE

# Put in a slot, instead of the trainer's step, once the run is to end.
END = "end"


class EndingSlots:
    """The trainer's queue of slots once the run is to end: every slot that it returns tells the generator to end."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def put(self, _: int, block: bool = True) -> None:
        self.queue.put(END, block=block)


class EndingRollouts:
    """The trainer's queue of rollouts once the run is to end: drops rollouts, returns their slots, passes on all else.

    Slots circulate as in OpenRLHF, so neither half ever waits for one that does not come.
    """

    def __init__(self, queue: Any, slots: EndingSlots) -> None:
        self.queue, self.slots = queue, slots

    def get(self, block: bool = True) -> Any:
        while (payload := self.queue.get(block=block)) != "done" and payload[0] != "eval":
            self.slots.put(0)
        return payload


class WatchedSlots:
    """The generator's queue of slots: after END in a slot the generator finds no more prompts."""

    def __init__(self, queue: Any, samples_generator: ScoredSamplesGenerator) -> None:
        self.queue, self.samples_generator = queue, samples_generator

    def get(self, block: bool = True) -> int:
        slot = self.queue.get(block=block)
        if slot == END:
            self.samples_generator.ended = True
            return 0  # a step without an evaluation
        return int(slot)

    def put(self, slot: int, block: bool = True) -> None:
        self.queue.put(slot, block=block)


@ray.remote
class TrainingActor(MultiObjectiveTrainer, ppo_trainer_async.TrainingActor.__ray_metadata__.modified_class):
    """The half that trains."""

    rollout_slots: Any
    rollout_queue: Any

    def end_run(self) -> None:
        """Let the generator end, which ends this half too; rollouts that it still sends are not trained on."""
        self.rollout_slots = EndingSlots(self.rollout_slots)
        self.rollout_queue = EndingRollouts(self.rollout_queue, self.rollout_slots)


@ray.remote
class GenerateSamplesActor(ppo_trainer_async.GenerateSamplesActor.__ray_metadata__.modified_class):
    """The half that generates and evaluates, which needs the reward models that OpenRLHF does not pass to it."""

    rollout_slots: Any
    prompts_dataloader: Any
    eval_dataloader: Any
    samples_generator: Any

    def __init__(self, pretrain: str, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        read_columns(strategy)
        super().__init__(pretrain, strategy, *args, **kwargs)

    def begin(self, strategy: Strategy, reward_model_group: Any, steps_done: int) -> None:
        tokenizer = self.samples_generator.tokenizer
        engines = self.samples_generator.vllm_engines
        parts = (None, None, reward_model_group, None, None, strategy, tokenizer)
        maker = MultiObjectiveExperienceMaker(*parts, vllm_engines=engines)
        self.samples_generator = ScoredSamplesGenerator(self.samples_generator, maker.collector)
        self.eval_dataloader = self.samples_generator.eval_dataloader  # by its prompts OpenRLHF knows the data sets
        self.rollout_slots = WatchedSlots(self.rollout_slots, self.samples_generator)
        self.steps_done = steps_done
        self.evaluation_log = RolloutLog(log_folder(strategy.args) / EVALUATION_FILE, "pama/evaluation", None, None)

    def fit(self, episode: int, total_consumed_prompts: int) -> None:
        """Run as OpenRLHF does; a ``RewardError`` names the step that its rollout was for."""
        self.samples_generator.draw.number = total_consumed_prompts
        try:
            super().fit(episode, total_consumed_prompts)
        except RewardError as error:
            raise error.at_step(self.steps_done + self.samples_generator.batches + 1) from error

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if position := reachable_position(state_dict, len(self.prompts_dataloader)):
            super().load_state_dict(position)

    def _run_eval(self) -> dict[str, float]:
        logs: dict[str, float] = super()._run_eval()
        metrics, rows = self.samples_generator.pop(self._last_eval_step)
        self.evaluation_log.write(rows)
        print(evaluation_table(self.samples_generator.collector.config, self._last_eval_step, metrics), flush=True)
        return logs | metrics


@ray.remote
class PPOTrainerAsync(ppo_trainer_async.PPOTrainerAsync.__ray_metadata__.modified_class):
    """Starts the two halves, and passes the reward models to the generator for evaluations."""

    def __init__(self, pretrain: str, strategy: Strategy, *groups_and_engines: Any, **generate_kwargs: Any) -> None:
        super().__init__(pretrain, strategy, *groups_and_engines, **generate_kwargs)
        self.strategy = strategy
        _, _, self.reward_model_group, *_ = groups_and_engines

    def fit(self) -> None:
        states = ray.get(self.trainer_actor.init_checkpoint_states.remote())
        ray.get(self.generator_actor.begin.remote(self.strategy, self.reward_model_group, states["global_step"]))
        super().fit()

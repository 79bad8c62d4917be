"""The host's asynchronous training: a generator and a trainer, each an actor of its own, with a queue between them."""

from typing import Any

import ray
from openrlhf.trainer import ppo_trainer_async

from pama_plugin.errors import RewardError
from pama_plugin.host.actors.evaluation import ScoredSamplesGenerator
from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker
from pama_plugin.host.actors.trainer import MultiObjectiveTrainer
from pama_plugin.host.protocols import Strategy

# What stands in a slot instead of the trainer's step once the run is to end.
END = "end"


class EndingSlots:
    """The queue of slots, as the trainer sees it once the run is to end: what it gives back tells the generator so."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def put(self, _: int, block: bool = True) -> None:
        self.queue.put(END, block=block)


class EndingRollouts:
    """The queue of rollouts, then: they are dropped and their slots given back, all else is received.

    Slots go round as they do for the host, so neither half ever waits for one that does not come.
    """

    def __init__(self, queue: Any, slots: EndingSlots) -> None:
        self.queue, self.slots = queue, slots

    def get(self, block: bool = True) -> Any:
        while (payload := self.queue.get(block=block)) != "done" and payload[0] != "eval":
            self.slots.put(0)
        return payload


class WatchedSlots:
    """The queue of slots, as the generator sees it: after END in one of them it finds no more prompts."""

    def __init__(self, queue: Any, samples_generator: ScoredSamplesGenerator) -> None:
        self.queue, self.samples_generator = queue, samples_generator

    def get(self, block: bool = True) -> int:
        slot = self.queue.get(block=block)
        if slot == END:
            self.samples_generator.ended = True
            return 0  # no step that asks for an evaluation
        return int(slot)

    def put(self, slot: int, block: bool = True) -> None:
        self.queue.put(slot, block=block)


@ray.remote
class TrainingActor(MultiObjectiveTrainer, ppo_trainer_async.TrainingActor.__ray_metadata__.modified_class):
    """The half that trains."""

    rollout_slots: Any
    rollout_queue: Any

    def end_run(self) -> None:
        """Let the generator come to its end, which ends this half too; nothing that it still sends is trained on."""
        self.rollout_slots = EndingSlots(self.rollout_slots)
        self.rollout_queue = EndingRollouts(self.rollout_queue, self.rollout_slots)


@ray.remote
class GenerateSamplesActor(ppo_trainer_async.GenerateSamplesActor.__ray_metadata__.modified_class):
    """The half that generates, and evaluates: so it needs the reward models, which the host does not give it."""

    rollout_slots: Any
    samples_generator: Any

    def begin(self, strategy: Strategy, reward_model_group: Any, steps_done: int) -> None:
        tokenizer = self.samples_generator.tokenizer
        engines = self.samples_generator.vllm_engines
        parts = (None, None, reward_model_group, None, None, strategy, tokenizer)
        maker = MultiObjectiveExperienceMaker(*parts, vllm_engines=engines)
        self.samples_generator = ScoredSamplesGenerator(self.samples_generator, maker.collector)
        self.rollout_slots = WatchedSlots(self.rollout_slots, self.samples_generator)
        self.steps_done = steps_done

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """As the host's; a reward that fails is reported with the step that its rollout was for."""
        try:
            super().fit(*args, **kwargs)
        except RewardError as error:
            raise error.at_step(self.steps_done + self.samples_generator.batches + 1) from error

    def _run_eval(self) -> dict[str, float]:
        logs: dict[str, float] = super()._run_eval()
        return logs | self.samples_generator.pop_metrics()


@ray.remote
class PPOTrainerAsync(ppo_trainer_async.PPOTrainerAsync.__ray_metadata__.modified_class):
    """Starts the two halves, and gives the generator what it scores evaluations with."""

    def __init__(self, pretrain: str, strategy: Strategy, *groups_and_engines: Any, **generate_kwargs: Any) -> None:
        super().__init__(pretrain, strategy, *groups_and_engines, **generate_kwargs)
        self.strategy = strategy
        _, _, self.reward_model_group, *_ = groups_and_engines

    def fit(self) -> None:
        states = ray.get(self.trainer_actor.init_checkpoint_states.remote())
        ray.get(self.generator_actor.begin.remote(self.strategy, self.reward_model_group, states["global_step"]))
        super().fit()

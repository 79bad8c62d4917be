"""The host's asynchronous training: a generator and a trainer, each an actor of its own, with a queue between them."""

import threading
from typing import Any

import ray
from openrlhf.trainer import ppo_trainer_async

from pama_plugin.errors import RewardError
from pama_plugin.host.evaluation import ScoredSamplesGenerator
from pama_plugin.host.experience import MultiObjectiveExperienceMaker
from pama_plugin.host.trainer import MultiObjectiveTrainer

SECONDS_BETWEEN_LOOKS = 5


@ray.remote
class TrainingActor(MultiObjectiveTrainer, ppo_trainer_async.TrainingActor.__ray_metadata__.modified_class):
    """The half that trains."""

    failure: BaseException | None = None

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """As the host's, and remember why it ended."""
        try:
            super().fit(*args, **kwargs)
        except Exception as error:
            self.failure = error
            raise

    def get_failure(self) -> BaseException | None:
        """Answered between two other calls: so not before ``fit`` has ended, once it runs."""
        return self.failure


@ray.remote
class GenerateSamplesActor(ppo_trainer_async.GenerateSamplesActor.__ray_metadata__.modified_class):
    """The half that generates, and evaluates: so it needs the reward models, which the host does not give it."""

    def begin(self, strategy: Any, reward_model_group: Any, steps_done: int) -> None:
        tokenizer = self.samples_generator.tokenizer
        maker = MultiObjectiveExperienceMaker(None, None, reward_model_group, None, None, strategy, tokenizer)
        self.samples_generator = ScoredSamplesGenerator(self.samples_generator, maker)
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
    """Ends the run when one of its two halves ends."""

    def __init__(self, pretrain: str, strategy: Any, *groups_and_engines: Any, **generate_kwargs: Any) -> None:
        super().__init__(pretrain, strategy, *groups_and_engines, **generate_kwargs)
        self.strategy = strategy
        _, _, self.reward_model_group, *_ = groups_and_engines
        self.failure: BaseException | None = None

    def fit(self) -> None:
        """As the host's, which waits for the generator first: of a dead trainer it would never hear."""
        states = ray.get(self.trainer_actor.init_checkpoint_states.remote())
        ray.get(self.generator_actor.begin.remote(self.strategy, self.reward_model_group, states["global_step"]))
        finished = threading.Event()
        threading.Thread(target=self._watch, args=(finished,), daemon=True).start()
        try:
            super().fit()
        except Exception as error:
            raise (self.failure or error) from None  # the first is why the watcher ended the generator
        finally:
            finished.set()

    def _watch(self, finished: threading.Event) -> None:
        while not finished.wait(SECONDS_BETWEEN_LOOKS):
            try:
                self.failure = ray.get(self.trainer_actor.get_failure.remote())
            except ray.exceptions.RayError as error:
                self.failure = error
            if self.failure is not None:
                ray.kill(self.generator_actor)
                return

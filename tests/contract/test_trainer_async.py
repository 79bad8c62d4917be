"""The two halves of asynchronous training: when one fails the run ends, with the failure of that one."""

import pytest

from pama_plugin.errors import RewardError

pytestmark = pytest.mark.contract


@pytest.fixture
def trainer(local_ray):
    """Our ``PPOTrainerAsync`` around two stand-ins, whose ``fit`` fails, waits for ever or ends."""
    import ray

    from pama_plugin.host import trainer_async

    @ray.remote(num_cpus=0)
    class Half:
        def __init__(self, ending):
            self.ending = ending

        def init_checkpoint_states(self):
            return {"episode": 0, "global_step": 0, "total_consumed_prompts": 0}

        def restore_best_checkpoint_state(self, states): ...

        def begin(self, strategy, groups, steps_done): ...

        def fit(self, *_, **__):
            import os
            import time

            if self.ending == "waits":
                time.sleep(3600)
            if self.ending == "dies":
                os._exit(1)
            if self.ending == "fails":
                raise RewardError("length", "returned nan", "a response", 3)

    def make(generator: str, training: str):
        kind = trainer_async.PPOTrainerAsync.__ray_metadata__.modified_class
        made = kind.__new__(kind)
        made.generator_actor, made.trainer_actor = Half.remote(generator), Half.remote(training)
        made.strategy = made.reward_model_group = None
        return made

    return make


@pytest.mark.parametrize(("generator", "training"), [("waits", "fails"), ("fails", "waits")])
def test_a_half_that_fails_ends_the_run_with_its_failure(generator, training, trainer) -> None:
    with pytest.raises(RewardError, match="objective 'length' at step 3: returned nan"):
        trainer(generator, training).fit()


def test_a_trainer_that_dies_ends_the_run(trainer) -> None:
    import ray

    with pytest.raises(ray.exceptions.RayActorError):
        trainer("waits", "dies").fit()


def test_a_run_that_ends_well(trainer) -> None:
    trainer("ends", "ends").fit()

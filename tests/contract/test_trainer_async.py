"""The two halves of asynchronous training: when one fails the run ends, with the failure of that one."""

import pytest

from pama_plugin.errors import RewardError

pytestmark = pytest.mark.contract


@pytest.fixture
def trainer(local_ray):
    """Our ``PPOTrainerAsync`` around two stand-ins, whose ``fit`` fails, waits for ever or ends."""
    import ray

    from pama_plugin.host.actors import trainer_async

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


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("last", [1, 3, 4, 5])
@pytest.mark.parametrize("empty", [False, True], ids=["", "with empty rollouts"])
def test_a_run_that_ends_at_the_front_lets_both_halves_end(size, last, empty, monkeypatch) -> None:
    """The host's own two loops in two threads, with five batches in two episodes and evaluations in between."""
    import queue
    import threading
    import time
    from types import SimpleNamespace
    from unittest import mock

    from openrlhf.trainer import ppo_trainer_async as host

    from pama_plugin.host.actors import trainer_async
    from pama_plugin.host.actors.trainer import MultiObjectiveTrainer

    monkeypatch.setattr(host, "ray", mock.Mock(get=lambda value: value))
    slots, rollouts, steps = queue.Queue(size), queue.Queue(size), []
    for _ in range(size):
        slots.put(0)

    def half(kind, **attributes):
        made = kind.__new__(kind)
        vars(made).update(rollout_slots=slots, rollout_queue=rollouts, vllm_lock=mock.Mock(), _partial_rollout=False)
        vars(made).update(attributes)
        return made

    batches = [[1], [], [2], [3], [4], [], [5]] if empty else [[1], [2], [3], [4], [5]]

    class Generator:
        ended, draw = False, mock.Mock()

        def generate_samples(self):
            if self.ended:
                return [], None, 0, True
            time.sleep(0.002)
            batch = batches.pop(0)
            return batch, None, len(batch), batch == [3] or not batches

    samples = Generator()
    generator = half(
        trainer_async.GenerateSamplesActor.__ray_metadata__.modified_class,
        samples_generator=samples,
        prompts_dataloader=mock.MagicMock(),
        eval_dataloader=[],
        generate_kwargs={},
        args=SimpleNamespace(train=SimpleNamespace(num_episodes=2), eval=SimpleNamespace(steps=2)),
        _last_eval_step=-1,
        _eval_just_done=False,
        _run_eval=dict,
    )
    generator.rollout_slots = trainer_async.WatchedSlots(slots, samples)

    class Training(trainer_async.TrainingActor.__ray_metadata__.modified_class):
        def train_step(self, samples, step):
            time.sleep(0.002)
            steps.append(samples)
            if len(steps) == last:
                self.end_run()
            return {}, step + 1

        def save_logs_and_checkpoints(self, *_): ...

        def save_best_checkpoint(self, *_): ...

    args = SimpleNamespace(algo=SimpleNamespace(dynamic_filtering_enable=False))
    training = half(Training, args=args, wandb_logger=None, tensorboard_logger=None)
    threads = [
        threading.Thread(target=generator.fit, kwargs=dict(episode=0, total_consumed_prompts=0), daemon=True),
        threading.Thread(target=super(MultiObjectiveTrainer, training).fit, daemon=True),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert steps == [[number] for number in range(1, last + 1)]


@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
def test_partial_rollouts_go_on_while_weights_are_sent(partial, monkeypatch) -> None:
    """The halves take turns under a lock; with partial rollouts generation takes none, and the engines pause."""
    from types import SimpleNamespace
    from unittest import mock

    from openrlhf.trainer import ppo_trainer_async as host

    from pama_plugin.host.actors import trainer_async

    order = []

    def note(name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda: order.append(name))

    def half(kind, **attributes):
        made = kind.__ray_metadata__.modified_class
        made = made.__new__(made)
        lock = SimpleNamespace(acquire=note("acquire"), release=note("release"))
        vars(made).update(vllm_lock=lock, _partial_rollout=partial, vllm_engines=[], **attributes)
        return made

    def generate(**_):
        order.append("generate")
        return [1], None, 1, True

    monkeypatch.setattr(host, "ray", mock.Mock(get=lambda value: value))
    monkeypatch.setattr(host, "batch_vllm_engine_call", lambda engines, call: order.append(call))
    monkeypatch.setattr(host.BasePPOTrainer, "broadcast_to_vllm", lambda self: order.append("weights"))
    half(
        trainer_async.GenerateSamplesActor,
        samples_generator=SimpleNamespace(generate_samples=generate, batches=0, draw=mock.Mock()),
        prompts_dataloader=mock.MagicMock(),
        eval_dataloader=None,
        generate_kwargs={},
        args=SimpleNamespace(train=SimpleNamespace(num_episodes=1)),
        rollout_slots=mock.Mock(),
        rollout_queue=mock.Mock(),
        steps_done=0,
    ).fit(episode=0, total_consumed_prompts=0)
    assert order == (["generate"] if partial else ["acquire", "generate", "release"])

    order.clear()
    half(trainer_async.TrainingActor).broadcast_to_vllm()
    sent = ["pause_generation", "weights", "resume_generation"] if partial else ["weights"]
    assert order == ["acquire", *sent, "release"]


def test_a_run_that_ends_well(trainer) -> None:
    trainer("ends", "ends").fit()

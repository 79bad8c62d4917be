"""A run that is killed and resumed is the run that was never killed."""

import shutil
import signal

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


def test_killed_and_resumed_equals_uninterrupted(run_host, models, tmp_path, check_value_heads) -> None:
    """With value heads and bfloat16 under ZeRO-2.

    Random numbers depend on seed and step alone with --train.full_determinism_enable, so rollouts are the same ones.

    The killed run is uninterrupted up to its last step; the resumed one, which starts two steps before, makes these
    again. To float32 rounding: sums run in another order where processes split their threads differently.
    """
    flags = [
        *"--train.full_determinism_enable --ckpt.save_steps 1 --ckpt.max_num 9 --critic.lr_scheduler constant".split(),
        *"--algo.advantage.estimator gae --train.batch_size 4 --ds.value_head_prefix score".split(),
        *"--critic.adam.lr 1e-2 --critic.save_value_network --ds.zero_stage 2 --ds.param_dtype bf16".split(),
        *("--loss", "lagrangian", "--pama.option", "rate=0.05", "--pama.objective", f"helpful=rm:{models}/helpful"),
        *("--pama.objective", "length=builtin:length,scale=12,role=constraint,threshold=2"),
    ]
    # Only this run takes gradients for its logs; that the other equals it shows that doing so changes nothing.
    killed = run_host(*flags, "--pama.probe_gradients", "2", steps=6, kill_after=4)
    assert killed.status == -signal.SIGKILL and max(killed.by_step) in (4, 5), killed.output[-5000:]
    probed = [step for step, found in killed.by_step.items() if "pama/gradient_gram/length" in found]
    assert probed == [step for step in killed.by_step if step % 2]

    # As if the critic had not been saved since: the policy must go back, too.
    critic = tmp_path / "checkpoints" / "_critic"
    for step in range(3, 6):
        shutil.rmtree(critic / f"global_step{step}", ignore_errors=True)
    resumed = run_host(*flags, "--ckpt.load_enable", steps=6)
    assert resumed.status == 0 and list(resumed.by_step) == [3, 4, 5, 6], resumed.output[-5000:]
    assert f"PAMA: the last save was cut off; resuming from {critic / 'global_step2'}" in resumed.output

    check_value_heads(killed.by_step | resumed.by_step, ["helpful", "length"], tmp_path)
    integrals = [step["pama/integral/length"] for step in (killed.by_step | resumed.by_step).values()]
    assert 1 < integrals[0] < integrals[-1] < 10 and integrals == sorted(integrals), "it is never long enough"
    for step in (3, 4):
        for key, value in resumed.by_step[step].items():
            if not key.startswith(("timing/", "seconds/")):
                expected = pytest.approx(killed.by_step[step][key], rel=1e-4, abs=1e-5, nan_ok=True)
                assert value == expected, f"{key} at step {step}"

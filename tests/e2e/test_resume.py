"""A run that is killed and resumed is the run that was never killed."""

import signal

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


def test_killed_and_resumed_equals_uninterrupted(run_host, models, tmp_path) -> None:
    """Random numbers depend on seed and step alone with --train.full_determinism_enable, so rollouts are the same ones.

    To float32 rounding: sums run in another order where processes split their threads differently.
    """
    flags = [
        *"--train.full_determinism_enable --ckpt.save_steps 1 --ckpt.max_num 2 --critic.lr_scheduler constant".split(),
        *"--algo.advantage.estimator gae --train.batch_size 4 --ds.value_head_prefix score".split(),
        *("--loss", "lagrangian", "--pama.option", "rate=0.05", "--pama.objective", f"helpful=rm:{models}/helpful"),
        *("--pama.objective", "length=builtin:length,scale=12,role=constraint,threshold=2"),
    ]
    # Only this run takes gradients for its logs; that the others equal it shows that doing so changes nothing.
    whole = run_host(*flags, "--pama.probe_gradients", "2", "--ckpt.path", str(tmp_path / "whole"), steps=6)
    assert whole.status == 0 and list(whole.by_step) == [1, 2, 3, 4, 5, 6], whole.output[-5000:]

    multipliers = [step["pama/multiplier/length"] for step in whole.by_step.values()]
    assert 1 < multipliers[0] < multipliers[-1] < 100 and multipliers == sorted(multipliers), "it is never long enough"
    assert [step for step, found in whole.by_step.items() if "pama/gradient_cosine/length" in found] == [1, 3, 5]

    killed = run_host(*flags, steps=6, kill_after=3)
    assert killed.status == -signal.SIGKILL and max(killed.by_step) < 6
    resumed = run_host(*flags, "--ckpt.load_enable", steps=6)
    assert resumed.status == 0, resumed.output[-5000:]
    assert min(resumed.by_step) in (3, 4) and max(resumed.by_step) == 6

    for run in (killed, resumed):
        for step, metrics in run.by_step.items():
            for key, value in metrics.items():
                if not key.startswith(("timing/", "seconds/")):
                    expected = pytest.approx(whole.by_step[step][key], rel=1e-4, abs=1e-5, nan_ok=True)
                    assert value == expected, f"{key} at step {step}"

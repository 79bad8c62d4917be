"""PPO with one value head per objective, on the real stack."""

import pytest
from safetensors import safe_open

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(700)]


def test_two_value_heads_learn_and_are_saved_with_zero_3(run_host, models, tmp_path) -> None:
    flags = [
        *("--algo.advantage.estimator", "gae", "--train.batch_size", "4", "--ds.value_head_prefix", "score"),
        *("--critic.adam.lr", "1e-2", "--critic.lr_scheduler", "constant", "--critic.save_value_network"),
        *("--loss", "pama", "--pama.objective", f"helpful=rm:{models}/helpful"),
        *("--pama.objective", "length=builtin:length,scale=12"),
    ]
    run = run_host(*flags, "--ds.zero_stage", "3", steps=6)
    assert run.status == 0, run.output[-5000:]
    assert "2 objectives, policy 1/1, critic 1/1, reward groups 1/1" in run.output
    for step in run.steps:
        losses = [step[f"critic_loss/{name}"] for name in ("helpful", "length")]
        assert step["critic_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
        assert all(f"explained_variance/{name}" in step for name in ("helpful", "length"))
    # Nearly all responses earn a length reward of 1: the second head, new and close to 0, must learn that.
    assert run.steps[-1]["critic_loss/length"] < 0.2 * run.steps[0]["critic_loss/length"]
    with safe_open(tmp_path / "model_critic" / "value_heads.safetensors", "pt") as file:
        assert file.metadata()["objectives"] == '["helpful", "length"]'
        assert file.get_tensor("value_heads").shape == (2, 64)

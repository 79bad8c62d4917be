"""The host's training modes with several objectives, as many at once as one run can show."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hosttools import evaluations
from safetensors.torch import load_file

from pama_plugin.runs.rollouts import read_rollouts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(700)]

GROUPS = "--algo.advantage.estimator reinforce_baseline --rollout.n_samples_per_prompt 4 --train.batch_size 16".split()


def test_colocated_models_under_zero_3_on_two_ranks_with_three_value_heads_and_evaluation(
    run_host, models, tmp_path, check_value_heads
) -> None:
    run = run_host(
        *"--train.colocate_all --actor.num_gpus_per_node 2 --ref.num_gpus_per_node 2 --vllm.num_engines 2".split(),
        *"--critic.num_gpus_per_node 2 --ds.enable_sleep --ds.value_head_prefix score --train.batch_size 8".split(),
        *"--algo.advantage.estimator gae --algo.kl.use_loss --algo.kl.estimator k3 --actor.dual_clip 3".split(),
        *"--rollout.batch_size 8 --data.max_samples 48 --rollout.micro_batch_size 2 --train.micro_batch_size 2".split(),
        *"--ds.zero_stage 3 --critic.adam.lr 1e-2 --critic.lr_scheduler constant --critic.save_value_network".split(),
        *f"--eval.dataset {models}/held_out.jsonl --eval.steps 3 --eval.n_samples_per_prompt 2".split(),
        *("--loss", "pama", "--pama.level", "batch", "--pama.best", "weighted", "--pama.probe_gradients", "2"),
        *("--pama.objective", f"helpful=rm:{models}/helpful,gpus=2"),
        *("--pama.objective", f"harmless=rm:{models}/harmless,gpus=1,weight=2"),
        *("--pama.objective", "length=builtin:length,scale=12"),
        steps=6,
    )
    assert run.status == 0, run.output[-5000:]
    assert "3 objectives, policy 2/2, critic 2/2, reward groups 2/2, reference 2/2, rollout 2/2" in run.output
    assert len(run.steps) == 6 and all("critic_loss/harmless" in step for step in run.steps)
    assert "PAMA plan: 2 of 8 GPUs" in run.output, "not all models shared the GPUs of the policy"
    probed = [{key for key in step if key.startswith("pama/gradient_")} for step in run.steps]
    pairs = ("helpful", "harmless", "length", "helpful/harmless", "helpful/length", "harmless/length")
    assert all({f"pama/gradient_gram/{pair}" for pair in pairs} <= keys for keys in probed[::2])
    assert all(step["pama/gradient_min_norm_floor"] > 0 for step in run.steps[::2]), "sketches of shards are not empty"
    assert not any(probed[1::2])
    check_value_heads(run.by_step, ["helpful", "harmless", "length"], tmp_path)

    logged = evaluations(tmp_path)
    for name in ("helpful", "harmless", "length"):
        assert len(logged[f"eval_default/{name}"]) == len(logged[f"eval_default/{name}_se"]) == 2
        assert logged[f"eval_default/{name}"] == logged[f"eval_all/{name}"]
    each = zip(*(logged[f"eval_default/{name}"] for name in ("helpful", "harmless", "length")))
    totals = [a + 2 * b + c for a, b, c in each]
    assert logged["eval_pama_best"] == pytest.approx(totals, rel=1e-4)
    assert logged["eval_default_pass1"] == pytest.approx(totals, rel=1e-4)
    best = 3 if totals[0] >= totals[1] else 6
    for role in ("_actor", "_critic"):
        metric = json.loads((tmp_path / "checkpoints" / role / f"best_global_step{best}" / "metric.json").read_text())
        assert metric["metric_key"] == "eval_pama_best"


def test_dynamic_filtering_muon_and_ema_do_what_they_say_through_pama_train(run_host, models, tmp_path) -> None:
    """Only groups whose mean weighted sum lies between the bounds are trained on: here, those of uneven length.

    A rollout of 32 responses is one optimizer step; a last one that filtering left smaller is none.
    """
    run = run_host(
        *"--algo.advantage.estimator reinforce_baseline --actor.policy_loss_type gspo --algo.kl.init_coef 0".split(),
        *"--rollout.n_samples_per_prompt 8 --train.batch_size 32 --data.max_samples 64".split(),
        *"--algo.dynamic_filtering_enable --algo.dynamic_filtering_range 0 2.99 --pama.filter_by sum".split(),
        *"--actor.optim muon --actor.muon.lr 1e-3 --train.enable_ema --train.ema_beta 0.75".split(),
        *"--reward.overlong_buffer_len 4 --reward.stop_properly_penalty_coef 0.5".split(),
        *"--ckpt.save_steps 1 --ckpt.max_num 99".split(),
        *("--loss", "pama", "--pama.objective", "length=builtin:length,scale=12,weight=2"),
        *("--pama.objective", "half=builtin:length,scale=6,max=1"),
        steps=1,
        command=[str(Path(sys.executable).with_name("pama")), "train"],
    )
    assert run.status == 0, run.output[-5000:]
    rates = [step["dynamic_filtering_pass_rate"] for step in run.steps]  # 800: all groups of eight
    assert 0 < min(rates) < 800 and max(rates) <= 800
    assert all(2 * step["reward/length"] + step["reward/half"] < 2.99 for step in run.steps)

    start, averaged = (load_file(folder / "model.safetensors") for folder in (models / "policy", tmp_path / "model"))
    policies = [start]
    for step in run.by_step:
        file = tmp_path / "checkpoints" / "_actor" / f"global_step{step}" / "mp_rank_00_model_states.pt"
        module = torch.load(file, weights_only=False)["module"]
        if any((module[name] != policies[-1][name]).any() for name in start):
            policies.append({name: module[name] for name in start})
    assert len(policies) > 1, "no step was a whole one"
    # Muon: the first step turns all directions of a matrix by the same angle, to within the five Newton-Schulz
    # iterations. Adam's step, about the same for each entry, has singular values that differ many times over.
    for name in start:
        if ".mlp." in name:
            values = torch.linalg.svdvals(policies[1][name] - start[name])
            assert 0 < values.max() < 2 * values.min(), name
    # What is saved is not the last policy but the average of all, each later one with a share of a quarter.
    expected = start
    for policy in policies[1:]:
        expected = {name: 0.75 * expected[name] + 0.25 * policy[name] for name in start}
    for name in start:
        torch.testing.assert_close(averaged[name], expected[name], rtol=0, atol=5e-7)
        assert not torch.allclose(averaged[name], policies[-1][name], rtol=0, atol=2e-6), name


def test_asynchronous_training_evaluation_and_the_end_at_the_front(run_host, models, tmp_path) -> None:
    """A reward and its opposite agree for three steps, then disagree on every response: the run is at the front."""
    (tmp_path / "rewards.py").write_text(
        "calls = 0\n\n\ndef longer(queries, prompts, labels):\n    return [len(query) for query in queries]\n\n\n"
        "def changing(queries, prompts, labels):\n    global calls\n    calls += 1\n"
        "    return [len(query) if calls <= 48 else -len(query) for query in queries]\n"
    )
    run = run_host(
        *GROUPS,
        *("--train.async_enable", "--train.partial_rollout_enable", "--algo.advantage.is_correction_level", "token"),
        *f"--eval.dataset {models}/held_out.jsonl --eval.steps 2 --eval.n_samples_per_prompt 2".split(),
        *("--loss", "pama", "--pama.probe", "off", "--pama.stop_at_front", "0.1:3"),
        *("--pama.objective", f"helpful=rm:{models}/helpful,role=monitor"),
        *("--pama.objective", f"longer=py:{tmp_path}/rewards.py:longer"),
        *("--pama.objective", f"changing=py:{tmp_path}/rewards.py:changing,isolate=false"),
        steps=12,
    )
    assert run.status == 0, run.output[-5000:]
    assert "3 objectives, policy 1/1, critic –, reward groups 1/1, reference 1/1, rollout 1/1" in run.output
    assert all({"reward/helpful", "pama/gain/longer"} <= set(step) for step in run.steps)
    # While a step is trained the next rollout is made, by the policy of the step before: the two then differ about its
    # tokens. In synchronous training they agree, as the run of all six kinds shows. The first rollout is of the start.
    behind = [step["vllm_kl"] for step in run.steps]
    assert abs(behind[0]) < 1e-3 < max(map(abs, behind[1:]))

    last = len(run.steps)
    assert f"the run ends after step {last}, at the front: fewer than 0.1 of the tokens had an advantage" in run.output
    assert [step["pama/steps_at_front"] for step in run.steps[-4:]] == [0, 1, 2, 3] and 5 <= last < 12
    assert {rollout.step for rollout in read_rollouts(tmp_path / "logs")} == set(range(1, last + 1))
    (settings,) = (tmp_path / "logs").glob("*/pama.yaml")
    assert list(yaml.safe_load(settings.read_text())["objectives"]) == ["helpful", "longer", "changing"]
    logged = evaluations(tmp_path)
    assert len(logged["eval_default/helpful"]) == len(logged["eval_pama_best"]) >= 2
    assert logged["eval_default/longer"][-1] == -logged["eval_default/changing"][-1]
    assert list((tmp_path / "checkpoints" / "_actor").glob("best_global_step*"))
    assert (tmp_path / "model" / "config.json").exists()

"""One policy for every preference: weights are drawn, written into the prompt, followed by the rule and evaluated."""

import json
import shutil
import subprocess
from collections import Counter

import pytest
import torch
from hosttools import ALL_MODES, ROLLOUT_MODES, by_hand, evaluations, rollout_modes
from safetensors.torch import load_file, save_file

from pama_plugin.runs.rollouts import EVALUATION_FILE, read_rollouts
from pama_plugin.settings.preferences import parse_preferences, simplex_grid

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(700)]

SEED = 11

VOWELS = """
def vowels(queries, prompts, labels):
    assert not any(text.startswith("[") for text in (*queries, *prompts)), (queries, prompts)
    return [sum(letter in "aeiou" for letter in query) / 10 for query in queries]
"""


@pytest.mark.parametrize("mode", rollout_modes("eight minutes"))
def test_one_policy_for_every_preference(mode, run_host, models, tmp_path) -> None:
    (tmp_path / "vowels.py").write_text(VOWELS)
    objectives = {
        "helpful": f"rm:{models}/helpful",
        "polite": f"hf:{models}/polite,label=polite",
        "vowels": f"py:{tmp_path}/vowels.py:vowels",
    }
    if mode == "dynamic filtering":  # of what is scored in the rollout
        objectives = {
            "long": "builtin:length",
            "vowels": objectives["vowels"],
            "helpful": f"{objectives['helpful']},role=monitor",
        }
    trained = [name for name, spec in objectives.items() if "monitor" not in spec]
    flags = (
        *ROLLOUT_MODES[mode].split(),
        *f"--loss linear --pama.preferences dirichlet:0.5 --pama.eval_preferences 3 --train.seed {SEED}".split(),
        *"--rollout.n_samples_per_prompt 4 --train.batch_size 16 --ckpt.save_steps 2 --pama.probe off".split(),
        *f"--eval.dataset {models}/held_out.jsonl --eval.steps 2 --eval.n_samples_per_prompt 2".split(),
        *"--pama.log_rollouts all --algo.kl.init_coef 0".split(),
        *(word for name, spec in objectives.items() for word in ("--pama.objective", f"{name}={spec}")),
    )
    run = run_host(*flags, "--data.max_samples", "16", steps=4)
    assert run.status == 0, run.output[-5000:]
    assert "PAMA evaluation, step" in run.output and "rank correlation with weight" in run.output
    check_draws(tmp_path, trained, range(1, 5), mode)
    for step in run.steps:
        assert sum(step[f"pama/preference/{name}"] for name in trained) == pytest.approx(1, rel=1e-3)
        assert any(f"pama/follows/{name}" in step for name in trained)
    logged = evaluations(tmp_path)
    grid = ["_".join(f"{weight:.3g}" for weight in weights) for weights in simplex_grid(len(trained), 3)]
    assert {f"eval_preference/{label}/{name}" for label in grid for name in objectives} <= set(logged)
    assert {f"eval_default/{name}" for name in objectives} <= set(logged), "the data set of held-out prompts is known"
    assert all(rating >= 0 for rating in logged["eval_pama_best"])
    if not ALL_MODES:
        return  # the resume costs another minute
    resumed = run_host(*flags, "--ckpt.load_enable", "--data.max_samples", "24", steps=6)
    assert resumed.status == 0, resumed.output[-5000:]
    assert list(resumed.by_step) == [5, 6]
    check_draws(tmp_path, trained, range(5, 7), mode)
    if mode == "value heads":
        only_evaluated(run_host, tmp_path, flags, 3 * len(grid) * 2)


def only_evaluated(run_host, folder, flags: tuple[str, ...], responses: int) -> None:
    """The policy of the checkpoint, with the same flags: no step, no model, and one more evaluation of step 6."""
    shutil.rmtree(folder / "model")
    run = run_host(*flags, "--ckpt.load_enable", "--pama.evaluate_only", "--data.max_samples", "24", steps=6)
    assert run.status == 0, run.output[-5000:]
    assert not run.by_step and not (folder / "model").exists()
    assert "PAMA evaluation, step 6" in run.output and "rank correlation with weight" in run.output
    of_step = [each for each in read_rollouts(folder / "logs", EVALUATION_FILE) if each.step == 6]
    assert len(of_step) == responses


def check_draws(folder, names: list[str], steps: range, mode: str) -> None:
    """Every response has the weights of its prompt's number, in its text and in the combination."""
    source = parse_preferences("dirichlet:0.5")
    for step in steps:
        rollouts = [each for each in read_rollouts(folder / "logs") if each.step == step]
        assert len(rollouts) == 16
        drawn = [source.draw(number, SEED, len(names)) for number in range(4 * (step - 1), 4 * step)]
        expected = {tuple(round(weight * len(names), 4) for weight in weights) for weights in drawn}
        found = Counter(tuple(round(each.weights[name], 4) for name in names) for each in rollouts)
        assert set(found.values()) == {4}, "all responses to a prompt have the same"
        if mode != "partial rollouts":  # where a prompt may be answered in a later step
            for weights in found:
                assert any(weights == pytest.approx(each, abs=2e-4) for each in expected), (step, weights, expected)
        for each in rollouts:
            shares = ", ".join(f"{name} {each.weights[name] / len(names):.2f}" for name in names)
            assert json.dumps(each.prompt).startswith(json.dumps(f"[{shares}]\n")[:-1])


@by_hand("three minutes")  # the unit tests have the same command, with a stand-in for the host
def test_soups_of_two_policies_are_evaluated_by_the_host(environment, ray_address, models, tmp_path) -> None:
    """Of the policy with itself, moved by 0 and by as much as changes what it writes."""
    other = tmp_path / "other"
    shutil.copytree(models / "policy", other)
    tensors = load_file(other / "model.safetensors")
    moved = {key: tensor + 0.5 * tensor.std() * torch.randn_like(tensor) for key, tensor in tensors.items()}
    save_file(moved, other / "model.safetensors", metadata={"format": "pt"})
    flags = f"""
        --loss linear --pama.objective length=builtin:length --pama.objective helpful=rm:{models}/helpful
        --eval.dataset {models}/held_out.jsonl --eval.n_samples_per_prompt 2 --data.input_key prompt
        --data.prompt_dataset {models}/prompts.jsonl --data.max_len 64
        --rollout.max_new_tokens 12 --rollout.batch_size 4 --pama.probe off
        --rollout.micro_batch_size 4 --train.micro_batch_size 4 --train.batch_size 4 --actor.num_gpus_per_node 1
        --ref.num_gpus_per_node 1 --reward.num_gpus_per_node 1 --vllm.num_engines 1 --vllm.enforce_eager
        --vllm.sync_backend gloo --vllm.gpu_memory_utilization 0.1 --ds.attn_implementation eager --ds.zero_stage 2
        --ds.param_dtype fp32 --algo.advantage.estimator reinforce --ckpt.output_dir {tmp_path}/unused
    """.split()
    command = ["pama", "soup", str(models / "policy"), str(other), "--out", str(tmp_path / "soups"), "--points", "2"]
    finished = subprocess.run(
        [*command, "--", *flags],
        env=environment | {"RAY_ADDRESS": ray_address},
        capture_output=True,
        text=True,
        timeout=500,
    )
    log = "\n".join(file.read_text()[-3000:] for file in (tmp_path / "soups").glob("*/run.log"))
    assert finished.returncode == 0, finished.stdout + finished.stderr + log
    soups = json.loads((tmp_path / "soups" / "soups.json").read_text())["soups"]
    assert [soup["weights"] for soup in soups] == [[1, 0], [0, 1]]
    first, last = (soup["rewards"]["helpful"]["mean"] for soup in soups)
    assert first != last and not (tmp_path / "unused").exists()

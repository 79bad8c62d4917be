"""A policy with LoRA adapters on the whole stack."""

import subprocess
import sys

import pytest
import torch
from hosttools import ALL_MODES, by_hand
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(700)]


def test_adapters_are_trained_sent_saved_and_resumed_with_zero_3_on_two_ranks(run_host, models, tmp_path) -> None:
    flags = (
        *"--ds.lora.rank 4 --ds.lora.alpha 8 --ds.zero_stage 3 --actor.num_gpus_per_node 2".split(),
        *"--algo.advantage.estimator gae --train.batch_size 8 --rollout.batch_size 8".split(),
        *"--rollout.micro_batch_size 2 --train.micro_batch_size 2 --actor.adam.lr 1e-1".split(),
        *"--algo.kl.use_loss --algo.kl.estimator k2 --algo.kl.init_coef 1e-3".split(),
        *"--algo.advantage.is_correction_level token --ds.value_head_prefix score --ckpt.save_steps 3".split(),
        *("--loss", "pama", "--pama.objective", "length=builtin:length,scale=12"),
        *("--pama.objective", f"helpful=rm:{models}/helpful"),
    )
    run = run_host(*flags, "--data.max_samples", "24", steps=3)
    assert run.status == 0, run.output[-5000:]
    # vLLM samples from base and adapters: what it thinks of its tokens is what the policy thinks.
    assert all(abs(step["vllm_kl"]) < 1e-3 for step in run.steps)
    nats = [step["pama/kl_response"] for step in run.steps]
    assert abs(nats[0]) < 1e-5 and max(map(abs, nats)) > 1e-3, "the reference is the policy with its adapters off"

    if ALL_MODES:  # two minutes
        resumed = run_host(*flags, "--ckpt.load_enable", "--data.max_samples", "40", steps=5)
        assert resumed.status == 0, resumed.output[-5000:]
        assert list(resumed.by_step) == [4, 5]
        assert all(abs(step["vllm_kl"]) < 1e-3 for step in resumed.steps)
        assert abs(resumed.by_step[4]["pama/kl_response"]) > 1e-3, "the adapters are those of the checkpoint"

    assert (tmp_path / "model" / "adapter_config.json").is_file()
    combine = [sys.executable, "-m", "openrlhf.cli.lora_combiner", "--model_path", str(models / "policy")]
    combine += ["--lora_path", str(tmp_path / "model"), "--output_path", str(tmp_path / "merged")]
    subprocess.run(combine, check=True)
    start, trained = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (models / "policy", tmp_path / "merged")
    )
    moved = [
        name
        for name, value in trained.named_parameters()
        if not torch.equal(value, start.get_parameter(name).bfloat16().float())
    ]
    assert len(moved) == 14


# What OpenRLHF estimates vllm_kl to be at most: in float32 both compute the same; bfloat16 rounds merged weights and
# sums; an asynchronous rollout is a step older than the policy.
MODES = {
    "ZeRO-0 with dropout": ("--ds.zero_stage 0 --ds.lora.dropout 0.1", 1e-3),
    "ZeRO-1 in bfloat16 on two ranks": ("--ds.zero_stage 1 --ds.param_dtype bf16 --actor.num_gpus_per_node 2", 0.05),
    "ZeRO-2 with a base in 4 bits": ("--ds.zero_stage 2 --ds.param_dtype bf16 --ds.load_in_4bit", 0.05),
    "ZeRO-3 in bfloat16 on two ranks": ("--ds.zero_stage 3 --ds.param_dtype bf16 --actor.num_gpus_per_node 2", 0.05),
    "asynchronous": ("--ds.zero_stage 2 --train.async_enable --train.async_queue_size 1", 1.0),
    "all on one GPU, with sleep and gradient checkpoints": (
        "--ds.zero_stage 2 --train.colocate_all --ds.enable_sleep --actor.gradient_checkpointing_enable",
        1e-3,
    ),
    "rloo": ("--algo.advantage.estimator rloo", 1e-3),
    "group_norm": ("--algo.advantage.estimator group_norm", 1e-3),
    "dr_grpo": ("--algo.advantage.estimator dr_grpo", 1e-3),
    "reinforce": ("--algo.advantage.estimator reinforce", 1e-3),
}


# The two ranks above show the same parts at work.
@by_hand("half an hour, and PYTHONPATH=.venv/bitsandbytes")
@pytest.mark.parametrize("mode", MODES)
def test_adapters_in_other_modes(mode, run_host, models) -> None:
    mode_flags, most = MODES[mode]
    flags = (
        *"--ds.lora.rank 4 --ds.lora.alpha 8 --actor.adam.lr 3e-2 --ckpt.save_steps 2".split(),
        *"--algo.advantage.estimator reinforce_baseline --rollout.n_samples_per_prompt 4 --train.batch_size 16".split(),
        *"--algo.kl.use_loss --algo.kl.estimator k2 --algo.kl.init_coef 1e-3".split(),
        *"--algo.advantage.is_correction_level token".split(),
        *("--loss", "pama", "--pama.objective", "length=builtin:length,scale=12"),
        *("--pama.objective", f"helpful=rm:{models}/helpful"),
        *mode_flags.split(),  # last, because a mode may replace a flag
    )
    run = run_host(*flags, "--data.max_samples", "16", steps=4)
    assert run.status == 0, run.output[-5000:]
    resumed = run_host(*flags, "--ckpt.load_enable", "--data.max_samples", "24", steps=6)
    assert resumed.status == 0, resumed.output[-5000:]
    assert (list(run.by_step), list(resumed.by_step)) == ([1, 2, 3, 4], [5, 6])
    assert all(abs(step["vllm_kl"]) < most for step in (*run.steps, *resumed.steps))
    assert abs(run.by_step[1]["pama/kl_response"]) < 1e-5 < abs(resumed.by_step[5]["pama/kl_response"])

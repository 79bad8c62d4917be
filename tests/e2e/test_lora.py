"""A policy with LoRA adapters on the whole stack."""

import subprocess
import sys

import pytest
import torch
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

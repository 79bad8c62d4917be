"""The CPU wheel: with CUDA present its device functions are torch.cuda's own, and the patch touches what it says."""

from pathlib import Path
from unittest import mock

import pytest
import torch

pytestmark = pytest.mark.contract

PATCH = Path(__file__).parents[2] / "patches" / "openrlhf-0.11.2" / "run-without-cuda.patch"


def test_the_installed_host_is_the_patched_one() -> None:
    from importlib.metadata import requires, version

    assert version("openrlhf") == "0.11.2+cpu"
    assert not [line for line in requires("openrlhf") or [] if line.startswith(("flash-attn", "bitsandbytes"))]


def test_with_cuda_every_device_function_is_torchs() -> None:
    """CUDA can't run here, so torch.cuda is played by a mock: the calls, and what they return, must be its own."""
    from openrlhf.utils import device

    with mock.patch.object(torch, "cuda") as cuda:
        cuda.is_available.return_value = True
        assert device.current_device() is cuda.current_device.return_value
        assert device.current_stream() is cuda.current_stream.return_value
        assert device.device_type() == "cuda"
        device.set_device(3)
        device.synchronize()
        cuda.set_device.assert_called_once_with(3)
        cuda.synchronize.assert_called_once_with()


def test_without_cuda_everything_is_on_the_cpu() -> None:
    from openrlhf.utils import device

    assert device.current_device() == torch.device("cpu") and device.device_type() == "cpu"
    assert device.current_stream() is None and device.synchronize() is None and device.set_device(0) is None


@pytest.mark.parametrize("name", ["current_device()", "synchronize()", "current_stream()", "set_device("])
def test_every_cuda_call_that_was_taken_out_is_a_call_of_the_device_module(name) -> None:
    for section in PATCH.read_text().split("\n--- ")[1:]:
        if "+++ b/openrlhf/utils/device.py" in section:
            continue
        lines = [line for line in section.splitlines() if " import " not in line]
        removed = sum(line.count(f"torch.cuda.{name}") for line in lines if line.startswith("-"))
        added = sum(line.count(name) - line.count(f".{name}") for line in lines if line.startswith("+"))
        assert added == removed, section.splitlines()[0]


def test_the_patch_for_upstream_sends_what_the_plugin_sends(tmp_path, wheels) -> None:
    """`send-lora-to-vllm.patch` applies to the published release, and its parameters are ours."""
    import subprocess
    import zipfile

    import openrlhf.trainer.ray.vllm_engine  # noqa: F401  before deepspeed, which peft's layers may import
    from transformers import LlamaConfig, LlamaForCausalLM

    from pama_plugin.host.actors.policy import merged, plain_parameters

    with zipfile.ZipFile(wheels["0.11.2"]) as archive:
        archive.extractall(tmp_path)
    (package,) = tmp_path.glob("*.data/purelib")
    subprocess.run(["git", "apply", str(PATCH.parents[1] / "send-lora-to-vllm.patch")], cwd=package, check=True)
    changed = (package / "openrlhf" / "trainer" / "ray" / "ppo_actor.py").read_text()
    compile(changed, "ppo_actor.py", "exec")
    assert changed.count("named_parameters_for_vllm(model)") == 1 and "model.named_parameters()" not in changed

    theirs: dict = {}
    exec((package / "openrlhf" / "utils" / "lora_utils.py").read_text(), theirs)
    from peft import LoraConfig, get_peft_model

    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape))
    assert [name for name, _ in theirs["named_parameters_for_vllm"](plain)] == [
        name for name, _ in plain.named_parameters()
    ]
    model = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    patched = theirs["named_parameters_for_vllm"](model)
    with merged(model):
        for (name, one), (other_name, other) in zip(plain_parameters(model), patched, strict=True):
            assert name == other_name and one.shape == other.shape
            if hasattr(other, "gathered"):
                import deepspeed

                with other.gathered(False), deepspeed.zero.GatheredParameters([one], enabled=False):
                    assert torch.equal(one.data, other.data)
                assert not hasattr(other, "data")

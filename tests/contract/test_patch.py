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

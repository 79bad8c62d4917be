"""Shared by every kind of test: call a function and fail if it wrote to a tensor it was given."""

import os
from collections.abc import Callable
from typing import Any

# Before anything imports the hub's client: made-up names of models must not be looked up, let alone with retries.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before anything imports torch: on tensors as small as these, more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray gives its workers a niceness of 15: beside the other half of the tests they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")

import hypothesis
import pytest
import torch

# A deadline would time torch's first call, not ours.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")


# Contract tests that start processes of their own, and have no Ray or model in common with the others.
COMMANDS = ("test_doctor.py", "test_fingerprints.py", "test_recipes.py", "test_seam.py")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which tests/light.sh does without
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n 2`` one process takes most of tests/contract, which share a Ray and models; the other the rest."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file.endswith((*COMMANDS, "test_front.py")):  # whose tests share long simulations
                return file
            return "tests/contract" if file.startswith("tests/contract/") else nodeid

    return ByFolder(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Some rules and kinds need libraries, wherever a test takes all of them."""
    for item in items:
        if any(name in item.nodeid for name in ("gram:", "=http:", "=hf:", "builtin:regex")):
            item.add_marker(pytest.mark.needs_extras)


@pytest.fixture
def immutable_call() -> Callable[..., Any]:
    """``immutable_call(f, *args, **kwargs)``: like ``f(*args, **kwargs)``, but no tensor argument may change."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        before = [tensor.clone() for tensor in tensors]
        result = function(*args, **kwargs)
        for tensor, copy in zip(tensors, before):
            torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True, msg="an input was modified")
        return result

    return call

"""Shared by every kind of test: call a function and fail if it wrote to a tensor it was given."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports the hub's client: made-up names of models must not be looked up, let alone with retries.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

# A deadline would time torch's first call, not ours.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")


# Each has a Ray and models that its tests share, and the end-to-end tests take turns: with `-n 2 --dist loadgroup` one
# process takes all of one folder, and the other folders' tests go to whoever is free.
ONE_PROCESS_EACH = {Path(__file__).with_name(name) for name in ("contract", "e2e")}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Some rules and kinds need libraries, wherever a test takes all of them."""
    for item in items:
        if item.path.parent in ONE_PROCESS_EACH:
            item.add_marker(pytest.mark.xdist_group(item.path.parent.name))
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

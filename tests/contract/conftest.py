"""One small Ray for the whole folder, of its own: no dashboard, its own folder, gone at the end."""

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from hosttools import fixed_group


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray with eight logical GPUs; nothing runs on them, Ray only counts."""
    import ray

    folder = tempfile.mkdtemp(prefix="pama-")  # short: Ray keeps sockets in it
    ray.init(address="local", num_cpus=8, num_gpus=8, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def groups(local_ray: None) -> dict[str, Any]:
    """Groups of the host, one rank each, whose models are fixed functions of the tokens."""
    return {name: fixed_group(name) for name in ("actor", "critic", "reference", "helpful", "harmless")}


@pytest.fixture(scope="session")
def pairs(groups: dict[str, Any]) -> dict[str, Any]:
    """An actor and a reward model of two ranks each."""
    return {name: fixed_group(name, ranks=2) for name in ("actor", "helpful")}

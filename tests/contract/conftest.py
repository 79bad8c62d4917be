"""One small Ray for the whole folder, of its own: no dashboard, own folder, gone at the end; and the real wheels."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosttools import ROOT, fixed_group

from pama_plugin.host.preflight.fingerprints import known_releases


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray with 16 logical GPUs; nothing runs on them, Ray only counts. The groups below may hold half of them."""
    import ray

    folder = tempfile.mkdtemp(prefix="pama-")  # short: Ray keeps sockets in it
    ray.init(address="local", num_cpus=16, num_gpus=16, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def groups(local_ray: None) -> dict[str, Any]:
    """Groups of the host, one rank each, whose models are fixed functions of the tokens."""
    return {name: fixed_group(name) for name in ("actor", "critic", "reference", "helpful", "harmless", "shaky")}


@pytest.fixture(scope="session")
def pairs(groups: dict[str, Any]) -> dict[str, Any]:
    """An actor and a reward model of two ranks each."""
    return {name: fixed_group(name, ranks=2) for name in ("actor", "helpful")}


@pytest.fixture(scope="session")
def wheels(request: pytest.FixtureRequest) -> dict[str, Path]:
    """Release → the host's wheel, as published and (+cpu) with our patch; fetched once, and kept in .venv."""
    folder = ROOT / ".venv" / "hosts"
    found = {}
    for release in known_releases():
        if not list(folder.glob(f"openrlhf-{release}-*.whl")):
            published = release.partition("+")[0]
            request.config.get_terminal_writer().line(f"\nfetching openrlhf=={published} into {folder}")
            builder = ROOT / "patches" / "build_wheel.py"
            subprocess.run([sys.executable, builder, folder, published], check=True)
        (found[release],) = folder.glob(f"openrlhf-{release}-*.whl")
    return found

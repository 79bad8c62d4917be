"""A pytest plugin that plays Ray's verbs in this process: ``-p one_process``.

For the runs on older releases, where five actors that each import the host would cost a minute. The host's own
``RayActorGroup`` and ``execute_batch`` still carry every batch.
"""

from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import ray


class Handle:
    """An actor that lives here: its methods have a ``remote`` that calls them."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self._instance, name))


def _create(actor: Any, args: tuple = (), kwargs: dict | None = None, **_: Any) -> Handle:
    return Handle(actor.__ray_metadata__.modified_class(*args, **(kwargs or {})))


def pytest_configure() -> None:
    ray.actor.ActorClass._remote = _create
    ray.get = ray.put = lambda value: value
    ray.init = ray.shutdown = lambda **_: None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"ran on openrlhf {version('openrlhf')} in {find_spec('openrlhf').origin}")

"""A pytest plugin that plays Ray's verbs in this process: ``-p one_process``.

For the runs on older releases, where five actors that each import the host would cost a minute. The host's own
``RayActorGroup`` and ``execute_batch`` still carry every batch.
"""

from concurrent.futures import Future
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import ray


class Done(Future):
    """A reference to what is there already."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.set_result(value)

    def future(self) -> Future:
        return self


class Handle:
    """An actor that lives here: its methods have a ``remote`` that calls them."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance

    def __getattr__(self, name: str) -> SimpleNamespace:
        def remote(*args: Any, **kwargs: Any) -> Done:  # with the values of references, as Ray passes them
            values = {key: _get(value) for key, value in kwargs.items()}
            return Done(getattr(self._instance, name)(*map(_get, args), **values))

        return SimpleNamespace(remote=remote)


def _get(refs: Any, **_: Any) -> Any:
    if isinstance(refs, list):
        return [_get(ref) for ref in refs]
    return refs.result() if isinstance(refs, Done) else refs


def _create(actor: Any, args: tuple = (), kwargs: dict | None = None, **_: Any) -> Handle:
    return Handle(actor.__ray_metadata__.modified_class(*args, **(kwargs or {})))


def pytest_configure() -> None:
    ray.actor.ActorClass._remote = _create
    ray.get, ray.put = _get, Done
    ray.init = ray.shutdown = lambda **_: None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"ran on openrlhf {version('openrlhf')} in {find_spec('openrlhf').origin}")

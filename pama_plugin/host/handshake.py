"""Ask every actor what it runs, before the first step: a swap that got lost must not train a stock model for a week."""

from typing import Any, NamedTuple

import ray

from pama_plugin import __version__
from pama_plugin.config import PamaConfig
from pama_plugin.errors import HandshakeError


class Report(NamedTuple):
    """What an actor says of itself: the plugin's version on its node and the configuration that reached it, as JSON."""

    version: str
    config: str | None


def report(actor: Any) -> Report:
    """Runs inside the actor. A vLLM actor has the configuration in its executor, every other one in its strategy."""
    if hasattr(actor, "executor"):
        config = getattr(actor.executor, "config", None)
    else:
        config = getattr(actor.strategy.args, "pama", None)
    return Report(__version__, config.model_dump_json() if isinstance(config, PamaConfig) else None)


def shake_hands(config: PamaConfig, roles: dict[str, list[list[Any]]]) -> str:
    """Compare what every rank reports with the driver's configuration.

    Args:
        config: what the driver runs.
        roles: role → groups → a reference to the report of every rank. Where there is more than one group to a role
            its name ends in "groups", and the line counts groups instead of ranks.

    Returns:
        One line, such as ``PAMA 0.1.0 active: 2 objectives, policy 1/1, critic –, reward groups 1/1``.

    Raises:
        HandshakeError: a rank without the plugin, or with another version or configuration; names them all.
    """
    expected = Report(__version__, config.model_dump_json())
    parts = [f"PAMA {__version__} active: {len(config.objectives)} objectives"]
    strangers = []
    for role, groups in roles.items():
        for index, group in enumerate(groups):
            for rank, reference in enumerate(group):
                difference = _difference(reference, expected)
                if difference:
                    strangers.append(f"{role} {index}, rank {rank}: {difference}")
        total = len(groups) if role.endswith("groups") else sum(map(len, groups))
        parts.append(f"{role} {total}/{total}" if total else f"{role} –")
    if strangers:
        raise HandshakeError(
            f"every rank must run PAMA {__version__} with the driver's configuration, found {'; '.join(strangers)}. "
            "The run was stopped before its first step"
        )
    return ", ".join(parts)


def _difference(reference: Any, expected: Report) -> str | None:
    try:
        found: Report = ray.get(reference)
    except ray.exceptions.RayError as error:  # above all: the plugin is not installed on that node
        return f"no answer ({str(error).splitlines()[-1]})"
    if found.version != expected.version:
        return f"version {found.version}"
    if found.config is None:
        return "stock code"
    return None if found.config == expected.config else f"another configuration, {found.config}"

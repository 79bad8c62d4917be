"""Asks every actor what it runs before the first step, so that a lost replacement cannot train a stock model."""

from typing import Any, NamedTuple

import ray

from pama_plugin import __version__
from pama_plugin.errors import HandshakeError
from pama_plugin.settings.run import PamaConfig


class Report(NamedTuple):
    """An actor's report: the plugin's version on its node and the configuration that it received, as JSON."""

    version: str
    config: str | None


def report(actor: Any) -> Report:
    """Runs in the actor. A vLLM actor has the configuration in its executor, every other actor in its strategy."""
    if hasattr(actor, "executor"):
        config = getattr(actor.executor, "config", None)
    else:
        config = getattr(actor.strategy.args, "pama", None)
    return Report(__version__, config.model_dump_json() if isinstance(config, PamaConfig) else None)


def shake_hands(config: PamaConfig, roles: dict[str, list[list[Any]]]) -> str:
    """Compare what every rank reports with the driver's configuration.

    Args:
        config: the driver's configuration.
        roles: role → its units (ranks, or groups of ranks), which the line counts → references to the ranks' reports.

    Returns:
        One line, such as ``PAMA 0.1.0 active: 2 objectives, policy 1/1, critic –, reward groups 1/1``.

    Raises:
        HandshakeError: ranks without the plugin, or with another version or configuration; names all of them.
    """
    expected = Report(__version__, config.model_dump_json())
    parts = [f"PAMA {__version__} active: {len(config.objectives)} objectives"]
    strangers = []
    for role, units in roles.items():
        differences = [[_difference(rank, expected) for rank in ranks] for ranks in units]
        agreed = sum(not any(unit) for unit in differences)
        parts.append(f"{role} {agreed}/{len(units)}" if units else f"{role} –")
        strangers += [f"{role} {index}: {why}" for index, unit in enumerate(differences) for why in unit if why]
    if strangers:
        raise HandshakeError(
            f"every rank must run PAMA {__version__} with the driver's configuration, found {'; '.join(strangers)}. "
            f"The run was stopped before its first step ({', '.join(parts)})"
        )
    return ", ".join(parts)


def _difference(reference: Any, expected: Report) -> str | None:
    try:
        answer: Report = ray.get(reference)
    except ray.exceptions.RayError as error:  # most likely the plugin is not installed on that node
        return f"no answer ({str(error).splitlines()[-1]})"
    if answer.version != expected.version:
        return f"version {answer.version}"
    if answer.config is None:
        return "stock code"
    return None if answer.config == expected.config else f"another configuration, {answer.config}"

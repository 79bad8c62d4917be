"""Asks every node of the cluster, before a GPU is reserved, whether it has the plugin and the files of the rewards."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pama_plugin import __version__
from pama_plugin.errors import ConfigError
from pama_plugin.settings.run import PamaConfig

SECONDS = 120.0  # limit of all answers; a node may still be starting


class Answer(NamedTuple):
    """A node's answer: the plugin's version, None without the plugin, and the files that the node lacks."""

    version: str | None
    missing: tuple[str, ...]


def ask_nodes(config: PamaConfig, nodes: Sequence[dict[str, Any]]) -> list[str]:
    """Refuse nodes with GPUs and without this version of the plugin; return warnings of all else.

    Ray would fail to start an actor on such a node, with pages of traceback; a file is missed at the first response.

    Args:
        config: the configuration of the run.
        nodes: those of ``ray.nodes()`` that are alive.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # A local function travels by value, so that a node without the plugin can run it.
    def answer(files: list[str]) -> tuple[str | None, list[str]]:
        import os

        try:
            import pama_plugin
        except ImportError:
            return None, []
        return pama_plugin.__version__, [file for file in files if not os.path.exists(file)]

    files = sorted({str(file) for objective in config.objectives for file in objective.files()})
    answers = {}
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(answer).options(num_cpus=0, scheduling_strategy=place, max_retries=0)
        answers[node["NodeManagerAddress"]] = task.remote(files)
    ray.wait(list(answers.values()), num_returns=len(answers), timeout=SECONDS)
    with_gpus = {node["NodeManagerAddress"] for node in nodes if node["Resources"].get("GPU", 0)}
    return judge({node: _read(reference) for node, reference in answers.items()}, with_gpus)


def _read(reference: Any) -> Answer | str:
    import ray

    try:
        version, missing = ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return f"no answer within {SECONDS:g} s"
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[-1]
    return Answer(version, tuple(missing))


def judge(answers: dict[str, Answer | str], with_gpus: set[str]) -> list[str]:
    """The warnings, from the answers or errors of the nodes; raise ``ConfigError`` for a node that may run a model.

    >>> judge({"10.0.0.1": Answer(__version__, ()), "10.0.0.2": Answer(__version__, ("/rewards.py",))}, {"10.0.0.1"})
    ['node 10.0.0.2 has no /rewards.py: an objective that is scored there would fail']
    """
    warnings: list[str] = []
    refused: list[str] = []
    for node, answer in answers.items():
        if isinstance(answer, str):
            warnings.append(f"node {node} could not be asked for the plugin: {answer}")
        elif answer.version != __version__:
            (refused if node in with_gpus else warnings).append(f"node {node} has {answer.version or 'none'}")
        else:
            warnings += [
                f"node {node} has no {file}: an objective that is scored there would fail" for file in answer.missing
            ]
    if refused:
        raise ConfigError(
            f"every node with GPUs must have pama_plugin {__version__}, as this one, found {', '.join(refused)}"
        )
    return warnings

"""The kinds of reward, one record each. Installed packages add kinds in the entry-point group ``pama_plugin.kinds``.

A record refers to functions and classes as ``"MODULE:NAME"``. The module is imported when an objective first needs it,
so that ``--help`` and runs without the kind do not import its libraries.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from pama_plugin.registry import Registry

Reference = str | Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class RewardKind:
    """Defines how objectives ``NAME=KIND:LOCATION[,option=value…]`` of one kind are checked, identified and scored.

    Args:
        summary: description of the kind and of LOCATION, for ``--help``.
        scored_in: where rewards are computed. ``rollout``: in the vLLM actors, one response at a time, during
            generation; ``replicas``: in separate Ray actors, which read the text of whole batches; ``ranks``: in
            OpenRLHF's reward-model actors, which read the policy's token ids; ``agent``: in the user's agent.
        options: options of the kind, in addition to those of every objective.
        model: pydantic model of these options; for ``replicas`` a subclass of ``ReplicaOptions``. Without a model,
            ``check`` and ``load`` receive the options as a dict.
        runtime_options: options that do not change rewards.
        packages: modules from the extra ``rewards`` that the kind imports.
        learned: whether a constant reward indicates a broken model; a hand-written reward may be constant.
        reads_labels: whether the reward may depend on the label of the prompt.
        check: ``(location, options) -> warnings or None``; raises ``ValueError`` if the reward cannot be computed. It
            runs on the driver before Ray starts, and sends no request to a server.
        absolute: ``location -> location`` with absolute paths.
        files: ``location -> list of paths``: files that determine the reward. Their content is part of its identity
            in checkpoints.
        load: for ``rollout``, ``(location, options, *, patient) -> Scorer``; with ``patient`` the scorer waits for a
            server that is down, because a failure would end the run. For ``replicas``, ``(location, options, device)
            -> TextModel``. Unused otherwise.

    >>> KINDS["py"].scored_in, KINDS["py"].options
    ('rollout', ('timeout', 'concurrency', 'isolate'))
    """

    summary: str
    scored_in: Literal["rollout", "replicas", "ranks", "agent"]
    options: tuple[str, ...] = ()
    model: Reference | None = None
    runtime_options: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    learned: bool = False
    reads_labels: bool = False
    check: Reference | None = None
    absolute: Reference | None = None
    files: Reference | None = None
    load: Reference | None = None

    def resolve(self, field: str) -> Any:
        """Import the function or class to which the field refers."""
        reference = getattr(self, field)
        return pkgutil.resolve_name(reference) if isinstance(reference, str) else reference

    def missing_packages(self) -> list[str]:
        """The ``packages`` that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


KINDS = Registry[RewardKind]("kind", "pama_plugin.kinds")

KINDS.add(
    "rm",
    RewardKind(
        summary="a value-head reward model of OpenRLHF, folder or hub name",
        scored_in="ranks",
        options=("gpus", "nodes", "offload", "value_head_prefix", "trust_remote_code"),
        model="pama_plugin.rewards.options:RmOptions",
        runtime_options=("gpus", "nodes", "offload"),
        learned=True,
        check="pama_plugin.rewards.options:check_model",
        absolute="pama_plugin.rewards.options:absolute_model",
        files="pama_plugin.rewards.options:model_files",
    ),
)
KINDS.add(
    "hf",
    RewardKind(
        summary="any sequence classifier with its own tokenizer, folder or hub name",
        scored_in="replicas",
        options=("label", "output", "text", "max_length", "dtype", "trust_remote_code")
        + ("batch_size", "replicas", "gpus", "timeout"),
        model="pama_plugin.rewards.options:HfOptions",
        runtime_options=("batch_size", "replicas", "gpus", "timeout"),
        packages=("transformers",),
        learned=True,
        check="pama_plugin.rewards.options:check_model",
        absolute="pama_plugin.rewards.options:absolute_model",
        files="pama_plugin.rewards.options:model_files",
        load="pama_plugin.rewards.hf:HfScorer",
    ),
)
KINDS.add(
    "py",
    RewardKind(
        summary="FILE.py:FUNCTION with the signature of OpenRLHF's reward_func",
        scored_in="rollout",
        options=("timeout", "concurrency", "isolate"),
        model="pama_plugin.rewards.options:PyOptions",
        runtime_options=("timeout", "concurrency", "isolate"),
        reads_labels=True,
        check="pama_plugin.rewards.py:check_function",
        absolute="pama_plugin.rewards.py:absolute_function",
        files="pama_plugin.rewards.py:function_files",
        load="pama_plugin.rewards.py:load_function",
    ),
)
KINDS.add(
    "http",
    RewardKind(
        summary="URL of a reward server, replicas separated by |",
        scored_in="rollout",
        options=("timeout", "retries", "concurrency", "token_env"),
        model="pama_plugin.rewards.options:HttpOptions",
        runtime_options=("timeout", "retries", "concurrency", "token_env"),
        packages=("circuitbreaker", "httpx", "tenacity"),
        learned=True,
        reads_labels=True,
        check="pama_plugin.rewards.http:check_http",
        load="pama_plugin.rewards.http:load_http",
    ),
)
KINDS.add(
    "builtin",
    RewardKind(
        summary="name of a reward of this package or of an installed package",
        scored_in="rollout",
        check="pama_plugin.rewards.builtin:check_builtin",
        load="pama_plugin.rewards.builtin:load_builtin",
    ),
)
KINDS.add(
    "agent",
    RewardKind(
        summary="a key of extra_logs, reward or scores, as returned by the agent of --train.agent_func_path",
        scored_in="agent",
        model="pama_plugin.rewards.options:NoOptions",
    ),
)

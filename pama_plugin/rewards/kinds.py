"""The kinds of reward, one record each; installed packages add theirs as entry points of ``pama_plugin.kinds``.

A record names functions and classes as ``"MODULE:NAME"``, which is imported when an objective first needs it, so that
``--help`` and runs without the kind do not import its libraries.
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
    """How objectives ``NAME=KIND:LOCATION[,option=value…]`` of one kind are checked, identified and scored.

    Args:
        summary: what the kind is and what LOCATION names, for ``--help``.
        scored_in: ``rollout``: in the vLLM actors, one response at a time, while others are generated; ``replicas``: in
            Ray actors of its own, which read the text of whole batches; ``ranks``: in OpenRLHF's reward-model actors,
            which read the policy's token ids; ``agent``: the user's agent returns it.
        options: the options that the kind takes besides those of every objective.
        model: pydantic model of these options; of a kind scored in replicas it extends ``ReplicaOptions``. Without one,
            ``check`` and ``load`` are passed the options as a dict.
        runtime_options: options that do not change the reward of a response.
        packages: modules that the kind imports, of the extra ``rewards``.
        learned: whether a constant reward is a sign of a broken model; a hand-written reward may well be constant.
        reads_labels: whether the reward may depend on the label of the prompt.
        check: ``(location, options) -> warnings or None``; raises ``ValueError`` where the reward cannot be computed.
            It runs on the driver before Ray starts, and asks no server.
        absolute: ``location -> location`` with absolute paths.
        files: ``location -> paths`` of the files that decide the reward, part of the reward's identity in checkpoints.
        load: ``rollout``: ``(location, options, *, patient) -> Scorer``, where ``patient`` asks to wait for a server
            that is down, because a failure would end the run; ``replicas``: ``(location, options, device) ->
            TextModel``; not used otherwise.

    >>> KINDS["py"].scored_in, KINDS["py"].options
    ('rollout', ('timeout', 'concurrency'))
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
        """The function or class that the field refers to."""
        reference = getattr(self, field)
        return pkgutil.resolve_name(reference) if isinstance(reference, str) else reference

    def missing_packages(self) -> list[str]:
        """Those of ``packages`` that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


KINDS = Registry[RewardKind]("kind", "pama_plugin.kinds")

KINDS.add(
    "rm",
    RewardKind(
        summary="a value-head reward model of OpenRLHF, folder or hub name",
        scored_in="ranks",
        options=("gpus", "nodes", "offload", "value_head_prefix"),
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
        summary="any sequence classifier with a tokenizer of its own, folder or hub name",
        scored_in="replicas",
        options=("label", "output", "text", "max_length", "dtype", "trust_remote_code")
        + ("batch_size", "replicas", "gpus"),
        model="pama_plugin.rewards.options:HfOptions",
        runtime_options=("batch_size", "replicas", "gpus"),
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
        options=("timeout", "concurrency"),
        model="pama_plugin.rewards.options:PyOptions",
        runtime_options=("timeout", "concurrency"),
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
        summary="a reward server's URL, replicas separated by |",
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
        summary="a reward of this package, or one that another package registered, by name",
        scored_in="rollout",
        check="pama_plugin.rewards.builtin:check_builtin",
        load="pama_plugin.rewards.builtin:load_builtin",
    ),
)
KINDS.add(
    "agent",
    RewardKind(
        summary="what the agent of --train.agent_func_path returns: a key of extra_logs, reward or scores",
        scored_in="agent",
        model="pama_plugin.rewards.options:NoOptions",
    ),
)

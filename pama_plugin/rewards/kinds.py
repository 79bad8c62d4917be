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
            ``check`` and ``load`` receive the options as a dict. If it has a field ``columns``, a tuple of names, these
            columns of the data set are in ``Response.columns``.
        runtime_options: options that do not change rewards.
        packages: modules from the extra ``rewards`` that the kind imports.
        learned: whether a constant reward indicates a broken model; a hand-written reward may be constant.
        reads_labels: whether the reward may depend on the label of the prompt.
        needs_label: ``options -> bool``: whether it cannot be computed without one.
        located_by: options that say, with the location, which scorer it is: with others, a call is not shared.
        abstains: whether the reward may be None, which ``abstain=true`` takes as "does not apply to this response".
        picks: the option, a field of ``model``, that picks one of several numbers. Objectives with the same location
            share one call per response, or one loaded model, and differ in this option only. ``load`` then receives
            the values of all of them, in order, as ``keys``, and a call returns a list in that order.
        check: ``(location, options) -> warnings or None``; raises ``ValueError`` if the reward cannot be computed. It
            runs on the driver before Ray starts, and sends no request to a server.
        absolute: ``location -> location`` with absolute paths.
        files: ``location -> list of paths``: files that determine the reward. Their content is part of its identity
            in checkpoints.
        file_options: options that name such a file; ``load`` receives absolute paths.
        load: for ``rollout``, ``(location, options, *, patient) -> Scorer``; with ``patient`` the scorer waits for a
            server that is down, because a failure would end the run. For ``replicas``, ``(location, options, device)
            -> TextModel``. With ``picks``, and several objectives, also ``keys``. Unused otherwise.

    >>> KINDS["py"].scored_in, KINDS["py"].picks
    ('rollout', 'key')
    """

    summary: str
    scored_in: Literal["rollout", "replicas", "ranks", "agent"]
    options: tuple[str, ...] = ()
    model: Reference | None = None
    runtime_options: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    learned: bool = False
    reads_labels: bool = False
    needs_label: Reference | None = None
    located_by: tuple[str, ...] = ()
    abstains: bool = False
    picks: str | None = None
    check: Reference | None = None
    absolute: Reference | None = None
    files: Reference | None = None
    file_options: tuple[str, ...] = ()
    load: Reference | None = None

    def __post_init__(self) -> None:
        if self.picks is not None and (self.model is None or self.picks not in self.options):
            raise ValueError(f"picks must be one of the options, which need a model, found {self.picks!r}")

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
        picks="label",
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
        options=("key", "columns", "timeout", "concurrency", "isolate"),
        model="pama_plugin.rewards.options:PyOptions",
        runtime_options=("timeout", "concurrency", "isolate"),
        reads_labels=True,
        abstains=True,
        picks="key",
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
        options=("key", "columns", "timeout", "retries", "concurrency", "token_env"),
        model="pama_plugin.rewards.options:HttpOptions",
        runtime_options=("timeout", "retries", "concurrency", "token_env"),
        packages=("circuitbreaker", "httpx", "tenacity"),
        learned=True,
        reads_labels=True,
        abstains=True,
        picks="key",
        check="pama_plugin.rewards.http:check_http",
        load="pama_plugin.rewards.http:load_http",
    ),
)
KINDS.add(
    "judge",
    RewardKind(
        summary="URL of an OpenAI-compatible server, which rates responses by a rubric; replicas separated by |",
        scored_in="rollout",
        options=("rubric", "model", "key", "columns", "pattern", "json_schema", "temperature", "max_tokens")
        + ("timeout", "retries", "concurrency", "token_env"),
        model="pama_plugin.rewards.options:JudgeOptions",
        runtime_options=("timeout", "retries", "concurrency", "token_env"),
        packages=("circuitbreaker", "httpx", "regex", "tenacity"),
        learned=True,
        reads_labels=True,
        needs_label="pama_plugin.rewards.judge:needs_label",
        located_by=("rubric", "model"),
        abstains=True,
        picks="key",
        check="pama_plugin.rewards.judge:check_judge",
        file_options=("rubric", "json_schema"),
        load="pama_plugin.rewards.judge:load_judge",
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
        abstains=True,
        model="pama_plugin.rewards.options:NoOptions",
    ),
)

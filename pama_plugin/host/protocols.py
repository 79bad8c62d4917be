"""Protocols of OpenRLHF's objects, for the type checker: the parts that the plugin uses. OpenRLHF has no types.

``tests/contract/test_protocols.py`` checks each of them against OpenRLHF.
"""

import argparse
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class Experience(Protocol):
    """A micro-batch of b responses, padded to S tokens; tensors per token start at the second: A = S − 1.

    A sample (generated, not an experience yet) has no values, returns, advantages and log-probabilities.
    """

    index: list[int] | None
    sequences: Tensor  # (b, S)
    attention_mask: Tensor  # (b, S)
    action_mask: Tensor  # (b, A)
    rewards: Tensor  # (b,)
    values: Tensor  # (b, A), or (b, A, K) from K value heads; None without a critic
    returns: Tensor  # as values; flat where they pass through OpenRLHF's buffers
    advantages: Tensor  # (b, A)
    action_log_probs: Tensor  # (b, A)
    base_action_log_probs: Tensor | None  # (b, A) by the reference, for a KL loss
    kl: Tensor  # (b, A) to the reference, by --algo.kl.estimator; 0 with a KL loss
    response_length: Tensor  # (b,)
    truncated: Tensor | None  # (b,)
    prompts: list[str]
    labels: list[str]
    info: dict[str, Any]  # columns (b,) for the logs


class Tokenizer(Protocol):
    """The policy's tokenizer, from transformers."""

    all_special_tokens: list[str]
    pad_token_id: int
    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]: ...

    def decode(self, tokens: Tensor | list[int], skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool) -> str: ...


class Strategy(Protocol):
    """DeepSpeed's set-up; every rank has its own copy."""

    args: Any  # the flags, nested: --ckpt.path is args.ckpt.path; our PamaConfig is args.pama
    prepare: Callable[..., Any]  # passes (model, optimizer) to DeepSpeed

    def is_rank_0(self) -> bool: ...

    def all_reduce(self, metrics: dict[str, float]) -> dict[str, float]: ...


class ActorGroup(Protocol):
    """``RayActorGroup``: the ranks of one model."""

    duplicate_actors: int  # ranks that receive the same sequences: one ring or tensor-parallel group
    _actor_handlers: list[Any]

    def async_init_model_from_pretrained(self, strategy: Strategy, pretrain: str) -> list[Any]: ...

    def async_run_method(self, method_name: str, *args: Any) -> list[Any]: ...

    def async_run_method_batch(self, method_name: str, **batches: Any) -> list[Any]: ...


class Trainer(Protocol):
    """``BasePPOTrainer``, which the synchronous and the asynchronous trainer share."""

    args: Any
    strategy: Strategy
    tokenizer: Tokenizer
    actor_model_group: ActorGroup
    critic_model_group: ActorGroup | None
    reward_model_group: Any  # our RewardGroups
    reference_model_group: ActorGroup | None
    vllm_engines: list[Any]
    kl_ctl: Any
    experience_maker: Any
    best_eval_metric_key: str
    best_eval_metric_value: float
    wandb_logger: Any
    tensorboard_logger: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def fit(self, *args: Any, **kwargs: Any) -> None: ...

    def init_checkpoint_states(self) -> dict[str, Any]: ...

    def broadcast_to_vllm(self) -> None: ...

    def train_step(self, rollout_samples: list[Any], *args: Any) -> tuple[dict[str, Any], int]: ...

    def save_logs_and_checkpoints(self, global_step: int, logs_dict: Any = None, client_states: Any = None) -> None: ...

    def save_best_checkpoint(
        self, eval_metrics: dict[str, float], global_step: int, client_states: Any = None
    ) -> None: ...

    def _compute_rollout_stats(self, experiences: list[Any]) -> dict[str, float]: ...


class Command(Protocol):
    """``openrlhf.cli.train_ppo_ray`` as ``__main__``: the globals that its ``train`` looks up."""

    train: Callable[[argparse.Namespace], None]
    get_strategy: Callable[[Any], Strategy]
    RayActorGroup: Any
    PolicyModelActor: Any
    ReferenceModelActor: Any
    CriticModelActor: Any
    RewardModelActor: Any

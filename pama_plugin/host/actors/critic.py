"""A critic with one value head per objective on one trunk, trained with OpenRLHF's value loss once per objective.

``values`` and ``returns`` are (B, A, K) between critic and estimator. OpenRLHF's buffers cut and pad the last axis in
steps of tokens, so there they are flat: see ``flatten_objectives``.
"""

import json
import os
from typing import Any

import deepspeed
import ray
import torch
from openrlhf.trainer.ray import ppo_critic
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from pama_plugin.batch.keys import CRITIC_LOSS
from pama_plugin.errors import ConfigError
from pama_plugin.host.protocols import Strategy
from pama_plugin.settings.objective import Objective

HEADS = "value_heads"
# Saved beside the value network, because OpenRLHF can only load a network with one head.
HEADS_FILE = "value_heads.safetensors"


@ray.remote(num_gpus=1)
class CriticModelActor(ppo_critic.CriticModelActor.__ray_metadata__.modified_class):
    """OpenRLHF's critic; with several objectives, one value head per objective replaces its value head."""

    def init_model_from_pretrained(self, strategy: Strategy, pretrain: str, max_steps: int) -> None:
        # Of the policy only: OpenRLHF would adapt the value head, which starts anew, and train nothing of 4 bits.
        strategy.args.ds.lora.rank, strategy.args.ds.load_in_4bit = 0, False
        objectives = strategy.args.pama.trained
        objective = objective_of(objectives, pretrain)
        if objective is not None:  # this rank has its own copy of the strategy and its arguments
            prefix = objective.settings.value_head_prefix
            strategy.args.ds.value_head_prefix = prefix or strategy.args.ds.value_head_prefix
        if len(objectives) > 1:
            # OpenRLHF calls this once, after it builds the model and before DeepSpeed wraps it.
            prepare = strategy.prepare
            strategy.prepare = lambda pair: prepare((add_value_heads(pair[0], objectives, pretrain), pair[1]))
        super().init_model_from_pretrained(strategy, pretrain, max_steps)
        restore_normalization(self.critic.module)
        self.names = strategy.args.pama.trained_names
        self.trainer.critic_loss_fn = MultiObjectiveValueLoss(self.trainer.critic_loss_fn)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the values: (B, A) for one objective, else (B, A, K)."""
        values = super().forward(*args, **kwargs)
        return values if values.dim() == 2 else values.movedim(0, -1)

    def fit(self) -> dict[str, float]:
        """Train; ``critic_loss`` and ``values`` become means over the objectives; each objective's loss is added."""
        status: dict[str, float] = super().fit()
        if not status:  # fewer responses than a micro-batch: OpenRLHF trains on none
            return status
        losses_K = self.trainer.critic_loss_fn.pop_losses()
        status["values"] /= len(self.names)  # OpenRLHF summed over the heads
        losses = {f"{CRITIC_LOSS}{name}": loss.item() for name, loss in zip(self.names, losses_K)}
        return status | self.strategy.all_reduce(losses)

    def save_model(self) -> None:
        super().save_model()
        if self.tokenizer is None or len(self.names) == 1:  # nothing was saved, or OpenRLHF saved everything
            return
        heads = self.critic.module.get_submodule(HEADS)
        with deepspeed.zero.GatheredParameters([heads.weight]):
            if self.strategy.is_rank_0():
                path = os.path.join(self.strategy.args.ckpt.output_dir + "_critic", HEADS_FILE)
                weight = heads.weight.detach().float().cpu().contiguous()
                save_file({HEADS: weight}, path, metadata={"objectives": json.dumps(self.names)})


def add_value_heads(critic: nn.Module, objectives: tuple[Objective, ...], pretrain: str) -> nn.Module:
    """Replace OpenRLHF's value head by ``nn.Linear(hidden, K)``, in place.

    The heads are those saved with ``pretrain``, or else new ones, as small as OpenRLHF's. If ``pretrain`` is the reward
    model of an objective, that objective keeps the model's head. Every rank draws the same heads.

    Args:
        critic: as OpenRLHF built it.
        objectives: the K objectives, in the order of the heads.
        pretrain: the folder or hub name that ``critic`` was loaded from.

    Returns:
        ``critic``, which now returns values (K, B, A), so that OpenRLHF's (B, A) masks broadcast against them.
    """
    model: Any = critic  # OpenRLHF creates its class anew for each architecture
    stock = getattr(model, model.value_head_prefix)
    with deepspeed.zero.GatheredParameters([stock.weight]):
        stock_1H = stock.weight.detach().float().cpu()
    if model.normalize_reward:  # scale the head instead: the mean and std do not apply to the other objectives
        stock_1H = stock_1H / getattr(model.config, "std", 1.0)
        model.normalize_reward = False
    saved = load_value_heads(pretrain, tuple(objective.name for objective in objectives))
    if saved is None:
        hidden = stock_1H.shape[1]
        saved = torch.randn(len(objectives), hidden, generator=torch.Generator().manual_seed(0)) / (hidden + 1)
        if (objective := objective_of(objectives, pretrain)) is not None:
            saved[objectives.index(objective)] = stock_1H
    if saved.shape != (len(objectives), stock_1H.shape[1]):
        raise ConfigError(
            f"{HEADS_FILE} in {pretrain} must hold {len(objectives)} heads of {stock_1H.shape[1]}, found "
            f"{tuple(saved.shape)}"
        )

    heads = nn.Linear(saved.shape[1], len(objectives), bias=False)
    heads.weight.data = saved.to(stock.weight)
    delattr(model, model.value_head_prefix)
    critic.add_module(HEADS, heads)
    model.value_head_prefix = HEADS
    missing_axes = (None,) * (2 if model.packing_samples else 1)  # OpenRLHF's unpacking leaves an axis of size 1

    def mask_every_head(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        sequences, *rest = args
        mask_BA = rest.pop(0) if rest else kwargs.pop("action_mask")
        return (sequences, mask_BA[(..., *missing_axes)], *rest), kwargs

    def objectives_first(_: nn.Module, __: Any, output: Any) -> Any:
        values, *rest = output if isinstance(output, tuple) else (output,)
        values_KBA = values.flatten(2).movedim(-1, 0)
        return (values_KBA, *rest) if rest else values_KBA

    critic.register_forward_pre_hook(mask_every_head, with_kwargs=True)
    critic.register_forward_hook(objectives_first)
    return critic


def load_value_heads(pretrain: str, names: tuple[str, ...]) -> Tensor | None:
    """Load the (K, hidden) heads saved with a value network, in the order of ``names``; None if it has none.

    Raises:
        ConfigError: the heads belong to other objectives, or cannot be read.
    """
    if os.path.isdir(pretrain):
        path = os.path.join(pretrain, HEADS_FILE)
    else:  # a name on the hub; OpenRLHF refuses one that does not exist
        quiet = {f"_raise_exceptions_for_{cause}": False for cause in ("missing_entries", "connection_errors")}
        path = cached_file(pretrain, HEADS_FILE, **quiet)
    if path is None or not os.path.isfile(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            saved_names: list[str] = json.loads(file.metadata()["objectives"])
            heads: Tensor = file.get_tensor(HEADS)
    except Exception as error:  # a damaged file may raise anything
        raise ConfigError(f"{path} must hold readable value heads, found {error}") from error
    if sorted(saved_names) != sorted(names):
        raise ConfigError(
            f"--critic.model_name_or_path must have one value head per objective ({', '.join(names)}), found the heads "
            f"of {', '.join(saved_names)} in {pretrain}"
        )
    return heads[[saved_names.index(name) for name in names]]


def objective_of(objectives: tuple[Objective, ...], pretrain: str) -> Objective | None:
    """Return the first objective scored in ranks whose reward model is ``pretrain``, or None."""
    path = os.path.realpath(pretrain)
    models = (objective for objective in objectives if objective.reward_kind.scored_in == "ranks")
    return next((objective for objective in models if os.path.realpath(objective.location) == path), None)


def restore_normalization(model: nn.Module) -> None:
    """Set the buffers with which --reward.normalize_enable scales rewards and values from the model's config.

    OpenRLHF sets them in the constructor; transformers 5 then loads through the meta device, which leaves unsaved
    buffers uninitialised. Remove when every supported release has https://github.com/OpenRLHF/OpenRLHF/pull/1343.
    """
    buffers: Any = model
    buffers.mean.fill_(getattr(model.config, "mean", 0.0))
    buffers.std.fill_(getattr(model.config, "std", 1.0))


class MultiObjectiveValueLoss(nn.Module):
    """``1/K Σ_i L(V_i, R_i)`` with OpenRLHF's clipped value loss ``L``; keeps the K losses of each call."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock
        self.losses: list[Tensor] = []

    def forward(self, values: Tensor, old_values: Tensor, returns: Tensor, **batch: Any) -> Tensor:
        """``values`` is (B, A) or (K, B, A); ``old_values`` and ``returns`` are flat, from ``flatten_objectives``."""
        values_KBA = values.reshape(-1, *values.shape[-2:])
        old_values_KBA, returns_KBA = (unflatten_objectives(flat, values_KBA) for flat in (old_values, returns))
        triples = zip(values_KBA, old_values_KBA, returns_KBA)
        losses_K = torch.stack([self.stock(*triple, **batch) for triple in triples])
        self.losses.append(losses_K.detach())
        return losses_K.mean()

    def pop_losses(self) -> Tensor:
        """Return the (K,) mean losses over the calls since the last ``pop_losses``."""
        losses_K = torch.stack(self.losses).mean(0)
        self.losses.clear()
        return losses_K


def flatten_objectives(values_BAK: Tensor) -> Tensor:
    """(B, A, K) → (B, A·K), token by token.

    For n tokens of padding OpenRLHF's buffers drop n ≤ n·K entries on the right, and they pad shorter rows on the
    right: either way the A'·K entries of a row's A' tokens remain its first entries.
    """
    return values_BAK.flatten(1)


def unflatten_objectives(flat: Tensor, like_KBA: Tensor) -> Tensor:
    """Invert ``flatten_objectives`` after OpenRLHF's buffers: (B, ≥ A·K) → (K, B, A)."""
    num_objectives, _, num_tokens = like_KBA.shape
    values_BAK = flat[:, : num_tokens * num_objectives].reshape(-1, num_tokens, num_objectives)
    return values_BAK.movedim(-1, 0)

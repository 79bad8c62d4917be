"""A critic with one value head per objective on one trunk, trained with the host's own value loss once per objective.

``values`` and ``returns`` are (B, A, K) between critic and estimator. Where they pass through the host's buffers, which
cut and pad the last axis in steps of tokens, they are flat: see ``flatten_objectives``.
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

from pama_plugin.errors import ConfigError
from pama_plugin.host.protocols import Strategy
from pama_plugin.settings.objective import Objective

HEADS = "value_heads"
# Beside the saved value network, because the host can load a network with one head only.
HEADS_FILE = "value_heads.safetensors"


@ray.remote(num_gpus=1)
class CriticModelActor(ppo_critic.CriticModelActor.__ray_metadata__.modified_class):
    """The host's critic; with more than one objective its value head gives way to one head per objective."""

    def init_model_from_pretrained(self, strategy: Strategy, pretrain: str, max_steps: int) -> None:
        objectives = strategy.args.pama.trained
        own = objective_of(objectives, pretrain)
        if own is not None:  # the strategy, and so its arguments, are this rank's own copy
            strategy.args.ds.value_head_prefix = own.settings.value_head_prefix or strategy.args.ds.value_head_prefix
        if len(objectives) > 1:
            # Between the host's building of the model and DeepSpeed's taking it over there is this one call.
            prepare = strategy.prepare
            strategy.prepare = lambda pair: prepare((add_value_heads(pair[0], objectives, pretrain), pair[1]))
        super().init_model_from_pretrained(strategy, pretrain, max_steps)
        restore_normalization(self.critic.module)
        self.names = strategy.args.pama.trained_names
        self.trainer.critic_loss_fn = MultiObjectiveValueLoss(self.trainer.critic_loss_fn)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The values, (B, A) of one objective or (B, A, K)."""
        values = super().forward(*args, **kwargs)
        return values if values.dim() == 2 else values.movedim(0, -1)

    def fit(self) -> dict[str, float]:
        """Train; the host's ``critic_loss`` and ``values`` are means over the objectives, whose own losses follow."""
        status: dict[str, float] = super().fit()
        if not status:  # fewer responses than a micro-batch: the host trains on none
            return status
        losses_K = self.trainer.critic_loss_fn.pop_losses()
        status["values"] /= len(self.names)  # the host summed over the heads
        own = {f"critic_loss/{name}": loss.item() for name, loss in zip(self.names, losses_K)}
        return status | self.strategy.all_reduce(own)

    def save_model(self) -> None:
        super().save_model()
        if self.tokenizer is None or len(self.names) == 1:  # nothing was saved, or the host saved it all
            return
        heads = self.critic.module.get_submodule(HEADS)
        with deepspeed.zero.GatheredParameters([heads.weight]):
            if self.strategy.is_rank_0():
                path = os.path.join(self.strategy.args.ckpt.output_dir + "_critic", HEADS_FILE)
                weight = heads.weight.detach().float().cpu().contiguous()
                save_file({HEADS: weight}, path, metadata={"objectives": json.dumps(self.names)})


def add_value_heads(critic: nn.Module, objectives: tuple[Objective, ...], pretrain: str) -> nn.Module:
    """Put ``nn.Linear(hidden, K)`` in the place of the host's value head, in ``critic`` itself.

    The heads are those saved with ``pretrain`` or else new ones, as small as the host's own; an objective whose reward
    model ``pretrain`` is keeps that model's head. Every rank draws the same ones.

    Args:
        critic: as the host built it.
        objectives: the K objectives, in the order of the heads.
        pretrain: what ``critic`` was loaded from.

    Returns:
        ``critic``, which now gives values (K, B, A), so that the host's (B, A) masks broadcast against them.
    """
    model: Any = critic  # OpenRLHF's class, which it makes anew for every architecture
    stock = getattr(model, model.value_head_prefix)
    with deepspeed.zero.GatheredParameters([stock.weight]):
        stock_1H = stock.weight.detach().float().cpu()
    if model.normalize_reward:  # the model's own scale; one model's mean and std are not the other objectives'
        stock_1H = stock_1H / getattr(model.config, "std", 1.0)
        model.normalize_reward = False
    saved = load_value_heads(pretrain, tuple(objective.name for objective in objectives))
    if saved is None:
        hidden = stock_1H.shape[1]
        saved = torch.randn(len(objectives), hidden, generator=torch.Generator().manual_seed(0)) / (hidden + 1)
        if (own := objective_of(objectives, pretrain)) is not None:
            saved[objectives.index(own)] = stock_1H
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
    missing_axes = (None,) * (2 if model.packing_samples else 1)  # the host's unpacking leaves an axis of size 1

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
    """The (K, hidden) heads saved with a value network, in the order of ``names``; None if it has none.

    Raises:
        ConfigError: the heads are those of other objectives.
    """
    if os.path.isdir(pretrain):
        path = os.path.join(pretrain, HEADS_FILE)
    else:  # a name on the hub; one that does not exist is the host's to refuse
        quiet = {f"_raise_exceptions_for_{cause}": False for cause in ("missing_entries", "connection_errors")}
        path = cached_file(pretrain, HEADS_FILE, **quiet)
    if path is None or not os.path.isfile(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found: list[str] = json.loads(file.metadata()["objectives"])
            heads: Tensor = file.get_tensor(HEADS)
    except Exception as error:  # a damaged file may raise anything
        raise ConfigError(f"{path} must hold value heads that can be read, found {error}") from error
    if sorted(found) != sorted(names):
        raise ConfigError(
            f"a critic needs one value head per objective ({', '.join(names)}), found the heads of "
            f"{', '.join(found)} in {pretrain}: give another --critic.model_name_or_path"
        )
    return heads[[found.index(name) for name in names]]


def objective_of(objectives: tuple[Objective, ...], pretrain: str) -> Objective | None:
    """The first objective scored in ranks whose model ``pretrain`` is."""
    place = os.path.realpath(pretrain)
    models = (objective for objective in objectives if objective.reward_kind.scored_in == "ranks")
    return next((objective for objective in models if os.path.realpath(objective.location) == place), None)


def restore_normalization(model: nn.Module) -> None:
    """Set the buffers with which --reward.normalize_enable scales rewards and values to what the model's config says.

    The host sets them in the constructor; transformers 5 then loads through the meta device, which leaves buffers that
    are not saved uninitialised. Remove when every supported release has https://github.com/OpenRLHF/OpenRLHF/pull/1343.
    """
    buffers: Any = model
    buffers.mean.fill_(getattr(model.config, "mean", 0.0))
    buffers.std.fill_(getattr(model.config, "std", 1.0))


class MultiObjectiveValueLoss(nn.Module):
    """``1/K Σ_i L(V_i, R_i)`` with the host's clipped value loss ``L``; keeps the K losses of each call."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock
        self.losses: list[Tensor] = []

    def forward(self, values: Tensor, old_values: Tensor, returns: Tensor, **batch: Any) -> Tensor:
        """``values`` is (B, A) or (K, B, A), the other two as ``flatten_objectives`` left them."""
        values_KBA = values.reshape(-1, *values.shape[-2:])
        old_values_KBA, returns_KBA = (unflatten_objectives(flat, values_KBA) for flat in (old_values, returns))
        own = zip(values_KBA, old_values_KBA, returns_KBA)
        losses_K = torch.stack([self.stock(*triple, **batch) for triple in own])
        self.losses.append(losses_K.detach())
        return losses_K.mean()

    def pop_losses(self) -> Tensor:
        """The (K,) means over the calls since the last time."""
        losses_K = torch.stack(self.losses).mean(0)
        self.losses.clear()
        return losses_K


def flatten_objectives(values_BAK: Tensor) -> Tensor:
    """(B, A, K) → (B, A·K), token by token.

    The host's buffers drop n ≤ n·K entries on the right for n tokens of padding, and pad rows of different length on
    the right: either way the A'·K entries of a row's A' tokens stay its first ones.
    """
    return values_BAK.flatten(1)


def unflatten_objectives(flat: Tensor, like_KBA: Tensor) -> Tensor:
    """What ``flatten_objectives`` made, after the host's buffers → (K, B, A)."""
    num_objectives, _, num_tokens = like_KBA.shape
    values_BAK = flat[:, : num_tokens * num_objectives].reshape(-1, num_tokens, num_objectives)
    return values_BAK.movedim(-1, 0)

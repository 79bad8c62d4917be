"""Estimates the GPU memory that the models of a plan keep.

A rank of a model with P parameters in its base, of which it trains T, or T in adapters, keeps on N data-parallel ranks,
in bytes,

    weights     b P, plus b T of adapters                          ÷ N with ZeRO-3
    gradients   b T                                                ÷ N with ZeRO-2 and 3
    optimizer   12 T: float32 weights and Adam's two moments       ÷ N with ZeRO-1, 2 and 3

with b = 2 for bf16 and fp16, b = 4 for fp32, of which ZeRO-0 has no second copy, and 0.516 for a weight in 4 bits
(Rajbhandari et al., ZeRO, arXiv 1910.02054, section 3). ``tests/benchmarks/memory.py`` holds it against DeepSpeed.
"""

import argparse
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from pama_plugin.host.preflight.placement import Plan, Role, reward_role
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig

# NF4 has 4 bits for a weight, 8 for the scale of 64 weights, 32 for that of 256 scales (QLoRA, arXiv 2305.14314).
IN_4_BITS = (4 + 8 / 64 + 32 / (64 * 256)) / 8
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "float32": 4, "bfloat16": 2, "float16": 2}


class Size(NamedTuple):
    """Numbers of parameters: of a model, of its linear layers without the head, and of adapters on them."""

    model: int
    linear: int
    adapters: int


def measure(model: nn.Module, rank: int = 0, targets: str | list[str] = "all-linear") -> Size:
    """Count a model's parameters, and those that adapters of a rank would have.

    Args:
        model: may be on the meta device.
        rank: of the adapters.
        targets: names of linear layers, or ``all-linear`` for all but the head.

    >>> measure(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)), rank=2)
    Size(model=44, linear=32, adapters=24)
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head
    }
    adapted = [
        layer for name, layer in linear.items() if targets == "all-linear" or name.rpartition(".")[2] in set(targets)
    ]
    return Size(
        model=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(layer.weight.numel() for layer in linear.values()),
        adapters=rank * sum(layer.in_features + layer.out_features for layer in adapted),
    )


def kept(weights: float, trained: int, size: int, *, stage: int, ranks: int, adam_offload: bool = False) -> float:
    """Bytes that one rank keeps: the equation of this module.

    Args:
        weights: bytes of all weights, with those of adapters.
        trained: number of parameters that are trained.
        size: bytes of one of them, b.
        stage: of ZeRO.
        ranks: data-parallel ranks, N.
        adam_offload: the optimizer is in the memory of the CPU.

    >>> kept(2 * 7e9, 7_000_000_000, 2, stage=2, ranks=8) / 1e9  # 14 + (14 + 84) / 8
    26.25
    """
    optimizer = (8 if size == 4 and stage == 0 else 12) * trained
    return (
        weights / (ranks if stage == 3 else 1)
        + size * trained / (ranks if stage >= 2 else 1)
        + (0 if adam_offload else optimizer / (ranks if stage >= 1 else 1))
    )


def estimate(args: argparse.Namespace, config: PamaConfig, plan: Plan) -> dict[str, float]:
    """Return role → GiB that each of its ranks keeps, without activations, DeepSpeed's buffers and vLLM's cache.

    Roles on CPUs, and those whose model this machine cannot read without running its code, are left out.

    Args:
        args: OpenRLHF's flags, flat.
        config: has the models of the objectives.
        plan: has the roles and their ranks.
    """
    objectives = {reward_role(objective): objective for objective in config.scored_in("ranks", "replicas")}
    found = {}
    for role in (role for block in plan.blocks if block.gpus for role in block.roles):
        try:
            if role.name in objectives:
                found[role.name] = _of_reward(args, role, objectives[role.name]) / 2**30
            else:
                found[role.name] = _of_host(args, config, role) / 2**30
        except (OSError, ValueError):
            continue
    return found


def _of_host(args: argparse.Namespace, config: PamaConfig, role: Role) -> float:
    location, trained = getattr(args, "actor.model_name_or_path"), 0
    if role.name == "rollout":
        return 2 * measure(_empty(AutoModelForCausalLM, location)).model / getattr(args, "vllm.tensor_parallel_size")
    size = BYTES[getattr(args, "ds.param_dtype")]
    if role.name == "policy":
        rank, targets = getattr(args, "ds.lora.rank"), getattr(args, "ds.lora.target_modules")
        found = measure(_empty(AutoModelForCausalLM, location), rank, targets)
        weights = size * (found.model + found.adapters)
        if getattr(args, "ds.load_in_4bit"):
            weights += (IN_4_BITS - size) * found.linear
        trained = found.adapters if rank else found.model
    elif role.name == "critic":
        models = [objective.location for objective in config.scored_in("ranks") if objective in config.trained]
        location = getattr(args, "critic.model_name_or_path") or next(iter(models), location)
        trained = measure(_empty(AutoModel, location)).model
        weights = size * trained
    else:
        weights = 0 if getattr(args, "ref.offload") else size * measure(_empty(AutoModelForCausalLM, location)).model
    return _sharded(args, role, weights, trained)


def _of_reward(args: argparse.Namespace, role: Role, objective: Objective) -> float:
    options = objective.settings
    if objective.reward_kind.scored_in == "replicas":
        model = _empty(AutoModelForSequenceClassification, objective.location)
        return BYTES.get(options.dtype, model.dtype.itemsize) * measure(model).model
    offload = getattr(args, "reward.offload") if options.offload is None else options.offload
    weights = BYTES[getattr(args, "ds.param_dtype")] * measure(_empty(AutoModel, objective.location)).model
    return _sharded(args, role, 0 if offload else weights, 0)


def _sharded(args: argparse.Namespace, role: Role, weights: float, trained: int) -> float:
    split, ring = getattr(args, "ds.tensor_parallel_size"), getattr(args, "ds.ring_attn_size")
    stage, size = getattr(args, "ds.zero_stage"), BYTES[getattr(args, "ds.param_dtype")]
    ranks, offload = role.ranks // split // ring, getattr(args, "ds.adam_offload")
    return kept(weights, trained, size, stage=stage, ranks=ranks, adam_offload=offload) / split


def _empty(kind: Any, location: str) -> Any:
    """The model without its weights."""
    config = AutoConfig.from_pretrained(location, trust_remote_code=False)  # the default would ask the user
    with torch.device("meta"):
        return kind.from_config(config)

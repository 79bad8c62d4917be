"""Estimates the GPU memory that the models of a plan keep, and most of what a step needs.

A rank of a model with P parameters in its base, of which it trains T, or T in adapters, keeps on N ranks, in bytes,

    weights     b P, plus b T of adapters                              ÷ N with ZeRO-3
    gradients   b T                                                    ÷ N with ZeRO-2 and 3
    optimizer   12 T: float32 weights and Adam's two moments           ÷ N with ZeRO-1, 2 and 3
    step        4 T: gradients in float32, while the optimizer runs    ÷ N with ZeRO-1, 2 and 3

with b = 2 for bf16 and fp16, b = 4 for fp32, of which ZeRO-0 has a second copy neither of weights nor of gradients.
A weight in 4 bits takes 0.516. Not counted: activations, buckets of DeepSpeed (up to 2 GiB), --ds.zpg and
--train.enable_ema. After Rajbhandari et al., ZeRO, arXiv 1910.02054, section 3; ``tests/benchmarks/memory.py`` compares
it with what DeepSpeed keeps.
"""

import argparse
import functools
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from pama_plugin.errors import problem_of
from pama_plugin.host.preflight.placement import Plan, Role, reward_role
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig

GIB = 2**30
# NF4 has 4 bits for a weight, 8 for the scale of 64 weights, 32 for that of 256 scales (QLoRA, arXiv 2305.14314).
IN_4_BITS = (4 + 8 / 64 + 32 / (64 * 256)) / 8
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "float32": 4, "bfloat16": 2, "float16": 2}


class Size(NamedTuple):
    """Numbers of parameters: of the base, of its linear layers without the head, and of adapters."""

    base: int
    linear: int
    adapters: int


class Memory(NamedTuple):
    """GiB that each rank of a role keeps, by the name of the role, and the reasons why others are not known."""

    by_role: dict[str, float]
    unknown: dict[str, str]


def measure(model: Any, rank: int = 0, targets: str | list[str] = "all-linear") -> Size:
    """Count the parameters of a language model, and those that PEFT's adapters of a rank would have.

    Args:
        model: of transformers, may be on the meta device. With a rank it gets the adapters.
        rank: of the adapters.
        targets: the layers that have adapters, as PEFT takes them.
    """
    base = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    in_linear = sum(layer.weight.numel() for layer in linear)
    if not rank:
        return Size(base, in_linear, 0)
    from peft import LoraConfig, get_peft_model  # late: most plans have no adapters

    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
    return Size(base, in_linear, sum(each.numel() for each in adapted.parameters() if each.requires_grad))


def kept(weights: float, trained: int, size: int, *, stage: int, ranks: int, adam_offload: bool = False) -> float:
    """Bytes that one rank keeps, with what its optimizer needs for a step: the equation of this module.

    Args:
        weights: bytes of all weights, with those of adapters.
        trained: number of parameters that are trained.
        size: bytes of one of them, b.
        stage: of ZeRO.
        ranks: ranks that share, N.
        adam_offload: the optimizer, and from ZeRO-2 on the gradients, are in the memory of the CPU.

    >>> kept(2 * 7e9, 7_000_000_000, 2, stage=2, ranks=8) / 1e9  # 14 + (14 + 84 + 28) / 8
    29.75
    """
    optimizer = 8 if size == 4 and stage == 0 else 12 + 4
    return (
        weights / (ranks if stage == 3 else 1)
        + (0 if adam_offload and stage >= 2 else size * trained / (ranks if stage >= 2 else 1))
        + (0 if adam_offload else optimizer * trained / (ranks if stage >= 1 else 1))
    )


def estimate(args: argparse.Namespace, config: PamaConfig, plan: Plan) -> Memory:
    """Estimate what each model of a plan keeps on its GPUs. vLLM takes its share of a GPU whatever its model needs.

    Args:
        args: OpenRLHF's flags, flat.
        config: has the models of the objectives.
        plan: has the roles and their ranks.
    """
    objectives = {reward_role(source): source.objectives[0] for source in config.sources("ranks", "replicas")}
    found = Memory({}, {})
    for role in (role for block in plan.blocks if block.gpus for role in block.roles if role.name != "rollout"):
        try:
            if role.name in objectives:
                bytes_kept = _of_reward(args, role, objectives[role.name])
            else:
                bytes_kept = _of_host(args, config, role)
            found.by_role[role.name] = bytes_kept / GIB
        except Exception as error:  # the code of any model may raise anything; a plan needs none of them
            found.unknown[role.name] = problem_of(error)
    return found


def _of_host(args: argparse.Namespace, config: PamaConfig, role: Role) -> float:
    location, size, stage = (
        getattr(args, key) for key in ("actor.model_name_or_path", "ds.param_dtype", "ds.zero_stage")
    )
    width = BYTES[size]
    if role.name == "reference":
        # Without ZeRO-3 DeepSpeed keeps the parameters on the GPU all the same.
        offloaded = getattr(args, "ref.offload") and stage == 3
        return _sharded(args, role, 0 if offloaded else width * _base(AutoModelForCausalLM, location), 0)
    if role.name == "critic":
        models = [objective.location for objective in config.scored_in("ranks") if objective in config.trained]
        trained = _base(AutoModel, getattr(args, "critic.model_name_or_path") or next(iter(models), location))
        return _sharded(args, role, width * trained, trained)
    rank, targets = getattr(args, "ds.lora.rank"), getattr(args, "ds.lora.target_modules")
    found = measure(_empty(AutoModelForCausalLM, location), rank, targets)
    weights: float = width * (found.base + found.adapters)
    if getattr(args, "ds.load_in_4bit"):
        weights += (IN_4_BITS - width) * found.linear
    return _sharded(args, role, weights, found.adapters if rank else found.base)


def _of_reward(args: argparse.Namespace, role: Role, objective: Objective) -> float:
    options = objective.settings
    if objective.reward_kind.scored_in == "replicas":
        model = _empty(AutoModelForSequenceClassification, objective.location)
        return BYTES.get(options.dtype, model.dtype.itemsize) * sum(each.numel() for each in model.parameters())
    offload = getattr(args, "reward.offload") if options.offload is None else options.offload
    weights = BYTES[getattr(args, "ds.param_dtype")] * _base(AutoModel, objective.location)
    return _sharded(args, role, 0 if offload and getattr(args, "ds.zero_stage") == 3 else weights, 0)


def _sharded(args: argparse.Namespace, role: Role, weights: float, trained: int) -> float:
    split, stage = getattr(args, "ds.tensor_parallel_size"), getattr(args, "ds.zero_stage")
    size, offload = BYTES[getattr(args, "ds.param_dtype")], getattr(args, "ds.adam_offload")
    return kept(weights, trained, size, stage=stage, ranks=role.ranks // split, adam_offload=offload) / split


@functools.cache
def _base(kind: Any, location: str) -> int:
    return sum(parameter.numel() for parameter in _empty(kind, location).parameters())


def _empty(kind: Any, location: str) -> Any:
    """The model without its weights."""
    # By default transformers would ask the user whether to run a model's code.
    config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    with torch.device("meta"):
        return kind.from_config(config, trust_remote_code=False)

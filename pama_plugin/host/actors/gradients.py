"""The gradient probe: the true cosine between the policy's update and each objective's update.

Rules combine advantages as if the gradients of different tokens were orthogonal and of equal length. They are not.
The cosine compares the policy's gradient under the combined advantages with its gradient under one objective's
advantages, without the KL and entropy terms, clipping and the optimizer's scaling.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import ray
import torch
from torch import Tensor

from pama_plugin.errors import PamaError
from pama_plugin.host.protocols import Experience

RESPONSES = 16  # use at least this many, in whole micro-batches spread evenly over the rollout


class Part(NamedTuple):
    """Responses of one forward pass of the policy; the first row of the advantages is the combined one."""

    sequences: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    advantages_JbA: Tensor


def gradient_cosines(
    group: Any,
    experiences: list[Experience],
    advantages_KBA: Tensor,
    combined_BA: Tensor,
    size: int,
    *,
    mean_per_response: bool,
    all_ranks: bool,
) -> list[float]:
    """Cosine between the gradient of the policy loss under ``combined_BA`` and under each objective's advantages.

    At the policy that sampled the responses the importance ratio is 1 and nothing is clipped: the gradient is
    ``−Σ_t A[t] · ∇ log π[t]``, with a response's term divided by its length where OpenRLHF's loss does so. This takes
    K + 1 backward passes; two gradients are held at once, in the policy's precision.

    Args:
        group: the policy's actor group.
        experiences: the micro-batches of the rollout.
        advantages_KBA: (K, B, A), 0 where an objective has no reward.
        combined_BA: (B, A) for the responses of all micro-batches, in order.
        size: the number of responses in one training micro-batch of the policy.
        mean_per_response: the loss averages over each response's tokens, then over responses, not over all tokens.
        all_ranks: run on all ranks; with ZeRO-3 a single rank would wait for the others' shards of the parameters.

    Returns:
        K cosines, NaN where one of the two gradients is 0.
    """
    sizes = [len(experience.sequences) for experience in experiences]
    advantages = torch.split(torch.cat([combined_BA.unsqueeze(0), advantages_KBA]), sizes, dim=1)
    for count in range(1, len(sizes) + 1):
        chosen = [position * len(sizes) // count for position in range(count)]
        if sum(sizes[index] for index in chosen) >= RESPONSES:
            break
    parts = []
    for index in chosen:
        experience = experiences[index]
        advantages_JbA = advantages[index][..., : experience.action_mask.shape[1]]
        if mean_per_response:
            advantages_JbA = advantages_JbA / experience.action_mask.sum(-1, keepdim=True).clamp(min=1)
        columns = (experience.sequences, experience.attention_mask, experience.action_mask)
        split = [torch.split(column, size) for column in columns]
        split.append(torch.split(advantages_JbA, size, dim=1))
        parts += [Part(*part) for part in zip(*split)]
    ranks = group._actor_handlers if all_ranks else group._actor_handlers[:1]
    cosines: list[float] = ray.get([rank.__ray_call__.remote(cosines_on_rank, parts) for rank in ranks])[0]
    return cosines


def cosines_on_rank(rank: Any, parts: list[Part]) -> list[float]:
    """Runs in a policy actor; does not change its parameters, gradients, random state or DeepSpeed engine."""
    actor, engine = rank.actor, rank.actor.model
    if getattr(actor, "is_vlm", False):
        raise PamaError("--pama.probe_gradients must be left out with a policy that reads images")
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    actor.train()  # as in training, where gradient checkpointing saves memory
    actor.model = engine.module  # the engine would count a backward pass as part of its training step
    try:
        combined = _gradient(actor, parameters, parts, 0)
        length = math.sqrt(_product(combined, combined))
        cosines = []
        for row in range(1, len(parts[0].advantages_JbA)):
            gradient = _gradient(actor, parameters, parts, row)
            lengths = length * math.sqrt(_product(gradient, gradient))
            cosines.append(_product(combined, gradient) / lengths if lengths else math.nan)
        return cosines
    finally:
        actor.model = engine


def _gradient(actor: Any, parameters: list[Tensor], parts: Iterable[Part], row: int) -> list[Tensor | None]:
    """The gradient of the loss ``−Σ_t A[t] · log π[t]`` over all parts, with the same dropout for every row."""
    device = parameters[0].device
    total: list[Tensor | None] = [None] * len(parameters)
    with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for part in parts:
            sequences, attention_mask, action_mask, advantages_JbA = (tensor.to(device) for tensor in part)
            log_probs_bA = actor(sequences, action_mask, attention_mask=attention_mask)
            loss = -(log_probs_bA * advantages_JbA[row] * action_mask).sum()
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)  # some experts may be unused
            total = [new if old is None else old if new is None else old.add_(new) for old, new in zip(total, grads)]
    return total


def _product(one: list[Tensor | None], other: list[Tensor | None]) -> float:
    pairs = [(a, b) for a, b in zip(one, other) if a is not None and b is not None]
    return float(sum((a.float() * b.float()).sum(dtype=torch.float64) for a, b in pairs))

"""The gradient probe: the true cosine between the policy's update and each objective's update.

Rules combine advantages as if the gradients of different tokens were orthogonal and of equal length. They are not.
The probe compares the policy's gradient under the combined advantages with its gradients under the objectives'
advantages, without the KL and entropy terms, clipping and the optimizer's scaling.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
import torch
from torch import Tensor

from pama_plugin.batch.gradient_gram import sketch
from pama_plugin.errors import PamaError
from pama_plugin.host.protocols import Experience

RESPONSES, BLOCKS = 64, 4  # use at least this many, spread evenly over the rollout


class Part(NamedTuple):
    """Responses of one forward pass of the policy; the first row of the advantages is the combined one."""

    block: int
    sequences: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    advantages_JbA: Tensor


def gradient_products(
    group: Any,
    experiences: list[Experience],
    advantages_KBA: Tensor,
    combined_BA: Tensor,
    rows_GN: Tensor,
    size: int,
    *,
    mean_per_response: bool,
    all_ranks: bool,
) -> Tensor:
    """Products of the gradients of the policy loss in M disjoint blocks of responses, each of whole prompts.

    At the policy that sampled the responses the importance ratio is 1 and nothing is clipped: the gradient is
    ``−Σ_t A[t] · ∇ log π[t] / T`` over the T tokens of a block, or the mean over its responses of such means, where
    OpenRLHF's loss is one. This takes K + 1 forward and backward passes for each part of a block; one gradient is held
    at once, in the policy's precision, and one sketch of each.

    Args:
        group: the policy's actor group.
        experiences: the micro-batches of the rollout.
        advantages_KBA: (K, B, A), 0 where an objective has no reward.
        combined_BA: (B, A) for the responses of all micro-batches, in order.
        rows_GN: the N responses to each of G prompts.
        size: the number of responses in one training micro-batch of the policy.
        mean_per_response: the loss averages over each response's tokens, then over responses, not over all tokens.
        all_ranks: run on all ranks; with ZeRO-3 a single rank would wait for the others' shards of the parameters.

    Returns:
        (M, J, M, J) ``⟨g_i^a, g_j^b⟩`` of blocks a, b, where gradient 0 of J = K + 1 is that of ``combined_BA``.
    """
    advantages_JBA = torch.cat([combined_BA.unsqueeze(0), advantages_KBA])
    parts: list[Part] = []
    for block, rows in enumerate(choose_blocks(rows_GN, size)):
        responses = _gather(experiences, rows.tolist())
        advantages_JbA = advantages_JBA[:, rows, : responses[2].shape[1]] * responses[2]
        tokens_b1 = responses[2].sum(-1, keepdim=True).clamp(min=1)
        advantages_JbA = advantages_JbA / (tokens_b1 * len(rows) if mean_per_response else tokens_b1.sum())
        columns = [torch.split(column, size) for column in responses]
        columns.append(torch.split(advantages_JbA, size, dim=1))
        parts += [Part(block, *part) for part in zip(*columns)]
    ranks = group._actor_handlers if all_ranks else group._actor_handlers[:1]
    products: Tensor = ray.get([rank.__ray_call__.remote(products_on_rank, parts) for rank in ranks])[0]
    return products


def choose_blocks(rows_GN: Tensor, size: int) -> list[Tensor]:
    """The responses of each block: whole prompts, spread over the rollout, as many as fit into one forward pass.

    >>> [rows.tolist() for rows in choose_blocks(torch.arange(16).reshape(8, 2), size=2)][:2]
    [[0, 1], [2, 3]]
    """
    prompts, responses = rows_GN.shape
    per_block = max(min(size // responses, prompts // BLOCKS), 1)
    count = min(prompts // per_block, max(BLOCKS, math.ceil(RESPONSES / (per_block * responses))))
    starts = [position * (prompts // per_block) // count * per_block for position in range(count)]
    return [rows_GN[start : start + per_block].flatten() for start in starts]


def _gather(experiences: Sequence[Experience], rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences, attention masks and action masks of the responses, padded to the longest on the right."""
    places = [(experience, row) for experience in experiences for row in range(len(experience.sequences))]
    columns = []
    for name in ("sequences", "attention_mask", "action_mask"):
        picked = [getattr(places[row][0], name)[places[row][1]] for row in rows]
        columns.append(torch.nn.utils.rnn.pad_sequence(picked, batch_first=True))
    return columns[0], columns[1], columns[2]


def products_on_rank(rank: Any, parts: Sequence[Part]) -> Tensor:
    """Runs in a policy actor; does not change its parameters, gradients, random state or DeepSpeed engine."""
    actor, engine = rank.actor, rank.actor.model
    if getattr(actor, "is_vlm", False):
        raise PamaError("--pama.probe_gradients must be left out with a policy that reads images")
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    actor.train()  # as in training, where gradient checkpointing saves memory
    actor.model = engine.module  # the engine would count a backward pass as part of its training step
    try:
        sketches_MJW = _sketch_blocks(actor, parameters, parts)
        return torch.einsum("aiw,bjw->aibj", sketches_MJW, sketches_MJW).cpu()
    finally:
        actor.model = engine


def _sketch_blocks(actor: Any, parameters: list[Tensor], parts: Sequence[Part]) -> Tensor:
    """(M, J, W) sketches of the gradients of ``−Σ_t A[t] · log π[t]``, with the same dropout for every row."""
    device = parameters[0].device
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters]  # ZeRO-3 keeps shards
    rows = len(parts[0].advantages_JbA)
    sketches: dict[int, list[Tensor]] = {}
    for part in parts:
        sequences, attention_mask, action_mask, advantages_JbA = (tensor.to(device) for tensor in part[1:])
        found = []
        for advantages_bA in advantages_JbA:
            # A forward pass for each: ZeRO-3 releases the parameters that a graph holds after its backward pass.
            with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                log_probs_bA = actor(sequences, action_mask, attention_mask=attention_mask)
                loss = -(log_probs_bA * advantages_bA * action_mask).sum()
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)  # some experts may be unused
            found.append(sketch(gradients, sizes).to(device))
        before = sketches.get(part.block, [torch.zeros_like(found[0])] * rows)
        sketches[part.block] = [old + new for old, new in zip(before, found, strict=True)]
    return torch.stack([torch.stack(of_block) for of_block in sketches.values()])

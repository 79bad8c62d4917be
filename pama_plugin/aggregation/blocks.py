"""Blocks of responses that fit a processor's cache: a pass reads a large batch from memory once, not per operation.

It also bounds what the operations allocate. Sums over blocks run in double precision and in the order of the batch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers of the (K, b, A) advantages in one block. Measured in tests/benchmarks; a GPU is better off with few launches.
BLOCK = {"cpu": 2**17, "cuda": 2**25}


def blocks(advantages_KBA: Tensor) -> Iterator[slice]:
    """Slices of the responses, in order."""
    objectives, responses, tokens = advantages_KBA.shape
    size = max(BLOCK.get(advantages_KBA.device.type, BLOCK["cuda"]) // max(objectives * tokens, 1), 1)
    for start in range(0, responses, size):
        yield slice(start, start + size)


def valid_at(rows: slice, mask_BA: Tensor, present_KB: Tensor) -> Tensor:
    """(K, b, A) true at the valid tokens of responses that an objective has a reward for; K is 1 if all have all."""
    present_Kb = present_KB[:, rows]
    return mask_BA[rows].unsqueeze(0) if present_Kb.all() else mask_BA[rows] & present_Kb.unsqueeze(-1)


def tokens_per_response(mask_BA: Tensor) -> Tensor:
    """(B,) how many tokens are valid; a sum over all of the mask at once would first copy it as 64-bit integers."""
    return torch.cat([mask_bA.sum(-1) for mask_bA in torch.split(mask_BA, 64)])

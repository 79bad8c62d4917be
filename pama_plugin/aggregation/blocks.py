"""Blocks of responses that fit the processor cache, so that a pass reads a large batch from memory once.

Blocks also bound the memory of temporaries. Sums over blocks use double precision and follow the order of the batch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of the (K, b, A) advantages in one block. Measured in tests/benchmarks; a GPU needs few kernel launches.
BLOCK = {"cpu": 2**17, "cuda": 2**25}


def blocks(advantages_KBA: Tensor) -> Iterator[slice]:
    """Yield slices of the responses, in order."""
    objectives, responses, tokens = advantages_KBA.shape
    size = max(BLOCK.get(advantages_KBA.device.type, BLOCK["cuda"]) // max(objectives * tokens, 1), 1)
    for start in range(0, responses, size):
        yield slice(start, start + size)


def valid_at(rows: slice, mask_BA: Tensor, present_KB: Tensor) -> Tensor:
    """(K, b, A) true at the valid tokens of responses with a reward; (1, b, A) if no reward is missing."""
    present_Kb = present_KB[:, rows]
    return mask_BA[rows].unsqueeze(0) if present_Kb.all() else mask_BA[rows] & present_Kb.unsqueeze(-1)


def tokens_per_response(mask_BA: Tensor) -> Tensor:
    """(B,) number of valid tokens. Splitting avoids a copy of the whole mask as 64-bit integers."""
    return torch.cat([mask_bA.sum(-1) for mask_bA in torch.split(mask_BA, 64)])

"""Blocks of responses that fit a processor's cache: a pass reads a large batch from memory once, not per operation.

It also bounds what the operations allocate. Sums over blocks run in double precision and in the order of the batch.
"""

from collections.abc import Iterator

from torch import Tensor

# Numbers of the (K, b, A) advantages in one block. Measured in tests/benchmarks; a GPU is better off with few launches.
BLOCK = {"cpu": 2**18, "cuda": 2**25}


def blocks(advantages_KBA: Tensor) -> Iterator[slice]:
    """Slices of the responses, in order."""
    objectives, responses, tokens = advantages_KBA.shape
    size = max(BLOCK.get(advantages_KBA.device.type, BLOCK["cuda"]) // max(objectives * tokens, 1), 1)
    for start in range(0, responses, size):
        yield slice(start, start + size)


def valid_at(rows: slice, mask_BA: Tensor, present_KB: Tensor) -> Tensor:
    """(K, b, A) true at the valid tokens of responses that an objective has a reward for; K is 1 if all have all."""
    return mask_BA[rows] & present_KB[:, rows].unsqueeze(-1)

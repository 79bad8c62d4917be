"""What a combination did to each objective, in numbers. Every one states what it is a share or a mean of."""

import torch
from torch import Tensor

from pama_plugin.aggregation.blocks import blocks, tokens_per_response, valid_at

# An objective whose advantages spread (largest − smallest) over less than this share of their largest magnitude is a
# constant up to rounding. A caller that whitened them, which blows rounding up, says so itself: ``active``.
INACTIVE_SPREAD = 1e-6


def describe(advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor, combined_BA: Tensor) -> dict[str, float]:
    """The metrics of ``Aggregation``, of advantages that may have been combined in any way."""
    count = int(mask_BA.count_nonzero())
    conflicts = active = squares = torch.zeros((), dtype=torch.float64, device=mask_BA.device)
    gains_K = torch.zeros(len(advantages_KBA), dtype=torch.float64, device=mask_BA.device)
    for rows in blocks(advantages_KBA):
        valid_KbA = valid_at(rows, mask_BA, present_KB)
        found_KbA = torch.where(valid_KbA, advantages_KBA[:, rows], 0)
        combined_bA = combined_BA[rows]
        conflicts = conflicts + ((found_KbA.amin(0) < 0) & (found_KbA.amax(0) > 0)).sum()
        active = active + (combined_bA != 0).sum()
        squares = squares + combined_bA.square().sum(dtype=torch.float64)
        gains_K += found_KbA.mul_(combined_bA).sum((1, 2), dtype=torch.float64)
    tokens_K = (present_KB * tokens_per_response(mask_BA)).sum(-1).clamp(min=1)
    numbers = torch.stack([active, conflicts, squares, *(gains_K / tokens_K)]).tolist()  # one transfer from a GPU
    active_tokens, conflicting, total, *gains = numbers
    return {
        "active_fraction": active_tokens / max(count, 1),
        "conflict_rate": conflicting / max(count, 1),
        "rms": (total / max(count, 1)) ** 0.5,
    } | {f"gain/{index}": gain for index, gain in enumerate(gains)}


def effective_objectives(coefficients_K: Tensor) -> float:
    """``1 / Σ_i c_i²`` (Simpson): K if all have the same share, 1 if one has all, 0 if there is nothing to share.

    >>> effective_objectives(torch.tensor([0.5, 0.5, 0.0]))
    2.0
    """
    squares = float(coefficients_K.double().square().sum())
    return 1 / squares if squares else 0.0


def inspect(advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor) -> Tensor:
    """(K,) true for the objectives that carry signal: that vary over the valid tokens, or have but one.

    Raises:
        ValueError: a valid token that is not finite.
    """
    lowest_K = advantages_KBA.new_full((len(advantages_KBA),), torch.inf)
    highest_K = -lowest_K
    for rows in blocks(advantages_KBA):
        valid_KbA, a_KbA = valid_at(rows, mask_BA, present_KB), advantages_KBA[:, rows]
        lowest_K = torch.minimum(lowest_K, torch.where(valid_KbA, a_KbA, torch.inf).amin((1, 2)))
        highest_K = torch.maximum(highest_K, torch.where(valid_KbA, a_KbA, -torch.inf).amax((1, 2)))
    tokens_K = (present_KB * tokens_per_response(mask_BA)).sum(-1)
    largest_K = torch.maximum(lowest_K.abs(), highest_K.abs())
    for index in ((tokens_K > 0) & ~largest_K.isfinite()).nonzero().flatten().tolist():
        raise ValueError(f"advantages must be finite at every valid token, found NaN or inf in objective {index}")
    varies_K = highest_K - lowest_K > INACTIVE_SPREAD * largest_K
    one_token = mask_BA.count_nonzero() == 1  # it has no spread to judge by
    return (tokens_K > 0) & (varies_K | one_token)

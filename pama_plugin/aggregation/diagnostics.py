"""Metrics of a combination: its effect on each objective. Each metric states its denominator."""

import torch
from torch import Tensor

from pama_plugin.aggregation.blocks import blocks, tokens_per_response, valid_at

# An objective is constant up to rounding if its advantages spread (largest − smallest) over less than this share of
# their largest magnitude. Whitening amplifies rounding, so a caller that whitened passes ``active`` itself.
INACTIVE_SPREAD = 1e-6


def describe(
    advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor, active_K: Tensor, combined_BA: Tensor
) -> dict[str, float]:
    """Metrics as in ``Aggregation``, for advantages combined by any method."""
    count, everything = int(mask_BA.count_nonzero()), bool(active_K.all())
    conflicts = active = squares = torch.zeros((), dtype=torch.float64, device=mask_BA.device)
    gains_K = torch.zeros(len(advantages_KBA), dtype=torch.float64, device=mask_BA.device)
    for rows in blocks(advantages_KBA):
        valid_KbA = valid_at(rows, mask_BA, present_KB)
        counted_KbA = torch.where(valid_KbA, advantages_KBA[:, rows], 0)
        combined_bA = combined_BA[rows]
        compared_KbA = counted_KbA if everything else counted_KbA[active_K]
        conflicts = conflicts + ((compared_KbA.amin(0) < 0) & (compared_KbA.amax(0) > 0)).sum()
        active = active + (combined_bA != 0).sum()
        squares = squares + combined_bA.square().sum(dtype=torch.float64)
        gains_K += counted_KbA.mul_(combined_bA).sum((1, 2), dtype=torch.float64)
    tokens_K = (present_KB * tokens_per_response(mask_BA)).sum(-1).clamp(min=1)
    numbers = torch.stack([active, conflicts, squares, *(gains_K / tokens_K)]).tolist()  # one transfer from a GPU
    active_tokens, conflicting, total, *gains = numbers
    return {
        "active_fraction": active_tokens / max(count, 1),
        "conflict_rate": conflicting / max(count, 1),
        "rms": (total / max(count, 1)) ** 0.5,
    } | {f"gain/{index}": gain for index, gain in enumerate(gains)}


def effective_objectives(coefficients_K: Tensor) -> float:
    """``1 / Σ_i c_i²`` (inverse Simpson index): K for equal shares, 1 if one objective has all, 0 if all are 0.

    >>> effective_objectives(torch.tensor([0.5, 0.5, 0.0]))
    2.0
    """
    squares = float(coefficients_K.double().square().sum())
    return 1 / squares if squares else 0.0


def inspect(advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor) -> Tensor:
    """(K,) true for active objectives: those that vary over their valid tokens, or if the batch has one valid token.

    Raises:
        ValueError: a valid token is not finite.
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
    one_token = mask_BA.count_nonzero() == 1  # a single token has no spread
    return (tokens_K > 0) & (varies_K | one_token)

"""PAMA: He & Maghsudi, "Pareto Multi-Objective Alignment for Language Models", arXiv 2508.07768, Theorem 1."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pama_plugin.aggregation.registry import Combination, register_rule


@register_rule("pama")
def pama(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_K: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    level: str,
    noon: bool,
) -> Combination:
    """``min_c (Σ_i c_i a_i)²``, c on the simplex (Eq. 10): the projection of 0 on ``[min_i a_i, max_i a_i]``.

    The minimum is ``s* = min_i a_i`` if all are positive, ``max_i a_i`` if all are negative, else 0. ``a_i`` is
    ``A_i / w_i`` with the weights scaled to mean 1: the larger a weight, the more often its objective is the binding
    one, and what it gains is at least in proportion, ``A_i · s* ≥ w_i · s*²``. With Noon ("No Negative", Eq. 5)
    ``a_i`` is ``max(A_i, 0) / w_i``. What is projected is chosen by ``level``:

    - ``token``: every token by itself, ``s*[b,t]``. The paper's bound is exact here, because at one token all
      objectives share the direction ``∇ log π``.
    - ``sequence``: every response by itself; ``a_i`` is the mean over its tokens, ``s*[b]`` goes to all of them.
    - ``batch``: the batch means, as Algorithm 1 is worded; tokens get ``Σ_i c_i a_i``. With Noon, c picks one objective
      a step. Signed batch means vanish under estimators that whiten, and then c is decided by rounding: prefer Noon.

    Objectives that are not active leave the projection: a constant would veto every other one. So does one without a
    reward for a response, for that response.

    Differs from the paper in: the importance ratio is gated by the PPO clip alone, so c is computed once per rollout.
    """
    weights_K = weights_K / weights_K[active_K].mean()
    kept = active_K.nonzero().flatten().tolist()
    absent = [~present_KB[index].unsqueeze(-1) for index in kept]

    def rows(fill: float) -> Iterable[Tensor]:
        """One objective's ``a_i`` after the other, in the same memory; ``fill`` where it has no reward."""
        row_BA = torch.empty_like(advantages_KBA[0])
        for index, absent_B1 in zip(kept, absent):
            yield torch.div(advantages_KBA[index], weights_K[index], out=row_BA).masked_fill_(absent_B1, fill)

    if level == "batch":
        tokens_K = torch.stack([(~absent_B1 & mask_BA).sum() for absent_B1 in absent])
        combined_BA, shares = _project_batch(rows, mask_BA, tokens_K, noon)
    elif level == "sequence":
        lengths_B1 = mask_BA.sum(-1, keepdim=True)
        means = [row.masked_fill_(~mask_BA, 0).sum(-1, keepdim=True) / lengths_B1.clamp(min=1) for row in rows(0)]

        def mean_rows(fill: float) -> Iterable[Tensor]:
            return (mean_B1.masked_fill(absent_B1, fill) for mean_B1, absent_B1 in zip(means, absent))

        combined_B1, shares = _project_units(mean_rows, lengths_B1, noon)
        combined_BA = combined_B1.expand_as(mask_BA)
    else:
        combined_BA, shares = _project_units(rows, mask_BA, noon)
    coefficients_K = torch.zeros_like(weights_K)
    coefficients_K[active_K] = shares.to(coefficients_K.dtype)
    return Combination(combined_BA, coefficients_K)


Rows = Callable[[float], Iterable[Tensor]]


def _project_units(rows: Rows, tokens_U: Tensor, noon: bool) -> tuple[Tensor, Tensor]:
    """``s*`` of every unit, and the mean of c over the tokens (``tokens_U`` in each unit) where ``s* ≠ 0``."""
    projection_U = _closest_to_zero(rows, noon).masked_fill_(tokens_U == 0, 0)
    # Where s* ≠ 0 it equals the extreme objective's own value, and c is 1 there: 1/m each for m objectives in a tie.
    active_U = projection_U != 0
    extreme = [(row_U == projection_U) & active_U for row_U in rows(math.nan)]
    ties_U = sum(hit_U.to(torch.uint8) for hit_U in extreme)
    share_U = tokens_U.to(projection_U.dtype).div_(ties_U)  # infinite where nothing ties, and there nothing hits
    shares_K = torch.stack([share_U.masked_fill(~hit_U, 0).sum() for hit_U in extreme])
    return projection_U, shares_K / shares_K.sum().clamp(min=1)


def _closest_to_zero(rows: Rows, noon: bool) -> Tensor:
    """The projection of 0 on ``[min_i a_i, max_i a_i]``, elementwise; 0 where no objective has a reward."""
    lowest_U = _extreme(rows(math.inf), torch.minimum)
    projection_U = lowest_U.masked_fill_(lowest_U == math.inf, 0).clamp_(min=0)
    if not noon:  # Noon has no use for the maximum: min_i max(a_i, 0) = max(min_i a_i, 0)
        highest_U = _extreme(rows(-math.inf), torch.maximum)
        projection_U += highest_U.masked_fill_(highest_U == -math.inf, 0).clamp_(max=0)
    return projection_U


def _extreme(rows: Iterable[Tensor], pick: Callable[..., Tensor]) -> Tensor:
    """``min_i a_i`` or ``max_i a_i``, elementwise."""
    remaining = iter(rows)
    found_U = next(remaining).clone()
    for row_U in remaining:
        pick(found_U, row_U, out=found_U)
    return found_U


def _project_batch(rows: Rows, mask_BA: Tensor, tokens_K: Tensor, noon: bool) -> tuple[Tensor, Tensor]:
    """``Σ_i c_i a_i`` with one c for the batch: on the lowest and the highest mean, such that their mix is ``s*``.

    An objective's mean is over its own ``tokens_K``, those of the responses that it has a reward for.
    """

    def used() -> Iterable[Tensor]:
        masked = (row_BA.masked_fill_(~mask_BA, 0) for row_BA in rows(0))
        return (row_BA.clamp_(min=0) for row_BA in masked) if noon else masked

    means_K = torch.stack([row_BA.sum() for row_BA in used()]) / tokens_K.clamp(min=1)
    low, high = means_K.min(), means_K.max()
    at_low_K, at_high_K = means_K == low, means_K == high
    # c_low·low + (1 - c_low)·high = 0 unless both have one sign; if low = high, all tie and any c_low is right.
    spread = torch.where(high > low, high - low, 1)
    c_low = (high / spread).clamp(0, 1)
    shares_K = c_low * at_low_K / at_low_K.sum() + (1 - c_low) * at_high_K / at_high_K.sum()
    combined_BA = torch.zeros_like(mask_BA, dtype=means_K.dtype)
    for row_BA, share in zip(used(), shares_K):
        combined_BA += row_BA.mul_(share)
    return combined_BA, shares_K

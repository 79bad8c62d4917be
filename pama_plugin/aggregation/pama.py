"""PAMA: He & Maghsudi, "Pareto Multi-Objective Alignment for Language Models", arXiv 2508.07768, Theorem 1."""

import torch
from torch import Tensor

from pama_plugin.aggregation.registry import Combination, register_rule


@register_rule("pama")
def pama(
    advantages_KBA: Tensor, mask_BA: Tensor, weights_K: Tensor, active_K: Tensor, *, level: str, noon: bool
) -> Combination:
    """``min_c (Σ_i c_i a_i)²``, c on the simplex (Eq. 10): the projection of 0 on ``[min_i a_i, max_i a_i]``.

    The minimum is ``s* = min_i a_i`` if all are positive, ``max_i a_i`` if all are negative, else 0. ``a_i`` is
    ``A_i / w_i`` with the weights scaled to mean 1, so that the gains end up in proportion to the weights; with Noon
    ("No Negative", Eq. 5) it is ``max(A_i, 0) / w_i``. What is projected is chosen by ``level``:

    - ``token``: every token by itself, ``s*[b,t]``. The paper's bound is exact here, because at one token all
      objectives share the direction ``∇ log π``.
    - ``sequence``: every response by itself; ``a_i`` is the mean over its tokens, ``s*[b]`` goes to all of them.
    - ``batch``: the batch means, as Algorithm 1 is worded; tokens get ``Σ_i c_i a_i``. With Noon, c picks one objective
      a step. Signed batch means vanish under estimators that whiten, and then c is decided by rounding: prefer Noon.

    Objectives that are not active leave the projection: a constant would veto every other one.

    Differs from the paper in: the importance ratio is gated by the PPO clip alone, so c is computed once per rollout.
    """
    kept_KBA = advantages_KBA if bool(active_K.all()) else advantages_KBA[active_K]
    kept_K = weights_K[active_K] / weights_K[active_K].mean()
    values_KBA = kept_KBA if bool((kept_K == 1).all()) else kept_KBA / kept_K[:, None, None]
    if level == "batch":
        combined_BA, shares_K = _project_batch(values_KBA, mask_BA, noon)
    elif level == "sequence":
        lengths_B1 = mask_BA.sum(-1, keepdim=True)
        means_KB1 = values_KBA.masked_fill(~mask_BA, 0).sum(-1, keepdim=True) / lengths_B1.clamp(min=1)
        combined_B1, shares_K = _project_units(means_KB1, lengths_B1 > 0, noon)
        combined_BA = combined_B1.expand_as(mask_BA)
    else:
        combined_BA, shares_K = _project_units(values_KBA, mask_BA, noon)
    return Combination(combined_BA, weights_K.new_zeros(len(weights_K)).masked_scatter_(active_K, shares_K))


def _project_units(values_KU: Tensor, valid_U: Tensor, noon: bool) -> tuple[Tensor, Tensor]:
    """``s*`` of every unit, and the mean of c over the units where ``s* ≠ 0``."""
    # Noon needs no copy of the clamped advantages: min_i max(a_i, 0) = max(min_i a_i, 0).
    projection_U = values_KU.amin(0).clamp_(min=0)
    if not noon:
        projection_U += values_KU.amax(0).clamp_(max=0)
    projection_U.masked_fill_(~valid_U, 0)

    # Where s* ≠ 0 it equals the extreme objective's own value, and c is 1 there: 1/m each for m objectives in a tie.
    extreme_KU = (values_KU == projection_U) & (projection_U != 0)
    ties_U = extreme_KU.sum(0, dtype=values_KU.dtype).clamp_(min=1)
    shares_K = torch.stack([(extreme_U / ties_U).sum() for extreme_U in extreme_KU])
    return projection_U, shares_K / shares_K.sum().clamp(min=1)


def _project_batch(values_KBA: Tensor, mask_BA: Tensor, noon: bool) -> tuple[Tensor, Tensor]:
    """``Σ_i c_i a_i`` with one c for the batch: on the lowest and the highest mean, such that their mix is ``s*``."""
    used_KBA = values_KBA.masked_fill(~mask_BA, 0)
    if noon:
        used_KBA.clamp_(min=0)
    means_K = used_KBA.sum((1, 2)) / mask_BA.sum().clamp(min=1)
    low, high = means_K.min(), means_K.max()
    at_low_K, at_high_K = means_K == low, means_K == high
    # c_low·low + (1 - c_low)·high = 0 unless both have one sign; if low = high, all tie and any c_low is right.
    spread = torch.where(high > low, high - low, 1)
    c_low = (high / spread).clamp(0, 1)
    shares_K = c_low * at_low_K / at_low_K.sum() + (1 - c_low) * at_high_K / at_high_K.sum()
    combined_BA = used_KBA.mul_(shares_K[:, None, None]).sum(0)
    return combined_BA, shares_K * bool((combined_BA != 0).any())

"""SAW: objectives weigh as much as their rewards vary relative to their mean (He et al., arXiv 2606.07705)."""

import torch
from torch import Tensor

from pama_plugin.aggregation.group_whitening import group_scores, spread, whiten
from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.rules.linear import length
from pama_plugin.aggregation.weights import shares, weighted_sum


@register_rule("saw")
def saw(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_KB: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    groups_B: Tensor,
    rewards_KB: Tensor,
    whiten_sum: bool = False,
) -> Combination:
    """``Σ_i K (v_i / Σ_j v_j) w_i Z_i`` with ``v_i = std(r_i) / |mean(r_i)|`` over the batch; ``Z_i`` as in ``gdpo``.

    The coefficient of variation v is a proxy for what is left to learn: a reward that nearly all responses earn has
    a small one. It does not depend on the scale of a reward, but on its zero: use rewards whose zero means "nothing",
    such as scores from 0 to 1. A reward with a mean near 0 has all the weight. K counts the active objectives; others
    are excluded. The unit size is that of ``gdpo``, as if all v were equal. Coefficients are the shares of ``v_i w_i``.

    Differs from the paper in: user weights, which it does not have, and, as in ``gdpo``, a constant in place of the
    standard deviation of the sum. Its code, for two rewards, adds 3 to one of them before it takes v, so that the
    rewards are positive; here that is up to the rewards.

    Args:
        groups_B: index of the prompt of each response.
        rewards_KB: the rewards, NaN where missing.
        whiten_sum: whiten the sum over the valid tokens of the batch, as published; see ``gdpo``.

    >>> from pama_plugin import aggregate
    >>> rewards_KB = torch.tensor([[0.0, 1.0], [0.9, 1.0]])  # v = √2 and 0.074
    >>> result = aggregate("saw", rewards_KB[..., None], torch.ones(2, 1), groups_B=[0, 0], rewards_KB=rewards_KB)
    >>> result.coefficients
    tensor([0.9500, 0.0500])
    """
    counted_KB = present_KB & active_K.unsqueeze(-1) & ~rewards_KB.isnan()
    values_KB = rewards_KB.masked_fill(~counted_KB, torch.nan)
    mean_K, count_K = values_KB.nanmean(-1).nan_to_num(), counted_KB.sum(-1)
    deviations_K = (values_KB - mean_K.unsqueeze(-1)).square().nansum(-1)
    smallest_K = 1e-8 * values_KB.abs().nan_to_num().amax(-1).clamp(min=1e-300)
    variation_K = (deviations_K / (count_K - 1).clamp(min=1)).sqrt() / mean_K.abs().maximum(smallest_K)
    if not bool((variation_K > 0).any()):
        variation_K = active_K.double()  # the flags of active objectives come from the caller
    adapted_KB = weights_KB.double() * active_K.sum() * variation_K.unsqueeze(-1) / variation_K.sum()
    combined_B = weighted_sum(adapted_KB, group_scores(advantages_KBA, mask_BA, present_KB, groups_B))
    unit_rms = length(weights_KB * active_K.unsqueeze(-1), present_KB)
    if whiten_sum:
        combined_B, unit_rms = whiten(combined_B, counted_KB.any(0), mask_BA), torch.ones_like(unit_rms)
    metrics = {f"variation/{index}": value for index, value in enumerate(variation_K.tolist())}
    coefficients_K = shares(adapted_KB).to(weights_KB.dtype)
    return Combination(spread(combined_B, mask_BA, weights_KB.dtype), coefficients_K, metrics, unit_rms)

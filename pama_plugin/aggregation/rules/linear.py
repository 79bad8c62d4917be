"""Linear scalarisation of advantages: the weighted sum that most multi-reward trainers use."""

import torch
from torch import Tensor

from pama_plugin.aggregation.blocks import blocks, valid_at
from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.weights import at, shares, weighted_sum


@register_rule("linear")
def linear(
    advantages_KBA: Tensor, mask_BA: Tensor, weights_KB: Tensor, active_K: Tensor, present_KB: Tensor
) -> Combination:
    """``Σ_i w_i A_i``, with ``A_i`` estimated, and whitened if the estimator whitens, for each objective separately.

    The sum for a response is over the active objectives that have a reward for it. Its unit size is ``√(Σ_i w_i²)``
    over the same objectives, so only the ratios of the weights matter, unless ``rescale`` is ``none``. With one
    objective of weight 1 the result is ``A_1`` bit for bit. Coefficients are the shares of the weights.

    On a Pareto front it moves towards the point that the weights define. The result goes to 0 only where the weighted
    advantages cancel, as whitened advantages of two opposed objectives of equal weight do.

    >>> from pama_plugin import aggregate
    >>> advantages_KBA = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]])
    >>> aggregate("linear", advantages_KBA, torch.ones(1, 2), weights=[3, 4], rescale="none").advantages
    tensor([[15.,  2.]])
    >>> aggregate("linear", advantages_KBA, torch.ones(1, 2), weights=[3, 4]).advantages
    tensor([[3.0000, 0.4000]])
    """
    weights_KB = weights_KB * active_K.unsqueeze(-1)
    combined_BA = torch.empty_like(advantages_KBA[0])
    for rows in blocks(advantages_KBA):
        valid_KbA = valid_at(rows, mask_BA, present_KB & active_K.unsqueeze(-1))
        combined_BA[rows] = torch.where(valid_KbA, advantages_KBA[:, rows] * at(rows, weights_KB), 0).sum(0)
    return Combination(combined_BA, shares(weights_KB), unit_rms=length(weights_KB, present_KB))


def length(weights_KB: Tensor, present_KB: Tensor) -> Tensor:
    """(B,) float64 ``√(Σ_i w_i²)`` over the objectives that have a reward for a response."""
    return weighted_sum(weights_KB.double().square(), present_KB.double()).sqrt()

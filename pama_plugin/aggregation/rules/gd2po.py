"""GD2PO: GDPO without the responses on which objectives disagree (arXiv 2606.16771)."""

import math

from torch import Tensor

from pama_plugin.aggregation.group_whitening import group_scores, spread, whiten
from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.rules.linear import length
from pama_plugin.aggregation.weights import shares, weighted_sum

ROUNDING = 1e-9  # a Z that is smaller has no sign: the mean of the group leaves about 1e-16 of a 0


@register_rule("gd2po")
def gd2po(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_KB: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    groups_B: Tensor,
    whiten_sum: bool = False,
) -> Combination:
    """``gdpo`` over the responses on which all ``Z_i`` have the same sign; 0 for all others.

    Independent objectives agree on a share of ``2^(1−K)`` of the responses. The unit size is that of the rule for
    independent standard normal ``Z_i``: ``2^(1−K) (Σ_i w_i² + (2/π) Σ_{i≠j} w_i w_j)`` is its mean square. Weights and
    coefficients are as in ``gdpo``.

    Args:
        groups_B: index of the prompt of each response.
        whiten_sum: whiten the sum over the remaining tokens, as published. That centres it, so of responses with
            positive ``Z_i`` only, the lowest gets a negative advantage. On a Pareto front fewer and fewer responses
            remain, and two on which objectives barely agree get 1 and −1 (a single one gets 0). It has no unit size.

    Differs from the paper in: without ``whiten_sum`` a constant replaces the standard deviation of the sum, and the
    mean is not subtracted.

    >>> import torch
    >>> from pama_plugin import aggregate
    >>> advantages_KBA = torch.tensor([[[-3.0], [1.0], [2.0]], [[-1.0], [2.0], [-1.0]]])
    >>> result = aggregate("gd2po", advantages_KBA, torch.ones(3, 1), groups_B=[0, 0, 0], whiten_sum=True)
    >>> result.advantages.flatten()
    tensor([-1.,  1.,  0.])
    """
    scores_KB = group_scores(advantages_KBA, mask_BA, present_KB, groups_B) * active_K.unsqueeze(-1)
    counted_KB = present_KB & active_K.unsqueeze(-1)
    agreed_B = ~((scores_KB > ROUNDING).any(0) & (scores_KB < -ROUNDING).any(0)) & counted_KB.any(0)
    combined_B, unit_rms = weighted_sum(weights_KB.double(), scores_KB) * agreed_B, None
    if whiten_sum:
        combined_B = whiten(combined_B, agreed_B, mask_BA)
    else:
        squares_B = length(weights_KB, counted_KB).square()
        products_B = weighted_sum(weights_KB.double(), counted_KB.double()).square() - squares_B
        share_B = 2.0 ** (1 - counted_KB.sum(0).clamp(min=1))
        unit_rms = (share_B * (squares_B + 2 / math.pi * products_B)).sqrt()
    return Combination(
        spread(combined_B, mask_BA, weights_KB.dtype), shares(weights_KB * active_K.unsqueeze(-1)), unit_rms=unit_rms
    )

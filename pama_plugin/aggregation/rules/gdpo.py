"""GDPO: whiten each objective within the group of a prompt, then sum (Liu et al., arXiv 2601.05242)."""

import torch
from torch import Tensor

from pama_plugin.aggregation.group_whitening import group_scores, spread, whiten
from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.rules.linear import length
from pama_plugin.aggregation.weights import shares, weighted_sum


@register_rule("gdpo")
def gdpo(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_KB: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    groups_B: Tensor,
    whiten_sum: bool = False,
) -> Combination:
    """``Σ_i w_i Z_i``; ``Z_i`` is ``A_i`` whitened within its group.

    ``Z_i[b] = (m_i[b] − μ) / σ`` is one number per response: ``m_i[b]`` is the mean of ``A_i`` over the tokens of the
    response, μ and σ are its mean and sample standard deviation over the responses to the prompt. So the scale of one
    reward cannot hide another. The unit size is ``√(Σ_i w_i²)``. Coefficients are the shares of the weights. An
    inactive objective is excluded. Needs groups of at least two responses.

    Args:
        groups_B: index of the prompt of each response.
        whiten_sum: whiten the sum over the valid tokens of the batch, as published. That divides it by its standard
            deviation. On a Pareto front, where the ``Z_i`` cancel, this amplifies noise to full steps, and the policy
            drifts: two responses with slightly different sums get 5.6 and −5.6 if the sums of the 62 others cancel.

    Differs from the paper in: without ``whiten_sum`` a constant replaces the standard deviation of the sum. The paper
    whitens rewards instead of ``m``, which is equivalent for estimators that subtract a number per group and assign the
    difference to all tokens (``reinforce_baseline``, ``rloo``, ``group_norm``, ``dr_grpo``, with KL as a loss). It also
    adds small numbers to its denominators; this rule returns 0 for constant values.

    >>> import torch
    >>> from pama_plugin import aggregate
    >>> advantages_KBA = torch.tensor([[[-1.0], [1.0]], [[-50.0], [50.0]]])
    >>> result = aggregate("gdpo", advantages_KBA, torch.ones(2, 1), groups_B=[0, 0], whiten_sum=True)
    >>> result.advantages.flatten()
    tensor([-1.,  1.])
    """
    scores_KB = group_scores(advantages_KBA, mask_BA, present_KB, groups_B)
    weights_KB = weights_KB * active_K.unsqueeze(-1)
    combined_B, unit_rms = weighted_sum(weights_KB.double(), scores_KB), length(weights_KB, present_KB)
    if whiten_sum:
        combined_B, unit_rms = whiten(combined_B, unit_rms > 0, mask_BA), torch.ones_like(unit_rms)
    return Combination(spread(combined_B, mask_BA, weights_KB.dtype), shares(weights_KB), unit_rms=unit_rms)

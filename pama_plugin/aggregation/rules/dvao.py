"""DVAO: objectives weigh as much as their rewards vary within a group (Jiang et al., arXiv 2605.25604)."""

import torch
from torch import Tensor

from pama_plugin.aggregation.group_whitening import group_scores, group_spreads, spread
from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.rules.linear import length
from pama_plugin.aggregation.weights import weighted_sum


@register_rule("dvao")
def dvao(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_KB: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    groups_B: Tensor,
    rewards_KB: Tensor,
) -> Combination:
    """``Σ_i c_i Z_i``, ``c_i = w_i σ_i / Σ_j w_j σ_j``; ``Z_i`` as in ``gdpo``, ``σ_i`` of the rewards of the group.

    An objective for which the responses to a prompt differ little has little weight in this group, whatever weight it
    has in others. If ``Z_i`` is the whitened reward, the result is ``Σ_i w_i (r_i − μ_i) / Σ_j w_j σ_j``: the numerator
    is that of a sum of rewards, and the denominator does not shrink where rewards cancel. Like that sum, it depends on
    the scales of the rewards: use ``normalize=`` if these differ. Coefficients are the means of c over the responses.
    An inactive objective is excluded. The unit size is that of equal σ: ``√(Σ_i w_i²) / Σ_j w_j``.

    Differs from the paper in: we had its abstract only, which weights by "the empirical reward variance of each
    objective within a rollout group" and promises bounded advantages; we read it as σ, because that weighting bounds
    what GRPO divides by the standard deviation of the sum.

    On a Pareto front the result goes to 0 where rewards of one scale cancel. In a group in which the rewards hardly
    differ but agree, it has full size.

    Args:
        groups_B: index of the prompt of each response.
        rewards_KB: the rewards, NaN where missing.

    >>> from pama_plugin import aggregate
    >>> rewards_KB = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    >>> result = aggregate(
    ...     "dvao", rewards_KB[..., None], torch.ones(2, 1), groups_B=[0, 0], rewards_KB=rewards_KB, rescale="none"
    ... )
    >>> result.coefficients, result.advantages.flatten()  # ±(3 − 1) / (3 + 1) / √2
    (tensor([0.7500, 0.2500]), tensor([-0.3536,  0.3536]))
    """
    counted_KB = present_KB & active_K.unsqueeze(-1)
    scores_KB = group_scores(advantages_KBA, mask_BA, present_KB, groups_B)
    spread_KB = group_spreads(rewards_KB.masked_fill(~counted_KB, torch.nan), groups_B)
    c_KB = weights_KB.double() * spread_KB * counted_KB
    c_KB = c_KB / torch.where(c_KB.sum(0) > 0, c_KB.sum(0), 1)
    totals_K, totals_B = c_KB.sum(-1), weighted_sum(weights_KB.double(), counted_KB.double())
    return Combination(
        spread((c_KB * scores_KB).sum(0), mask_BA, weights_KB.dtype),
        (totals_K / totals_K.sum().clamp(min=1e-300)).to(weights_KB.dtype),
        unit_rms=length(weights_KB, counted_KB) / totals_B.clamp(min=1e-300),
    )

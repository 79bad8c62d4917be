"""GDPO: whiten each objective within the group of a prompt, then sum (Liu et al., arXiv 2601.05242)."""

from torch import Tensor

from pama_plugin.aggregation.group_whitening import group_scores, spread_and_whiten
from pama_plugin.aggregation.registry import Combination, register_rule


@register_rule("gdpo")
def gdpo(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_K: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    groups_B: Tensor,
) -> Combination:
    """``Σ_i w_i Z_i``, whitened over the valid tokens of the batch; ``Z_i`` is ``A_i`` whitened within its group.

    ``Z_i[b] = (m_i[b] − μ) / σ`` is one number per response: ``m_i[b]`` is the mean of ``A_i`` over the tokens of the
    response, μ and σ are its mean and sample standard deviation over the responses to the prompt. So the scale of one
    reward cannot hide another. Only the ratios of the weights matter; coefficients are the shares of the weights. An
    inactive objective is excluded. Needs groups of at least two responses.

    Differs from the paper in: the paper whitens rewards instead of ``m``, which is equivalent for estimators that
    subtract a number per group and assign the difference to all tokens (``reinforce_baseline``, ``rloo``,
    ``group_norm``, ``dr_grpo``, with KL as a loss). It also adds small numbers to its denominators; this rule returns 0
    for constant values.

    Whitening the sum, as published, divides it by its standard deviation. On a Pareto front, where the ``Z_i`` cancel,
    this amplifies noise to full steps, and the policy drifts. Two responses with slightly different sums get 5.6 and
    −5.6 if the sums of the 62 others cancel.

    >>> import torch
    >>> from pama_plugin import aggregate
    >>> advantages_KBA = torch.tensor([[[-1.0], [1.0]], [[-50.0], [50.0]]])
    >>> result = aggregate("gdpo", advantages_KBA, torch.ones(2, 1), groups_B=[0, 0])
    >>> result.advantages.flatten()
    tensor([-1.,  1.])
    """
    scores_KB = group_scores(advantages_KBA, mask_BA, present_KB, groups_B)
    scored_B = (present_KB & active_K.unsqueeze(-1)).any(0)
    combined_B = (weights_K * active_K).double() @ scores_KB
    combined_BA = spread_and_whiten(combined_B, scored_B, mask_BA, advantages_KBA.dtype)
    return Combination(combined_BA, weights_K * active_K / weights_K[active_K].sum())

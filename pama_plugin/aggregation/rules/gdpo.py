"""GDPO: each objective whitened within its prompt's group before they are summed (Liu et al., arXiv 2601.05242)."""

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
    """``Σ_i w_i Z_i``, whitened over the valid tokens of the batch; ``Z_i`` is ``A_i`` whitened in its prompt's group.

    Once per response, ``Z_i[b] = (m_i[b] − μ) / σ``: ``m_i[b]`` is the mean of ``A_i`` over the response's tokens, μ
    and σ its mean and sample standard deviation over the prompt's responses. So no reward can hide behind the scale of
    another. The paper has rewards in the place of ``m``, which is the same for estimators that subtract a number per
    group and spread the rest over all tokens (``reinforce_baseline``, ``rloo``, ``group_norm``, ``dr_grpo``, with KL as
    a loss), and adds small numbers to its denominators, where this rule has 0 for what does not vary.
    Only the proportions of weights matter; coefficients are their shares. An objective without signal is left out.
    Needs groups of at least two responses.

    Whitening the sum, as published, divides by what is left of it: on a Pareto front, where the scores cancel, noise is
    blown up to full steps, and the policy walks. Two responses
    that are barely liked among 62 whose scores cancel get 5.6 and −5.6.

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

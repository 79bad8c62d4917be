"""GD2PO: GDPO without the responses on which objectives disagree (arXiv 2606.16771)."""

from torch import Tensor

from pama_plugin.aggregation.group_whitening import group_scores, spread_and_whiten
from pama_plugin.aggregation.registry import Combination, register_rule


@register_rule("gd2po")
def gd2po(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_K: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    groups_B: Tensor,
) -> Combination:
    """``gdpo`` over the responses on which all ``Z_i`` have the same sign; 0 for all others.

    Independent objectives agree on a share of ``2^(1−K)`` of the responses. Whitening is over the remaining responses
    and centres them, so of responses with positive ``Z_i`` only, the lowest gets a negative advantage. Weights and
    coefficients are as in ``gdpo``.

    On a Pareto front fewer and fewer responses remain. Whitening, as published, divides their advantages by their
    standard deviation: two responses on which objectives barely agree get 1 and −1 (a single one gets 0).

    >>> import torch
    >>> from pama_plugin import aggregate
    >>> advantages_KBA = torch.tensor([[[-3.0], [1.0], [2.0]], [[-1.0], [2.0], [-1.0]]])
    >>> result = aggregate("gd2po", advantages_KBA, torch.ones(3, 1), groups_B=[0, 0, 0])
    >>> result.advantages.flatten()
    tensor([-1.,  1.,  0.])
    """
    scores_KB = group_scores(advantages_KBA, mask_BA, present_KB, groups_B) * active_K.unsqueeze(-1)
    agreed_B = ~((scores_KB > 0).any(0) & (scores_KB < 0).any(0)) & (present_KB & active_K.unsqueeze(-1)).any(0)
    combined_BA = spread_and_whiten(weights_K.double() @ scores_KB, agreed_B, mask_BA, advantages_KBA.dtype)
    return Combination(combined_BA, weights_K * active_K / weights_K[active_K].sum())

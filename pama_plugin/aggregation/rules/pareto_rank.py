"""Credit by Pareto rank: a response counts by how many layers of better responses lie above it (arXiv 2606.16111)."""

import functools

import torch
from torch import Tensor

from pama_plugin.aggregation.group_whitening import centre_groups, spread
from pama_plugin.aggregation.registry import Combination, register_rule

_GROUPS = 2**12


@register_rule("pareto_rank")
def pareto_rank(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_KB: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    groups_B: Tensor,
    rewards_KB: Tensor,
) -> Combination:
    """Minus the Pareto rank of a response in its group, minus the mean of the group; the same for all its tokens.

    A response dominates another if no reward is lower and one is higher. Responses that none dominates have rank 0; of
    the others, those that only these dominate have rank 1, and so on (non-dominated sorting, Deb et al., 2002). So only
    the order of each reward matters: no scale and no outlier does, and weights have no meaning. The unit size is that
    for independent rewards without ties, in groups of the same size. In a group, the active objectives are compared
    that have a reward for any of its responses; a response without one of these rewards gets 0. Coefficients are equal
    shares. In small groups, and with many objectives, few responses dominate others, and little is learned; a training
    run needs groups of at least four.

    Differs from the paper in: it is the second of the paper's two stages. Its equations could not be had; the rank is
    as its abstract and reviews describe it, and the unit size is ours.

    On a Pareto front no response dominates another, and all have rank 0, if their rewards differ in more than noise.
    Among responses of equal worth the noise decides, however small it is, and the policy drifts.

    Args:
        groups_B: index of the prompt of each response.
        rewards_KB: the rewards, NaN where missing.

    >>> from pama_plugin import aggregate
    >>> rewards_KB = torch.tensor([[0.0, 1.0, 2.0, 1.0], [0.0, 2.0, 1.0, 1.0]])
    >>> result = aggregate(
    ...     "pareto_rank",
    ...     rewards_KB[..., None],
    ...     torch.ones(4, 1),
    ...     groups_B=[7, 7, 7, 7],
    ...     rewards_KB=rewards_KB,
    ...     rescale="none",
    ... )
    >>> result.advantages.flatten()  # ranks 2, 0, 0, 1
    tensor([-1.2500,  0.7500,  0.7500, -0.2500])
    """
    rewarded_KB = present_KB & ~rewards_KB.isnan()
    rows_GN, filled_GN = _by_group(groups_B)
    rewarded_KGN = rewarded_KB[active_K][:, rows_GN] & (filled_GN & mask_BA.any(-1)[rows_GN])
    applies_KG1 = rewarded_KGN.any(-1, keepdim=True)
    compared_GN = (rewarded_KGN | ~applies_KG1).all(0) & rewarded_KGN.any(0)
    # Equal where an objective does not apply to the group, so that it decides nothing.
    ranks_GN = pareto_ranks(rewards_KB[active_K][:, rows_GN].masked_fill(~applies_KG1, 0), compared_GN)
    compared_B = torch.zeros_like(groups_B, dtype=torch.bool)
    compared_B[rows_GN[filled_GN]] = compared_GN[filled_GN]
    credit_B, unit_rms_B = mask_BA.new_zeros((2, len(groups_B)), dtype=torch.float64)
    credit_B[rows_GN[filled_GN]] = -ranks_GN[filled_GN].double()
    credit_B = centre_groups(credit_B.unsqueeze(0), compared_B.unsqueeze(0), groups_B).squeeze(0)
    sizes = zip(applies_KG1.sum(0).flatten().tolist(), compared_GN.sum(-1).tolist())
    for rows_N, filled_N, (objectives, count) in zip(rows_GN, filled_GN, sizes):
        unit_rms_B[rows_N[filled_N]] = _unit_rms(objectives, count)
    shares_K = active_K.to(weights_KB.dtype) / active_K.sum()
    return Combination(spread(credit_B, mask_BA, weights_KB.dtype), shares_K, unit_rms=unit_rms_B)


def _by_group(groups_B: Tensor) -> tuple[Tensor, Tensor]:
    """(G, N) the responses of each group, and true where there is one: groups may differ in size."""
    order_B = groups_B.argsort(stable=True)
    _, group_B = torch.unique(groups_B, return_inverse=True)
    counts_G = torch.bincount(group_B)
    place_GN = torch.arange(int(counts_G.max()), device=groups_B.device).expand(len(counts_G), -1)
    filled_GN = place_GN < counts_G.unsqueeze(-1)
    starts_G = counts_G.cumsum(0) - counts_G
    return order_B[(starts_G.unsqueeze(-1) + place_GN).clamp(max=len(groups_B) - 1)], filled_GN


def pareto_ranks(values_KGN: Tensor, compared_GN: Tensor) -> Tensor:
    """(G, N) Pareto rank of each of N responses within its group; 0 where ``compared_GN`` is false.

    >>> pareto_ranks(torch.tensor([[[0.0, 1.0, 2.0]], [[0.0, 2.0, 1.0]]]), torch.ones(1, 3, dtype=torch.bool))
    tensor([[1, 0, 0]])
    """
    no_lower_GNM = (values_KGN.unsqueeze(-1) >= values_KGN.unsqueeze(-2)).all(0)
    dominates_GNM = no_lower_GNM & (values_KGN.unsqueeze(-1) > values_KGN.unsqueeze(-2)).any(0)
    left_GN, ranks_GN = compared_GN.clone(), torch.zeros_like(compared_GN, dtype=torch.long)
    while left_GN.any():
        dominated_GN = left_GN & (dominates_GNM & left_GN.unsqueeze(-1)).any(-2)
        ranks_GN += dominated_GN
        left_GN = dominated_GN
    return ranks_GN


@functools.lru_cache(maxsize=64)
def _unit_rms(objectives: int, size: int) -> float:
    """The standard deviation of the rank within groups, for independent rewards; sampled with a fixed seed."""
    if size < 2 or not objectives:
        return 0.0
    values_KGN = torch.rand(objectives, _GROUPS, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranks_GN = pareto_ranks(values_KGN, torch.ones(_GROUPS, size, dtype=torch.bool)).double()
    return float(ranks_GN.var(1, correction=0).mean().sqrt())

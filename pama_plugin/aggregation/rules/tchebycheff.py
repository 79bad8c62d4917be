"""Tchebycheff scalarisation: the reward of a response is its weighted distance to the ideal in the worst objective."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pama_plugin.aggregation.registry import Combination, register_rule


@register_rule("tchebycheff", of="rewards")
def tchebycheff(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_KB: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    ideal: list[Annotated[float, Field(allow_inf_nan=False)]] | None = None,
    augment: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
    smooth: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None,
) -> Combination:
    """``−max_i w_i (z_i − r_i) + ρ Σ_i w_i r_i`` of the rewards (K, B, 1), one reward per response.

    Smooth Tchebycheff (Lin et al., arXiv 2402.19078) replaces the maximum by ``μ log Σ_i exp(w_i (z_i − r_i) / μ)``. It
    is computed once per response, because a sum over tokens would penalise length. The estimator computes advantages
    from the result as from any reward. No value head predicts it, so it does not work with ``gae``. It depends on the
    scale of every reward, unless ``normalize=`` is set for the objectives. An objective with a larger weight is kept
    closer to its ideal. Coefficients are the shares of responses in which an objective is the worst, or the means of
    the softmax weights with ``smooth``. An inactive objective is excluded. A missing reward is excluded from the
    maximum; training fills it in beforehand, as for ``morlhf``. The estimator sets the size of the result, so
    ``rescale`` has no unit size for it.

    On a Pareto front the policy drifts towards responses at equal distance from the ideal in all objectives; an
    estimator that whitens amplifies the remaining variation of the result to full steps.

    Args:
        ideal: z, K numbers. Default: the largest reward of each objective in the batch.
        augment: ρ; 0 is the plain form, and a small value excludes solutions that are only weakly Pareto optimal.
        smooth: μ, in units of the rewards.

    Raises:
        ValueError: ``ideal`` is not a list of K numbers.

    >>> from pama_plugin import aggregate
    >>> rewards_KB1 = torch.tensor([[[1.0], [0.0]], [[0.2], [0.6]]])
    >>> aggregate("tchebycheff", rewards_KB1, torch.ones(2, 1), ideal=[1, 1]).advantages.flatten()
    tensor([-0.8000, -1.0000])
    """
    absent_KB1 = ~(present_KB & active_K.unsqueeze(-1)).unsqueeze(-1) | ~mask_BA
    rewards_KB1 = advantages_KBA.masked_fill(absent_KB1, 0)
    if ideal is None:
        ideal_K11 = advantages_KBA.masked_fill(absent_KB1, -torch.inf).amax((1, 2), keepdim=True).nan_to_num(neginf=0.0)
    elif len(ideal) == len(weights_KB):
        ideal_K11 = rewards_KB1.new_tensor(ideal)[:, None, None]
    else:
        raise ValueError(f"ideal must be {len(weights_KB)} numbers, one per objective, found {ideal}")
    behind_KB1 = (weights_KB.unsqueeze(-1) * (ideal_K11 - rewards_KB1)).masked_fill_(absent_KB1, -torch.inf)
    if smooth is None:
        furthest_B1 = behind_KB1.amax(0)
        shares_KB1 = (behind_KB1 == furthest_B1) & ~absent_KB1
    else:
        furthest_B1 = smooth * (behind_KB1 / smooth).logsumexp(0)
        shares_KB1 = (behind_KB1 / smooth).softmax(0).nan_to_num_(nan=0.0)
    total_B1 = furthest_B1.neg().nan_to_num(posinf=0.0) + augment * (weights_KB.unsqueeze(-1) * rewards_KB1).sum(0)
    shares_K = (shares_KB1 / shares_KB1.sum(0).clamp(min=1)).sum((1, 2)).to(weights_KB.dtype)
    return Combination(total_B1, shares_K / shares_K.sum().clamp(min=1))

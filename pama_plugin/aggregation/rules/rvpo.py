"""RVPO: a soft minimum of objectives that are whitened within groups (Montero et al., arXiv 2605.05750)."""

import functools
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pama_plugin.aggregation.blocks import tokens_per_response
from pama_plugin.aggregation.group_whitening import centre, group_scores, spread, whiten
from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.unit_scale import by_response, sampled_rms


@register_rule("rvpo")
def rvpo(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_KB: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    groups_B: Tensor,
    risk: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0,
    whiten_sum: bool = False,
) -> Combination:
    """``−(1/k) log Σ_i ŵ_i exp(−k Z_i)``, minus its mean over the tokens; ``Z_i`` as in ``gdpo``, ``ŵ`` sums to 1.

    To second order it is the mean of the ``Z_i`` minus ``k/2`` times their variance: a response that is good in one
    objective and bad in another gets less than one that is mediocre in both. Coefficients are the mean over the valid
    tokens of the derivatives, ``ŵ_i exp(−k Z_i) / Σ_j ŵ_j exp(−k Z_j)``. An inactive objective is excluded.

    Differs from the paper in: the mean is subtracted, because it is negative, which would lower the probability of
    every response. So k → 0 is ``gdpo`` with weights that sum to 1.

    On a Pareto front the policy drifts: the rule favours responses for which opposed ``Z_i`` are both small, and the
    policy narrows to those. The result is not small there, because the ``Z_i`` are whitened.

    Args:
        groups_B: index of the prompt of each response.
        risk: k; the weighted mean for k → 0, the minimum for k → ∞.
        whiten_sum: divide the result by its standard deviation over the tokens, too, as ``gdpo`` with this option does.

    >>> from pama_plugin import aggregate
    >>> advantages_KBA = torch.tensor([[[-1.0], [0.0], [1.0]], [[1.0], [0.0], [-1.0]]])
    >>> result = aggregate("rvpo", advantages_KBA, torch.ones(3, 1), groups_B=[0, 0, 0], rescale="none")
    >>> [round(value, 3) for value in result.advantages.flatten().tolist()]  # −log cosh(Z), centred
    [-0.145, 0.289, -0.145]
    """
    scores_KB = group_scores(advantages_KBA, mask_BA, present_KB, groups_B)
    counted_KB = present_KB & active_K.unsqueeze(-1)
    # Weights are normalised over the objectives that have a reward for the response.
    log_weights_KB = weights_KB.double().log().masked_fill(~counted_KB, -torch.inf)
    logits_KB = log_weights_KB - risk * scores_KB
    combined_B = ((log_weights_KB.logsumexp(0) - logits_KB.logsumexp(0)) / risk).nan_to_num(nan=0.0)
    if whiten_sum:
        combined_B, unit_rms = whiten(combined_B, counted_KB.any(0), mask_BA), torch.ones_like(combined_B)
    else:
        combined_B = centre(combined_B, counted_KB.any(0), mask_BA)
        unit_rms = by_response(weights_KB, counted_KB, functools.partial(_unit_rms, risk))
    totals_K = (logits_KB.softmax(0).nan_to_num(nan=0.0) * tokens_per_response(mask_BA)).sum(-1)
    coefficients_K = (totals_K / totals_K.sum().clamp(min=1)).to(weights_KB.dtype)
    return Combination(spread(combined_B, mask_BA, weights_KB.dtype), coefficients_K, unit_rms=unit_rms)


@functools.lru_cache(maxsize=1024)
def _unit_rms(risk: float, weights: tuple[float, ...]) -> float:
    if len(weights) == 1:
        return 1.0
    weights_K1 = torch.tensor(weights, dtype=torch.float64).unsqueeze(-1)

    def centred(scores_KN: Tensor) -> Tensor:
        soft_N = -((weights_K1 / weights_K1.sum()).log() - risk * scores_KN).logsumexp(0) / risk
        return soft_N - soft_N.mean()

    return sampled_rms(len(weights), centred)

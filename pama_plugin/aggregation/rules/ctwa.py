"""CTWA: weights rise until every reward correlates with what is reinforced (Lu & Jiang, arXiv 2602.06869)."""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pama_plugin.aggregation.group_whitening import group_scores
from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.rules.linear import linear

LARGEST = 50.0  # of a log-weight, so that none overflows


@register_rule("ctwa")
def ctwa(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_KB: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    groups_B: Tensor,
    memory_K: list[Mapping[str, float]],
    target: Annotated[float, Field(ge=0, le=1)] = 0.1,
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05,
    smoothing: Annotated[float, Field(gt=0, le=1)] = 0.1,
) -> Combination:
    """``Σ_i w_i e^{ℓ_i} A_i``, where ``ℓ_i`` rises while objective i hardly correlates with the sum.

    An objective improves, to first order, if its reward correlates with the combined advantage within the responses to
    a prompt. Let ``ρ_i`` be this correlation, between ``Z_i`` (see ``gdpo``) and the mean of the sum over each
    response, and ``ρ̄_i ← (1 − smoothing) ρ̄_i + smoothing ρ_i`` its running mean. After every step, ``ℓ_i ← ℓ_i + rate
    · max(target − ρ̄_i, 0)``, from 0; ρ̄ starts as the first ρ. The largest ``ℓ`` counts as 0, and the others as their
    differences from it. An inactive objective is excluded and keeps its ``ℓ_i``. Only ratios of the weights matter, and
    the unit size is that of ``linear`` with the adapted weights. Coefficients are their shares.

    Differs from the paper in: its target is for the covariance of the raw reward, in the unit of the reward, by default
    (the authors' code has the correlation as an option); here it is for the correlation, over all groups. The code
    multiplies advantages by the probability ratio, which is 1 at the first update. It stops raising the weight of an
    objective that has reached a target of its own; use ``lagrangian`` for that. Their rates are 0.02 and 0.05.

    On a Pareto front it behaves as ``linear`` with weights that keep all correlations positive, if any do.

    Args:
        groups_B: index of the prompt of each response.
        memory_K: ``log_weight`` and ``correlation``, ``ρ̄``, of each objective; empty before the first step.
        target: of ``ρ̄``.
        rate: see above.
        smoothing: see above; 1 uses the last step only.

    >>> from pama_plugin import aggregate
    >>> advantages_KBA = torch.tensor([[[-3.0], [3.0]], [[1.0], [-1.0]]])  # the sum follows the first
    >>> result = aggregate("ctwa", advantages_KBA, torch.ones(2, 1), groups_B=[0, 0])
    >>> [round(memory["log_weight"], 3) for memory in result.memory_K]  # 0.05 · (0.1 + 1)
    [0.0, 0.055]
    """
    logs_K = weights_KB.new_tensor([memory.get("log_weight", 0.0) for memory in memory_K], dtype=torch.float64)
    adapted_KB = weights_KB.double() * (logs_K - logs_K.max()).exp().unsqueeze(-1)
    combination = linear(advantages_KBA, mask_BA, adapted_KB.to(weights_KB.dtype), active_K, present_KB)
    scores_KB = group_scores(advantages_KBA, mask_BA, present_KB, groups_B)
    everyone_1B = present_KB.any(0, keepdim=True)
    combined_1B = group_scores(combination.advantages_BA.unsqueeze(0), mask_BA, everyone_1B, groups_B)
    lengths_K = scores_KB.norm(dim=1) * (combined_1B * present_KB).norm(dim=1)
    correlations_K = (scores_KB * combined_1B).sum(1) / torch.where(lengths_K > 0, lengths_K, 1)
    metrics = {}
    for index, (now, memory) in enumerate(zip(correlations_K.tolist(), memory_K)):
        before = memory.get("correlation", now)
        mean = before + smoothing * (now - before) * bool(active_K[index])
        rise = rate * max(target - mean, 0.0) * bool(active_K[index])
        metrics[f"correlation/{index}"] = mean
        metrics[f"log_weight/{index}"] = min(memory.get("log_weight", 0.0) + rise, LARGEST)
    return combination._replace(metrics=metrics)

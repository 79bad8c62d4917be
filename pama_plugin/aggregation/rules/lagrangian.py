"""Constrained alignment: maximise some objectives while others stay above a threshold (Safe RLHF, arXiv 2310.12773)."""

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor

from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.rules.linear import linear


@register_rule("lagrangian", constrained=True)
def lagrangian(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_K: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    violations_K: list[float | None],
    multipliers_K: list[float | None],
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1,
    start: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0,
    ceiling: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0,
) -> Combination:
    """``(A_0 + Σ_k λ_k A_k) / (1 + Σ_k λ_k)``, k over the constraints, ``A_0 = Σ_i w_i A_i / Σ_i w_i`` over all others.

    A multiplier rises while its constraint is violated: ``log λ_k ← log λ_k + rate · λ_k · (threshold_k − mean r_k)``,
    gradient ascent in log space as in Safe RLHF, with the rewards of the batch. Differs from Safe RLHF in: λ changes at
    most e-fold per step, to limit the effect of a single outlier. The new value is ``metrics["multiplier/<k>"]``; pass
    it as ``multipliers_K`` in the next step. The weight of a constraint scales ``A_k``. An inactive objective is not
    excluded. Coefficients are the shares of ``w_i / Σ w`` and ``λ_k w_k``.

    On a Pareto front the rule behaves as ``linear`` with changing weights: it moves along the front until the
    constraints hold.

    Args:
        violations_K: ``threshold_k − mean r_k`` for a constraint, None for any other objective.
        multipliers_K: current λ of each constraint, None before the first step.
        rate: step size of the ascent, per unit of reward and step.
        start: λ before the first step.
        ceiling: upper bound of λ.

    Raises:
        ValueError: no objective or all objectives are constraints, a λ is not positive, or ``start`` exceeds
            ``ceiling``.

    >>> import torch
    >>> from pama_plugin import aggregate
    >>> advantages_KBA = torch.tensor([[[1.0, -1.0]], [[0.5, 2.0]]])
    >>> duals = dict(violations_K=[None, 0.5], multipliers_K=[None, None], rate=0.2)
    >>> result = aggregate("lagrangian", advantages_KBA, torch.ones(1, 2), **duals)
    >>> round(result.metrics["multiplier/1"], 4)  # e^(0.2 · 0.5)
    1.1052
    >>> result.advantages
    tensor([[0.7375, 0.5749]])
    """
    if start > ceiling:
        raise ValueError(f"start must be at most the ceiling {ceiling:g}, found {start:g}")
    multipliers = {}
    for index, (violation, last) in enumerate(zip(violations_K, multipliers_K, strict=True)):
        if violation is not None:
            now = start if last is None else last
            if now <= 0:
                raise ValueError(f"multipliers_K must be positive, found {now:g} for objective {index}")
            multipliers[index] = min(now * math.exp(min(max(rate * now * violation, -1.0), 1.0)), ceiling)
    if not 0 < len(multipliers) < len(weights_K):
        raise ValueError(
            f"lagrangian needs at least one constraint and one objective among {len(weights_K)}, found "
            f"{len(multipliers)} constraints"
        )
    scales = weights_K.double().clone()
    free = [index for index in range(len(scales)) if index not in multipliers]
    scales[free] /= scales[free].sum()
    for index, multiplier in multipliers.items():
        scales[index] *= multiplier
    scales = (scales / (1 + sum(multipliers.values()))).to(weights_K.dtype)
    combined_BA = linear(advantages_KBA, mask_BA, scales, active_K, present_KB).advantages_BA
    metrics = {f"multiplier/{index}": multiplier for index, multiplier in multipliers.items()}
    return Combination(combined_BA, scales / scales.sum(), metrics)

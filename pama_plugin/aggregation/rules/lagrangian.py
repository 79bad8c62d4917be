"""Constrained alignment: maximise some objectives while others stay above a threshold (Safe RLHF, arXiv 2310.12773)."""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.rules.linear import linear

LARGEST = 10.0  # violation that counts, so that no outlier moves a multiplier to its bound


@register_rule("lagrangian", constrained=True)
def lagrangian(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_K: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    violations_K: list[float | None],
    memory_K: list[Mapping[str, float]],
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5,
    start: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0,
    ceiling: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0,
) -> Combination:
    """``(A_0 + Σ_k λ_k A_k) / (1 + Σ_k λ_k)``, k over the constraints, ``A_0 = Σ_i w_i A_i / Σ_i w_i`` over all others.

    A multiplier rises while its constraint is violated and falls while it holds: ``λ_k ← λ_k + rate · violation_k``,
    within 0 and the ceiling; the violation is ``threshold_k − mean r_k`` of the batch, and a step moves λ by at most
    ``10 · rate``. This is gradient ascent in λ (Stooke et al., arXiv 2007.03964, without their proportional and
    derivative terms). The new value is ``metrics["multiplier/<k>"]``; pass ``memory_K`` on. The weight of a constraint
    scales ``A_k``. An inactive objective is excluded, but the multiplier of a constraint changes all the same.
    Coefficients are the shares of ``w_i / Σ w`` and ``λ_k w_k``. The unit size is that of ``linear`` with these
    factors.

    Differs from Safe RLHF in: the paper ascends in log λ, so a step is proportional to λ². Slack then lowers λ so far
    that it hardly rises again when the constraint is violated.

    On a Pareto front the rule behaves as ``linear`` with changing weights: it moves along the front until the
    constraints hold.

    Args:
        violations_K: ``threshold_k − mean r_k`` for a constraint, None for any other objective. In training, in
            standard deviations of the rewards so far, so that ``rate`` does not depend on their scale.
        memory_K: contains the current ``multiplier`` of each constraint; empty before the first step.
        rate: step size of the ascent: change of λ per step, for a violation of 1. On small policies with conflicting
            objectives (examples/toys.py) constraints stay violated with 0.1, and hold or nearly hold from 0.5 on.
        start: λ before the first step.
        ceiling: upper bound of λ. With a constraint that cannot hold λ rises to it, and then needs
            ``ceiling / (rate · slack)`` steps to fall.

    Raises:
        ValueError: no objective or all objectives are constraints, a λ is negative, or ``start`` exceeds ``ceiling``.

    >>> import torch
    >>> from pama_plugin import aggregate
    >>> advantages_KBA = torch.tensor([[[1.0, -1.0]], [[0.5, 2.0]]])
    >>> duals = dict(violations_K=[None, 0.5], memory_K=[{}, {"multiplier": 0.9}], rate=0.2)
    >>> result = aggregate("lagrangian", advantages_KBA, torch.ones(1, 2), **duals, rescale="none")
    >>> result.memory_K
    ({}, {'multiplier': 1.0})
    >>> result.advantages  # (A_0 + A_1) / 2
    tensor([[0.7500, 0.5000]])
    """
    if start > ceiling:
        raise ValueError(f"start must be at most the ceiling {ceiling:g}, found {start:g}")
    multipliers = {}
    for index, (violation, memory) in enumerate(zip(violations_K, memory_K, strict=True)):
        if violation is not None:
            now = memory.get("multiplier", start)
            if now < 0:
                raise ValueError(f"a multiplier must be at least 0, found {now:g} for objective {index}")
            multipliers[index] = min(max(now + rate * min(max(violation, -LARGEST), LARGEST), 0.0), ceiling)
    if not 0 < len(multipliers) < len(weights_K):
        raise ValueError(
            f"lagrangian needs at least one constraint and one objective among {len(weights_K)}, found "
            f"{len(multipliers)} constraints"
        )
    scales = (weights_K * active_K).double()
    free = [index for index in range(len(scales)) if index not in multipliers]
    scales[free] /= scales[free].sum().clamp(min=1e-300)
    for index, multiplier in multipliers.items():
        scales[index] *= multiplier
    scales = (scales / (1 + sum(multipliers.values()))).to(weights_K.dtype)
    combination = linear(advantages_KBA, mask_BA, scales, active_K, present_KB)
    metrics = {f"multiplier/{index}": multiplier for index, multiplier in multipliers.items()}
    coefficients_K = scales / torch.where(scales.sum() > 0, scales.sum(), 1)
    return combination._replace(metrics=metrics, coefficients_K=coefficients_K)

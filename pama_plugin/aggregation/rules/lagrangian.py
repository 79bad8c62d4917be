"""Constrained alignment: maximise some objectives while others stay above a threshold (Safe RLHF, arXiv 2310.12773)."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor

from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.rules.linear import linear

LARGEST = 10.0  # violation that counts, so that no outlier moves a multiplier to its bound


@register_rule("lagrangian", constrained=True)
def lagrangian(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_KB: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    violations_K: list[float | None],
    memory_K: list[Mapping[str, float]],
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1,
    proportional: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0,
    start: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0,
    ceiling: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0,
) -> Combination:
    """``(A_0 + Σ_k λ_k A_k) / (1 + Σ_k λ_k)``, k over the constraints, ``A_0 = Σ_i w_i A_i / Σ_i w_i`` over all others.

    A multiplier is large while its constraint is violated, by ``v_k = threshold_k − mean r_k`` in the batch, and falls
    while it holds: ``I_k ← I_k + rate · v_k`` and ``λ_k = I_k + proportional · v_k``, both within 0 and the ceiling.
    This is proportional-integral control of the multiplier (Stooke et al., arXiv 2007.03964, Algorithm 2, without the
    derivative term). Gradient ascent in λ is the integral alone: it answers late, so that the rewards swing around the
    threshold. ``λ_k`` is ``metrics["multiplier/<k>"]``, ``I_k`` is ``metrics["integral/<k>"]``; pass ``memory_K`` on.
    The weight of a constraint scales ``A_k``. An inactive objective is excluded, but the multiplier of a constraint
    changes all the same. Coefficients are the shares of ``w_i / Σ w`` and ``λ_k w_k``. The unit size is that of
    ``linear`` with these factors.

    Differs from Safe RLHF in: the paper ascends in log λ, so a step is proportional to λ². Slack then lowers λ so far
    that it hardly rises again when the constraint is violated.

    On a Pareto front the rule behaves as ``linear`` with changing weights: it moves along the front until the
    constraints hold.

    Args:
        violations_K: ``v_k`` for a constraint, None for any other objective. In training, in standard deviations of the
            rewards so far, so that the options do not depend on their scale. Values beyond ±10 count as ±10.
        memory_K: contains the ``integral`` of each constraint; empty before the first step.
        rate: change of ``I`` per step, for a violation of 1.
        proportional: change of λ for a violation of 1. On six tasks of examples/toys.py (5 seeds each, thresholds at
            the means at the start) the worst constraint ends, on average, 0.01 to 0.13 standard deviations below its
            threshold with 2, and 0 to 0.8 with 0.
        start: ``I`` before the first step.
        ceiling: upper bound of ``I`` and λ. With a constraint that cannot hold ``I`` rises to it, and then needs
            ``ceiling / (rate · slack)`` steps to fall.

    Raises:
        ValueError: no objective or all objectives are constraints, an integral is negative, or ``start`` exceeds
            ``ceiling``.

    >>> import torch
    >>> from pama_plugin import aggregate
    >>> advantages_KBA = torch.tensor([[[1.0, -1.0]], [[0.5, 2.0]]])
    >>> duals = dict(violations_K=[None, 0.5], memory_K=[{}, {"integral": 1.95}])
    >>> result = aggregate("lagrangian", advantages_KBA, torch.ones(1, 2), **duals, rescale="none")
    >>> result.memory_K
    ({}, {'multiplier': 3.0, 'integral': 2.0})
    >>> result.advantages  # (A_0 + 3 A_1) / 4
    tensor([[0.6250, 1.2500]])
    """
    if start > ceiling:
        raise ValueError(f"start must be at most the ceiling {ceiling:g}, found {start:g}")
    multipliers: dict[int, float] = {}
    metrics: dict[str, float] = {}
    for index, (violation, memory) in enumerate(zip(violations_K, memory_K, strict=True)):
        if violation is not None:
            integral = memory.get("integral", start)
            if integral < 0:
                raise ValueError(f"an integral must be at least 0, found {integral:g} for objective {index}")
            violation = min(max(violation, -LARGEST), LARGEST)
            integral = min(max(integral + rate * violation, 0.0), ceiling)
            multipliers[index] = min(max(integral + proportional * violation, 0.0), ceiling)
            metrics |= {f"multiplier/{index}": multipliers[index], f"integral/{index}": integral}
    if not 0 < len(multipliers) < len(weights_KB):
        raise ValueError(
            f"lagrangian needs at least one constraint and one objective among {len(weights_KB)}, found "
            f"{len(multipliers)} constraints"
        )
    scales_KB = (weights_KB * active_K.unsqueeze(-1)).double()
    free = [index for index in range(len(scales_KB)) if index not in multipliers]
    scales_KB[free] /= scales_KB[free].sum(0).clamp(min=1e-300)
    for index, multiplier in multipliers.items():
        scales_KB[index] *= multiplier
    scales_KB = (scales_KB / (1 + sum(multipliers.values()))).to(weights_KB.dtype)
    combination = linear(advantages_KBA, mask_BA, scales_KB, active_K, present_KB)
    return combination._replace(metrics=metrics)

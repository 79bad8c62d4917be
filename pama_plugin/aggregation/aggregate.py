"""``aggregate``: the interface to every rule. K advantages per token in, one advantage per token and metrics out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pama_plugin.aggregation.blocks import blocks, tokens_per_response, valid_at
from pama_plugin.aggregation.diagnostics import describe, effective_objectives, inspect
from pama_plugin.aggregation.registry import CONTEXT_PARAMETERS, Combination, check_options, get_rule

LEVELS = ("token", "sequence", "batch")


@dataclass(frozen=True)
class Aggregation:
    """The result of ``aggregate``. A token is valid where the mask is true.

    Attributes:
        advantages: (B, A), 0 where masked.
        coefficients: (K,), share of each objective in the result, as the rule defines it: for ``pama`` the mean over
            the tokens with an advantage other than 0. They sum to 1, or to 0 if no token has an advantage.
        metrics: name → value:

            - ``active_fraction``: share of the valid tokens with an advantage other than 0;
            - ``conflict_rate``: share of the valid tokens where one objective is positive and another negative;
            - ``rms``: root mean square of the advantages over the valid tokens;
            - ``gain/<i>``: mean of ``A_i · advantage`` over the valid tokens for which objective i has a reward: its
              first-order improvement under the update if token gradients are orthogonal and of equal norm;
            - ``inactive/<i>``: 1 if objective i is inactive, else 0; each rule documents whether it is excluded;
            - ``effective_objectives``: ``1 / Σ_i c_i²`` of the coefficients: 1 if one objective has all, K if all are
              equal, 0 if all are 0;
            - metrics of the rule: ``scale`` for ``pama``, ``multiplier/<i>`` for ``lagrangian``.
    """

    advantages: Tensor
    coefficients: Tensor
    metrics: dict[str, float]


def aggregate(
    rule: str,
    advantages_KBA: Tensor | Sequence[Any],
    mask_BA: Tensor | Sequence[Any],
    *,
    level: str = "token",
    noon: bool | None = None,
    weights: Sequence[float] | Tensor | None = None,
    whiten: bool = False,
    active: Sequence[bool] | Tensor | None = None,
    present_KB: Tensor | Sequence[Any] | None = None,
    groups_B: Tensor | Sequence[int] | None = None,
    **options: Any,
) -> Aggregation:
    """Combine the advantages of K objectives into the advantages for the policy update.

    Combining advantages is combining losses: for ``A ≥ 0`` the PPO surrogate ``min(uA, clip(u)A) = A·min(u, clip(u))``
    is linear in A, so ``Σ_i c_i L(A_i) = L(Σ_i c_i A_i)``. Tensor arguments may be lists.

    Args:
        rule: one of ``available_rules()``.
        advantages_KBA: (K, B, A) advantages of K objectives, B responses, A action tokens. Not modified. A rule that
            combines rewards (``morlhf``, ``tchebycheff``) takes (K, B, 1) rewards and returns one reward per response.
        mask_BA: (B, A), true at action tokens. Values at other positions are ignored, including NaN.
        level: ``token``, ``sequence`` or ``batch``: the unit that ``pama`` projects. Other rules ignore it.
        noon: keep only positive advantages ("No Negative", arXiv 2508.07768, Eq. 5). Default: true for ``pama`` with
            ``level="batch"``, false otherwise. Only ``pama`` and ``min_norm`` use it.
        weights: K positive preference weights, 1 each by default. Each rule documents their meaning.
        whiten: subtract from each objective's advantages their mean over its valid tokens and divide by their standard
            deviation before combining. Use it with estimators that do not whiten, so that no objective dominates by its
            scale. The metrics then describe the whitened advantages.
        active: K flags, false for an objective that is known to be inactive, such as one whose reward is constant.
            Objectives whose advantages spread over less than a millionth of the largest are detected automatically. If
            no objective is active, all are kept.
        present_KB: (K, B), false where an objective has no reward for a response: the objective is excluded from the
            combination for that response only. All true by default.
        groups_B: (B,) integers, equal for the responses to one prompt. Required by ``gdpo``, ``gd2po`` and ``rvpo``.
        options: options of the rule, and ``violations_K`` and ``multipliers_K`` for ``lagrangian``.

    Raises:
        ValueError: a shape, weight, level, rule or option is invalid, or a valid token is not finite.

    >>> import torch
    >>> advantages = torch.tensor([[[1.0, -0.5, -1.2, 0.7]], [[0.4, 0.8, -0.6, -0.6]]])
    >>> result = aggregate("pama", advantages, torch.ones(1, 4, dtype=torch.bool), rescale=False)
    >>> result.advantages
    tensor([[ 0.4000,  0.0000, -0.6000,  0.0000]])
    >>> result.metrics["conflict_rate"]
    0.5
    """
    advantages_KBA = _as_tensor("advantages", advantages_KBA)
    device = advantages_KBA.device
    mask_BA = _as_tensor("the mask", mask_BA, device).bool()
    if advantages_KBA.ndim != 3 or advantages_KBA.shape[1:] != mask_BA.shape or not advantages_KBA.shape[0]:
        raise ValueError(
            f"advantages must be (K, B, A) with K ≥ 1 and the mask (B, A), "
            f"found {tuple(advantages_KBA.shape)} and {tuple(mask_BA.shape)}"
        )
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, found {level!r}")
    if not isinstance(noon, bool | None) or not isinstance(whiten, bool):
        raise ValueError(f"noon and whiten must be true or false, found {noon!r} and {whiten!r}")
    chosen = get_rule(rule)
    if chosen.combines == "rewards" and mask_BA.shape[1] != 1:
        raise ValueError(f"rule {rule!r} combines rewards, (K, B, 1), found {tuple(advantages_KBA.shape)}")
    advantages_KBA = advantages_KBA.detach().to(torch.promote_types(advantages_KBA.dtype, torch.float32))
    shape_KB = advantages_KBA.shape[:2]
    present_KB = mask_BA.new_ones(shape_KB) if present_KB is None else _as_tensor("present_KB", present_KB, device)
    if present_KB.shape != shape_KB or present_KB.dtype != torch.bool:
        raise ValueError(
            f"present_KB must be (K, B) = {tuple(shape_KB)} booleans, "
            f"found {tuple(present_KB.shape)} of {present_KB.dtype}"
        )
    context: dict[str, Any] = {"level": level, "noon": noon, "groups_B": groups_B}
    context |= {key: options.pop(key) for key in CONTEXT_PARAMETERS if key in options}
    options = check_options(rule, options)
    for key in ("violations_K", "multipliers_K"):
        if key in chosen.parameters and not _is_list(context.get(key), len(advantages_KBA)):
            raise ValueError(
                f"rule {rule!r} needs {key}, a list of {len(advantages_KBA)} finite numbers or None, "
                f"found {context.get(key)!r}"
            )
    if "groups_B" in chosen.parameters:
        if groups_B is None:
            raise ValueError(f"rule {rule!r} needs groups_B, the prompt index of each response, found none")
        context["groups_B"] = groups_B = _as_tensor("groups_B", groups_B, device)
        if groups_B.shape != mask_BA.shape[:1] or groups_B.is_floating_point():
            raise ValueError(
                f"groups_B must be (B,) = {tuple(mask_BA.shape[:1])} integers, "
                f"found {tuple(groups_B.shape)} of {groups_B.dtype}"
            )

    weights_K = _check_weights(weights, advantages_KBA)
    active_K = _find_active(active, advantages_KBA, mask_BA, present_KB)
    if whiten:
        advantages_KBA = _whiten(advantages_KBA, mask_BA, present_KB)
    context = {key: value for key, value in context.items() if key in chosen.parameters and value is not None}
    combination = chosen.combine(advantages_KBA, mask_BA, weights_K, active_K, present_KB, **context, **options)

    _check_combination(rule, combination, weights_K, mask_BA)
    combined_BA = combination.advantages_BA.masked_fill(~mask_BA, 0)  # a copy: a rule may return a view
    if not bool(combined_BA.isfinite().all()):
        raise ValueError(f"rule {rule!r} returned NaN or inf at a valid token")
    metrics = describe(advantages_KBA, mask_BA, present_KB, combined_BA)
    metrics |= {f"inactive/{index}": float(not is_active) for index, is_active in enumerate(active_K.tolist())}
    coefficients_K = combination.coefficients_K * bool(metrics["active_fraction"])
    metrics["effective_objectives"] = effective_objectives(coefficients_K)
    if taken := sorted(metrics.keys() & combination.metrics.keys()):
        raise ValueError(f"rule {rule!r} returned reserved metric names: {', '.join(taken)}; rename them")
    return Aggregation(combined_BA, coefficients_K, metrics | dict(combination.metrics))


def _check_combination(rule: str, result: object, weights_K: Tensor, mask_BA: Tensor) -> None:
    """Validate the return value of a rule, which may come from another package."""
    if not isinstance(result, Combination):
        raise ValueError(f"rule {rule!r} must return a Combination, found {type(result).__name__}")
    for part in result[:2]:
        if not isinstance(part, Tensor) or not part.is_floating_point():
            raise ValueError(f"rule {rule!r} must return a Combination of floating-point tensors, found {part!r}")
    expected = (tuple(mask_BA.shape), tuple(weights_K.shape))
    shapes = (tuple(result.advantages_BA.shape), tuple(result.coefficients_K.shape))
    if shapes != expected:
        raise ValueError(f"rule {rule!r} must return shapes (B, A) and (K,), {expected}, found {shapes}")
    if not bool(result.coefficients_K.isfinite().all()):
        raise ValueError(f"rule {rule!r} must return finite coefficients, found {result.coefficients_K.tolist()}")


def _as_tensor(name: str, values: Any, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` as a tensor on the device; with None, a tensor stays on its device."""
    try:
        return torch.as_tensor(values, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be numbers, as a tensor or lists: {error}") from error


def _is_list(values: Any, length: int) -> bool:
    """True for a list of ``length`` entries, each a finite number or None."""
    if not isinstance(values, Sequence) or len(values) != length:
        return False
    return all(value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in values)


def _check_weights(weights: Sequence[float] | Tensor | None, advantages_KBA: Tensor) -> Tensor:
    if weights is None:
        return advantages_KBA.new_ones(len(advantages_KBA))
    weights_K = _as_tensor("weights", weights, advantages_KBA.device, advantages_KBA.dtype)
    if weights_K.shape != advantages_KBA.shape[:1] or not bool((weights_K.isfinite() & (weights_K > 0)).all()):
        raise ValueError(f"weights must be {len(advantages_KBA)} positive finite numbers, found {weights}")
    return weights_K


def _find_active(
    active: Sequence[bool] | Tensor | None, advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor
) -> Tensor:
    """(K,) true for active objectives; all true if none is active."""
    active_K = inspect(advantages_KBA, mask_BA, present_KB)
    if active is not None:
        flags_K = _as_tensor("active", active, advantages_KBA.device, torch.bool)
        if flags_K.shape != active_K.shape:
            raise ValueError(f"active must be {len(advantages_KBA)} flags, found {flags_K.tolist()}")
        active_K = active_K & flags_K
    return active_K if bool(active_K.any()) else torch.ones_like(active_K)


def _whiten(advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor) -> Tensor:
    """A copy with mean 0 and standard deviation 1 over each objective's valid tokens; 0 for a constant objective."""
    count_K = (present_KB * tokens_per_response(mask_BA)).sum(-1).clamp(min=1)
    totals_K = torch.zeros(len(advantages_KBA), dtype=torch.float64, device=mask_BA.device)
    squares_K = totals_K.clone()
    whitened_KBA = torch.empty_like(advantages_KBA)
    for rows in blocks(advantages_KBA):
        invalid_KbA = ~valid_at(rows, mask_BA, present_KB)
        totals_K += advantages_KBA[:, rows].masked_fill(invalid_KbA, 0).sum((1, 2), dtype=torch.float64)
    means_K11 = (totals_K / count_K).to(advantages_KBA.dtype)[:, None, None]
    for rows in blocks(advantages_KBA):
        invalid_KbA = ~valid_at(rows, mask_BA, present_KB)
        centred_KbA = (advantages_KBA[:, rows] - means_K11).masked_fill_(invalid_KbA, 0)
        squares_K += centred_KbA.square().sum((1, 2), dtype=torch.float64)
        whitened_KBA[:, rows] = centred_KbA
    stds_K11 = (squares_K / count_K).sqrt().to(advantages_KBA.dtype)[:, None, None]
    return whitened_KBA.div_(torch.where(stds_K11 > 0, stds_K11, 1))

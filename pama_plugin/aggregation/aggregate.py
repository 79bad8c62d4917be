"""One interface to every rule: K advantages per token in, one out, with the numbers that explain it."""

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
    """The outcome of ``aggregate``. A valid token is one where the mask is true.

    Attributes:
        advantages: (B, A), 0 where masked.
        coefficients: (K,), share of each objective in the result, as each rule's own text says: for ``pama`` the mean
            over the tokens that have an advantage. They sum to 1 where anything is active, else to 0.
        metrics: by name,

            - ``active_fraction``: share of the valid tokens with an advantage other than 0;
            - ``conflict_rate``: share of the valid tokens where one objective is positive and another negative;
            - ``rms``: of the advantages, over the valid tokens;
            - ``gain/<i>``: mean of ``A_i · advantage`` over the valid tokens that objective i has a reward for: its
              first-order improvement under the update if token gradients are orthogonal and of equal norm;
            - ``inactive/<i>``: 1 if objective i carries no signal, else 0; whether it is left out, each rule says;
            - ``effective_objectives``: ``1 / Σ_i c_i²`` of the coefficients, from 1 (one has all) to K; 0 without any;
            - what the rule adds: ``scale`` of ``pama``, ``multiplier/<i>`` of ``lagrangian``.
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
    """Combine the advantages of K objectives into the one that the policy update sees.

    Combining advantages is combining losses: for ``A ≥ 0`` the PPO surrogate ``min(uA, clip(u)A) = A·min(u, clip(u))``
    is linear in A, so ``Σ_i c_i L(A_i) = L(Σ_i c_i A_i)``. Lists may stand for tensors.

    Args:
        rule: one of ``available_rules()``.
        advantages_KBA: (K, B, A) advantages of K objectives, B responses, A action tokens. Not modified. For a rule of
            rewards (``morlhf``, ``tchebycheff``) the (K, B, 1) rewards, and the result is one reward per response.
        mask_BA: (B, A), true at action tokens. What stands elsewhere enters nothing, not even if it is NaN.
        level: ``token``, ``sequence`` or ``batch``: what ``pama`` projects. No other rule uses it.
        noon: keep only positive advantages ("No Negative", arXiv 2508.07768, Eq. 5). If not given, ``pama`` does
            with ``level="batch"`` alone, and ``min_norm`` does not. No other rule uses it.
        weights: K positive preference weights, 1 each if not given; what they mean, each rule says.
        whiten: first subtract from each objective's advantages their mean over its valid tokens and divide by their
            standard deviation: for estimators that do not, so that no objective wins by its scale. The metrics are then
            of the whitened ones.
        active: K flags, false for an objective that is known to carry no signal, such as one whose reward is constant.
            One whose advantages spread over less than a millionth of the largest is found without being told. If that
            leaves none, none is dropped.
        present_KB: (K, B), false where an objective has no reward for a response: it is left out of the combination for
            that response alone. All true if not given.
        groups_B: (B,) integers, the same for the responses to one prompt; ``gdpo``, ``gd2po`` and ``rvpo`` need them.
        options: those of the rule, and for ``lagrangian`` ``violations_K`` and ``multipliers_K``.

    Raises:
        ValueError: a shape, weight, level, rule or option that cannot be used, or a valid token that is not finite.

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
    given: dict[str, Any] = {"level": level, "noon": noon, "groups_B": groups_B}
    given |= {key: options.pop(key) for key in CONTEXT_PARAMETERS if key in options}
    options = check_options(rule, options)
    for key in ("violations_K", "multipliers_K"):
        if key in chosen.parameters and not _is_list(given.get(key), len(advantages_KBA)):
            raise ValueError(
                f"rule {rule!r} needs {key}, a list of {len(advantages_KBA)} in which each is a finite number or None, "
                f"found {given.get(key)!r}"
            )
    if "groups_B" in chosen.parameters:
        if groups_B is None:
            raise ValueError(f"rule {rule!r} needs groups_B, the prompt of each response, found none")
        given["groups_B"] = groups_B = _as_tensor("groups_B", groups_B, device)
        if groups_B.shape != mask_BA.shape[:1] or groups_B.is_floating_point():
            raise ValueError(
                f"groups_B must be (B,) = {tuple(mask_BA.shape[:1])} integers, "
                f"found {tuple(groups_B.shape)} of {groups_B.dtype}"
            )

    weights_K = _check_weights(weights, advantages_KBA)
    active_K = _find_active(active, advantages_KBA, mask_BA, present_KB)
    if whiten:
        advantages_KBA = _whiten(advantages_KBA, mask_BA, present_KB)
    given = {key: value for key, value in given.items() if key in chosen.parameters and value is not None}
    combination = chosen.combine(advantages_KBA, mask_BA, weights_K, active_K, present_KB, **given, **options)

    _check_combination(rule, combination, weights_K, mask_BA)
    combined_BA = combination.advantages_BA.masked_fill(~mask_BA, 0)  # a copy: a rule may return a view
    if not bool(combined_BA.isfinite().all()):
        raise ValueError(f"rule {rule!r} returned NaN or inf at a valid token")
    metrics = describe(advantages_KBA, mask_BA, present_KB, combined_BA)
    metrics |= {f"inactive/{index}": float(not kept) for index, kept in enumerate(active_K.tolist())}
    coefficients_K = combination.coefficients_K * bool(metrics["active_fraction"])
    metrics["effective_objectives"] = effective_objectives(coefficients_K)
    if taken := sorted(metrics.keys() & combination.metrics.keys()):
        raise ValueError(f"rule {rule!r} must call its metrics otherwise than ours, found {', '.join(taken)}")
    return Aggregation(combined_BA, coefficients_K, metrics | dict(combination.metrics))


def _check_combination(rule: str, found: object, weights_K: Tensor, mask_BA: Tensor) -> None:
    """What a rule of somebody else may have returned."""
    if not isinstance(found, Combination):
        raise ValueError(f"rule {rule!r} must return a Combination, found {type(found).__name__}")
    for part in found[:2]:
        if not isinstance(part, Tensor) or not part.is_floating_point():
            raise ValueError(f"rule {rule!r} must return a Combination of floating-point tensors, found {part!r}")
    expected = (tuple(mask_BA.shape), tuple(weights_K.shape))
    shapes = (tuple(found.advantages_BA.shape), tuple(found.coefficients_K.shape))
    if shapes != expected:
        raise ValueError(f"rule {rule!r} must return shapes (B, A) and (K,), {expected}, found {shapes}")
    if not bool(found.coefficients_K.isfinite().all()):
        raise ValueError(f"rule {rule!r} must return finite coefficients, found {found.coefficients_K.tolist()}")


def _as_tensor(what: str, given: Any, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """On the device; None leaves a tensor where it is."""
    try:
        return torch.as_tensor(given, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} must be numbers, as a tensor or lists: {error}") from error


def _is_list(given: Any, length: int) -> bool:
    """Of so many finite numbers or None."""
    if not isinstance(given, Sequence) or len(given) != length:
        return False
    return all(value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in given)


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
    """(K,) true for the objectives that carry signal; all of them if none does."""
    active_K = inspect(advantages_KBA, mask_BA, present_KB)
    if active is not None:
        told_K = _as_tensor("active", active, advantages_KBA.device, torch.bool)
        if told_K.shape != active_K.shape:
            raise ValueError(f"active must be {len(advantages_KBA)} flags, found {told_K.tolist()}")
        active_K = active_K & told_K
    return active_K if bool(active_K.any()) else torch.ones_like(active_K)


def _whiten(advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor) -> Tensor:
    """A copy with mean 0 and standard deviation 1 over each objective's valid tokens; 0 where it does not vary."""
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

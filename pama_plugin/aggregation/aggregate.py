"""``aggregate``: the interface to every rule. K advantages per token in, one advantage per token and metrics out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pama_plugin.aggregation.blocks import blocks, tokens_per_response, valid_at
from pama_plugin.aggregation.checks import as_tensor, check_combination, check_context, check_weights
from pama_plugin.aggregation.diagnostics import describe, effective_objectives, inspect
from pama_plugin.aggregation.registry import CONTEXT_PARAMETERS, check_options, get_rule

LEVELS = ("token", "sequence", "batch")
RESCALES = ("auto", "none", "unit")


@dataclass(frozen=True)
class Aggregation:
    """The result of ``aggregate``. A token is valid where the mask is true.

    Attributes:
        advantages: (B, A), 0 where masked.
        coefficients: (K,), share of each objective in the result, as the rule defines it: for ``pama`` the mean over
            the tokens with an advantage other than 0. They sum to 1, or to 0 if no token has an advantage.
        metrics: name → value:

            - ``active_fraction``: share of the valid tokens with an advantage other than 0;
            - ``conflict_rate``: share of the valid tokens where one active objective is positive and another negative,
              at the sequence level in the mean over its response;
            - ``rms``: root mean square of the advantages over the valid tokens;
            - ``gain/<i>``: mean of ``A_i · advantage`` over the valid tokens for which objective i has a reward: its
              first-order improvement under the update if token gradients are orthogonal and of equal norm;
            - ``inactive/<i>``: 1 if objective i is inactive, and so excluded, else 0;
            - ``scale``: the constant by which ``rescale`` multiplied, as mean over the valid tokens, if it did;
            - ``effective_objectives``: ``1 / Σ_i c_i²`` of the coefficients: 1 if one objective has all, K if all are
              equal, 0 if all are 0;
            - metrics of the rule, such as ``multiplier/<i>`` for ``lagrangian``.
        memory_K: what a rule with a memory needs in the next step, for each objective; empty for other rules.
    """

    advantages: Tensor
    coefficients: Tensor
    metrics: dict[str, float]
    memory_K: tuple[dict[str, float], ...] = ()


def aggregate(
    rule: str,
    advantages_KBA: Tensor | Sequence[Any],
    mask_BA: Tensor | Sequence[Any],
    *,
    level: str = "token",
    rescale: str = "auto",
    noon: bool | None = None,
    weights: Sequence[Any] | Tensor | None = None,
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
        level: what is combined: the advantages of every ``token``, or their means over each response (``sequence``),
            which all its tokens get. ``gdpo`` and its variants combine means at either level, and rules that combine
            rewards one number per response. ``batch`` is for ``pama`` only.
        rescale: ``unit`` divides the result by the root mean square that it has, with these weights, if the objectives
            are independent and their advantages standard normal: by √K for a sum with weights of 1, for example. So the
            same learning rate, clip and KL coefficient suit rules and numbers of objectives alike. The factor is a
            constant, so objectives that agree give a larger result, and objectives that conflict a smaller one.
            ``none`` returns what the rule defines. ``auto`` is ``none`` for rules that combine rewards, which the
            estimator scales, for ``pama`` at batch level, and for rules that do not state their size; else ``unit``.
        noon: keep only positive advantages ("No Negative", arXiv 2508.07768, Eq. 5). Default: true for ``pama`` with
            ``level="batch"``, false otherwise. Only ``pama`` and ``min_norm`` use it.
        weights: K positive preference weights, 1 each by default. Each rule documents their meaning. Or (K, B), those
            of each response, of which some may be 0: the objective then does not apply to the response.
        whiten: subtract from each objective's advantages, or their means at the sequence level, the mean over its valid
            tokens and divide by the standard deviation before combining. Use it with estimators that do not whiten, so
            that no objective dominates by its scale. The metrics then describe the whitened advantages.
        active: K flags, false for an objective that is known to be inactive, such as one whose reward is constant.
            Objectives whose advantages spread over less than a millionth of the largest are detected automatically.
            Inactive objectives do not affect the result. If no objective is active, all are kept.
        present_KB: (K, B), false where an objective has no reward for a response: the objective is excluded from the
            combination for that response only. All true by default.
        groups_B: (B,) integers, equal for the responses to one prompt. Required by rules that compare these.
        options: options of the rule, and what else it names of ``log_ratio_BA``, ``rewards_KB``, ``violations_K`` and
            ``memory_K``, as ``register_rule`` describes them.

    Raises:
        ValueError: a shape, weight, level, rule or option is invalid, a valid token is not finite, or the rule has no
            unit size.

    >>> import torch
    >>> advantages = torch.tensor([[[1.0, -0.5, -1.2, 0.7]], [[0.4, 0.8, -0.6, -0.6]]])
    >>> result = aggregate("pama", advantages, torch.ones(1, 4, dtype=torch.bool), rescale="none")
    >>> result.advantages
    tensor([[ 0.4000,  0.0000, -0.6000,  0.0000]])
    >>> result.metrics["conflict_rate"]
    0.5
    """
    advantages_KBA = as_tensor("advantages", advantages_KBA)
    device = advantages_KBA.device
    mask_BA = as_tensor("the mask", mask_BA, device).bool()
    if advantages_KBA.ndim != 3 or advantages_KBA.shape[1:] != mask_BA.shape or not advantages_KBA.shape[0]:
        raise ValueError(
            f"advantages must be (K, B, A) with K ≥ 1 and the mask (B, A), "
            f"found {tuple(advantages_KBA.shape)} and {tuple(mask_BA.shape)}"
        )
    for name, value, choices in (("level", level, LEVELS), ("rescale", rescale, RESCALES)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, found {value!r}")
    if not isinstance(noon, bool | None) or not isinstance(whiten, bool):
        raise ValueError(f"noon and whiten must be true or false, found {noon!r} and {whiten!r}")
    chosen = get_rule(rule)
    if level == "batch" and "level" not in chosen.parameters:
        raise ValueError(f"level=batch needs a rule that has it, such as pama, found {rule!r}")
    if chosen.combines == "rewards" and mask_BA.shape[1] != 1:
        raise ValueError(f"rule {rule!r} combines rewards, (K, B, 1), found {tuple(advantages_KBA.shape)}")
    advantages_KBA = advantages_KBA.detach().to(torch.promote_types(advantages_KBA.dtype, torch.float32))
    shape_KB = advantages_KBA.shape[:2]
    present_KB = mask_BA.new_ones(shape_KB) if present_KB is None else as_tensor("present_KB", present_KB, device)
    if present_KB.shape != shape_KB or present_KB.dtype != torch.bool:
        raise ValueError(
            f"present_KB must be (K, B) = {tuple(shape_KB)} booleans, "
            f"found {tuple(present_KB.shape)} of {present_KB.dtype}"
        )
    context: dict[str, Any] = {"level": level, "noon": noon, "groups_B": groups_B}
    context |= {key: options.pop(key) for key in CONTEXT_PARAMETERS if key in options}
    options = check_options(rule, options)
    context = {key: value for key, value in context.items() if key in chosen.parameters and value is not None}
    context |= check_context(rule, context, shape_KB, mask_BA)

    weights_KB = check_weights(weights, advantages_KBA)
    present_KB = present_KB & (weights_KB > 0)
    if level == "sequence":
        advantages_KBA = _means(advantages_KBA, mask_BA)
    active_K = _find_active(active, advantages_KBA, mask_BA, present_KB)
    if whiten:
        advantages_KBA = _whiten(advantages_KBA, mask_BA, present_KB)
    combination = chosen.combine(advantages_KBA, mask_BA, weights_KB, active_K, present_KB, **context, **options)

    check_combination(rule, combination, len(weights_KB), mask_BA)
    combined_BA = combination.advantages_BA.masked_fill(~mask_BA, 0)  # a copy: a rule may return a view
    if not bool(combined_BA.isfinite().all()):
        raise ValueError(f"rule {rule!r} returned NaN or inf at a valid token")
    scale: dict[str, float] = {}
    if combination.unit_rms is None:
        if rescale == "unit":
            raise ValueError(f"rescale=unit: the size of rule {rule!r} is not known with these settings")
    elif rescale == "unit" or (rescale == "auto" and level != "batch"):
        scale["scale"] = _to_unit(combined_BA, combination.unit_rms, mask_BA)
    metrics = describe(advantages_KBA, mask_BA, present_KB, active_K, combined_BA) | scale
    metrics |= {f"inactive/{index}": float(not is_active) for index, is_active in enumerate(active_K.tolist())}
    coefficients_K = combination.coefficients_K * bool(metrics["active_fraction"])
    metrics["effective_objectives"] = effective_objectives(coefficients_K)
    if taken := sorted(metrics.keys() & combination.metrics.keys()):
        raise ValueError(f"rule {rule!r} returned reserved metric names: {', '.join(taken)}; rename them")
    memory_K = _remember(rule, combination.metrics, len(weights_KB)) if "memory_K" in chosen.parameters else ()
    return Aggregation(combined_BA, coefficients_K, metrics | dict(combination.metrics), memory_K)


def _remember(rule: str, metrics: Mapping[str, float], objectives: int) -> tuple[dict[str, float], ...]:
    """The metrics of each objective, by their names without the index."""
    memory_K: tuple[dict[str, float], ...] = tuple({} for _ in range(objectives))
    for key, metric in metrics.items():
        stem, _, index = key.partition("/")
        if index.isdecimal() and int(index) < objectives:
            if not math.isfinite(metric):
                raise ValueError(f"rule {rule!r} has a memory, so its metrics must be finite, found {metric} as {key}")
            memory_K[int(index)][stem] = float(metric)
    return memory_K


def _to_unit(combined_BA: Tensor, unit_rms: float | Tensor, mask_BA: Tensor) -> float:
    """Divide ``combined_BA``, in place, by the size that the rule states; return the mean factor over the tokens."""
    size_B = torch.as_tensor(unit_rms, dtype=torch.float64, device=mask_BA.device).expand(len(mask_BA))
    factor_B = torch.where(size_B > 0, 1 / size_B, 0)
    combined_BA *= factor_B.to(combined_BA.dtype).unsqueeze(-1)
    tokens_B = tokens_per_response(mask_BA) * (size_B > 0)
    return float((factor_B * tokens_B).sum() / tokens_B.sum().clamp(min=1))


def _means(advantages_KBA: Tensor, mask_BA: Tensor) -> Tensor:
    """(K, B, A) the mean of the advantages of each response over its valid tokens, at all its positions (a view)."""
    means_KB1 = advantages_KBA.new_empty(*advantages_KBA.shape[:2], 1)
    for rows in blocks(advantages_KBA):
        sums_Kb1 = advantages_KBA[:, rows].masked_fill(~mask_BA[rows], 0).sum(-1, keepdim=True)
        means_KB1[:, rows] = sums_Kb1 / mask_BA[rows].sum(-1, keepdim=True).clamp(min=1)
    return means_KB1.expand_as(advantages_KBA)


def _find_active(
    active: Sequence[bool] | Tensor | None, advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor
) -> Tensor:
    """(K,) true for active objectives; all true if none is active."""
    active_K = inspect(advantages_KBA, mask_BA, present_KB)
    if active is not None:
        flags_K = as_tensor("active", active, advantages_KBA.device, torch.bool)
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

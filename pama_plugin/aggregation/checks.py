"""Checks of what ``aggregate`` is given, and of what a rule, which may come from another package, returns."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pama_plugin.aggregation.registry import Combination, get_rule


def check_weights(weights: Sequence[Any] | Tensor | None, advantages_KBA: Tensor) -> Tensor:
    """(K, 1) positive weights of the objectives, 1 each by default; or (K, B), at least 0, if responses have others."""
    objectives, responses, _ = advantages_KBA.shape
    if weights is None:
        return advantages_KBA.new_ones(objectives, 1)
    weights_KB = as_tensor("weights", weights, advantages_KBA.device, advantages_KBA.dtype)
    if weights_KB.ndim < 2:
        if weights_KB.shape != (objectives,) or not bool((weights_KB.isfinite() & (weights_KB > 0)).all()):
            raise ValueError(f"weights must be {objectives} positive finite numbers, found {weights}")
        return weights_KB.unsqueeze(-1)
    if weights_KB.shape != (objectives, responses):
        raise ValueError(f"weights must be (K,) or (K, B) = {(objectives, responses)}, found {tuple(weights_KB.shape)}")
    wrong_B = ~((weights_KB.isfinite() & (weights_KB >= 0)).all(0) & (weights_KB > 0).any(0))
    for response in wrong_B.nonzero().flatten().tolist():
        raise ValueError(
            "the weights of a response must be finite, at least 0, and not all 0, found "
            f"{weights_KB[:, response].tolist()} for response {response}"
        )
    return weights_KB


def check_context(rule: str, context: dict[str, Any], shape_KB: torch.Size, mask_BA: Tensor) -> dict[str, Any]:
    """Validate the arguments, besides advantages, that the rule names."""
    named, (objectives, responses), device = get_rule(rule).parameters, shape_KB, mask_BA.device
    checked: dict[str, Any] = {}
    if "groups_B" in named:
        if "groups_B" not in context:
            raise ValueError(f"rule {rule!r} needs groups_B, the prompt index of each response, found none")
        groups_B = checked["groups_B"] = as_tensor("groups_B", context["groups_B"], device)
        if groups_B.shape != (responses,) or groups_B.is_floating_point():
            raise ValueError(
                f"groups_B must be (B,) = ({responses},) integers, found {tuple(groups_B.shape)} of {groups_B.dtype}"
            )
    if "log_ratio_BA" in context:
        log_ratio_BA = checked["log_ratio_BA"] = as_tensor("log_ratio_BA", context["log_ratio_BA"], device)
        if log_ratio_BA.shape != mask_BA.shape or not bool(log_ratio_BA[mask_BA].isfinite().all()):
            raise ValueError(
                f"log_ratio_BA must be (B, A) = {tuple(mask_BA.shape)} numbers, finite at every valid token, found "
                f"{tuple(log_ratio_BA.shape)}"
            )
    if "rewards_KB" in named:
        if "rewards_KB" not in context:
            raise ValueError(f"rule {rule!r} needs rewards_KB, the rewards that the estimator receives, found none")
        rewards_KB = checked["rewards_KB"] = as_tensor("rewards_KB", context["rewards_KB"], device).double()
        if rewards_KB.shape != shape_KB or rewards_KB.isinf().any():
            raise ValueError(
                f"rewards_KB must be (K, B) = {tuple(shape_KB)} numbers, NaN where missing, found "
                f"{tuple(rewards_KB.shape)}{', some infinite' * bool(rewards_KB.isinf().any())}"
            )
    if "violations_K" in named and not _is_list(context.get("violations_K"), objectives):
        raise ValueError(
            f"rule {rule!r} needs violations_K, a list of {objectives} finite numbers or None, found "
            f"{context.get('violations_K')!r}"
        )
    if "memory_K" in named:
        memory_K = checked["memory_K"] = context.get("memory_K") or [{}] * objectives
        if not (
            _is_list([None] * len(memory_K), objectives)
            and all(isinstance(memory, Mapping) and _is_list([*memory.values()], len(memory)) for memory in memory_K)
        ):
            raise ValueError(
                f"memory_K must be a list of {objectives} mappings from names to finite numbers, found {memory_K!r}"
            )
    return checked


def check_combination(rule: str, result: object, objectives: int, mask_BA: Tensor) -> None:
    """Validate the return value of a rule, which may come from another package."""
    if not isinstance(result, Combination):
        raise ValueError(f"rule {rule!r} must return a Combination, found {type(result).__name__}")
    for part in result[:2]:
        if not isinstance(part, Tensor) or not part.is_floating_point():
            raise ValueError(f"rule {rule!r} must return a Combination of floating-point tensors, found {part!r}")
    expected = (tuple(mask_BA.shape), (objectives,))
    shapes = (tuple(result.advantages_BA.shape), tuple(result.coefficients_K.shape))
    if shapes != expected:
        raise ValueError(f"rule {rule!r} must return shapes (B, A) and (K,), {expected}, found {shapes}")
    if not bool(result.coefficients_K.isfinite().all()):
        raise ValueError(f"rule {rule!r} must return finite coefficients, found {result.coefficients_K.tolist()}")
    if result.unit_rms is not None:
        size = torch.as_tensor(result.unit_rms)
        if tuple(size.shape) not in ((), expected[0][:1]) or not bool((size.isfinite() & (size >= 0)).all()):
            raise ValueError(f"rule {rule!r} must return unit_rms as a finite number or (B,), found {size}")


def as_tensor(name: str, values: Any, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
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

"""One interface to every rule: K advantages per token in, one out, with the numbers that explain it."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pama_plugin.aggregation.registry import get_rule

LEVELS = ("token", "sequence", "batch")

# Advantages that vary less than this over the batch are a constant up to rounding. A caller that whitened them, which
# blows rounding up, says so itself: ``active``.
INACTIVE_STD = 1e-6


@dataclass(frozen=True)
class Aggregation:
    """The outcome of ``aggregate``. Means are over valid tokens, those where the mask is true.

    Attributes:
        advantages: (B, A), 0 where masked.
        coefficients: (K,), mean share of each objective over the tokens that have an advantage; they sum to 1 where
            anything is active, else to 0.
        metrics: ``active_fraction``, the share of valid tokens with an advantage other than 0; ``conflict_rate``, the
            share where one objective is positive and another negative; ``rms`` of the advantages; ``gain/<i>``, the
            mean of ``A_i · advantage``, objective i's first-order improvement if token gradients are orthogonal and of
            equal norm; ``inactive/<i>``, 1 if objective i carries no signal, else 0.
    """

    advantages: Tensor
    coefficients: Tensor
    metrics: dict[str, float]


def aggregate(
    rule: str,
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    *,
    level: str = "token",
    noon: bool = True,
    weights: Sequence[float] | Tensor | None = None,
    active: Sequence[bool] | Tensor | None = None,
    present_KB: Tensor | None = None,
    **options: Any,
) -> Aggregation:
    """Combine the advantages of K objectives into the one that the policy update sees.

    Combining advantages is combining losses: for ``A ≥ 0`` the PPO surrogate ``min(uA, clip(u)A) = A·min(u, clip(u))``
    is linear in A, so ``Σ_i c_i L(A_i) = L(Σ_i c_i A_i)``.

    Args:
        rule: one of ``available_rules()``.
        advantages_KBA: (K, B, A) advantages of K objectives, B responses, A action tokens. Not modified.
        mask_BA: (B, A), true at action tokens. What stands elsewhere enters nothing, not even if it is NaN.
        level: ``token``, ``sequence`` or ``batch``: what ``pama`` projects. ``linear`` is the same at every level.
        noon: keep only positive advantages ("No Negative", arXiv 2508.07768, Eq. 5). ``linear`` does not use it.
        weights: K positive preference weights, 1 each if not given.
        active: K flags, false for an objective that is known to carry no signal, such as one whose reward is constant.
            One whose advantages have a standard deviation below 1e-6 is found without being told. If that leaves none,
            none is dropped.
        present_KB: (K, B), false where an objective has no reward for a response: it is left out of the combination for
            that response alone. All true if not given.
        options: what the rule takes besides.

    Raises:
        ValueError: a shape, weight, level, rule or option that cannot be used, or a valid token that is not finite.

    >>> import torch
    >>> advantages = torch.tensor([[[1.0, -0.5, -1.2, 0.7]], [[0.4, 0.8, -0.6, -0.6]]])
    >>> result = aggregate("pama", advantages, torch.ones(1, 4, dtype=torch.bool), noon=False)
    >>> result.advantages
    tensor([[ 0.4000,  0.0000, -0.6000,  0.0000]])
    >>> result.metrics["conflict_rate"]
    0.5
    """
    mask_BA = mask_BA.bool()
    if advantages_KBA.ndim != 3 or advantages_KBA.shape[1:] != mask_BA.shape or not advantages_KBA.shape[0]:
        raise ValueError(
            f"advantages must be (K, B, A) with K ≥ 1 and the mask (B, A), "
            f"found {tuple(advantages_KBA.shape)} and {tuple(mask_BA.shape)}"
        )
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, found {level!r}")
    advantages_KBA = advantages_KBA.detach().to(torch.promote_types(advantages_KBA.dtype, torch.float32))
    if present_KB is None:
        present_KB = mask_BA.new_ones(advantages_KBA.shape[:2])
    if present_KB.shape != advantages_KBA.shape[:2] or present_KB.dtype != torch.bool:
        raise ValueError(
            f"present_KB must be (K, B) = {tuple(advantages_KBA.shape[:2])} flags, found {tuple(present_KB.shape)}"
        )
    for index, advantages_BA in enumerate(advantages_KBA):
        if not bool((advantages_BA.isfinite() | ~(mask_BA & present_KB[index].unsqueeze(-1))).all()):
            raise ValueError(f"advantages must be finite at every valid token, found NaN or inf in objective {index}")
    weights_K = _check_weights(weights, advantages_KBA)
    active_K = _find_active(active, advantages_KBA, mask_BA, present_KB)

    combine = get_rule(rule)
    parameters = inspect.signature(combine).parameters.values()
    accepted = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        takes = ", ".join(accepted) or "none"
        raise ValueError(f"rule {rule!r} has no option {', '.join(unknown)}; it takes {takes}")
    shared = {key: value for key, value in (("level", level), ("noon", noon)) if key in accepted}
    combined_BA, coefficients_K = combine(advantages_KBA, mask_BA, weights_K, active_K, present_KB, **shared, **options)

    combined_BA = combined_BA.masked_fill(~mask_BA, 0)
    metrics = _describe(advantages_KBA, mask_BA, present_KB, combined_BA)
    metrics |= {f"inactive/{index}": float(not kept) for index, kept in enumerate(active_K.tolist())}
    return Aggregation(combined_BA, coefficients_K * bool((combined_BA != 0).any()), metrics)


def _check_weights(weights: Sequence[float] | Tensor | None, advantages_KBA: Tensor) -> Tensor:
    if weights is None:
        return advantages_KBA.new_ones(len(advantages_KBA))
    weights_K = torch.as_tensor(weights, dtype=advantages_KBA.dtype, device=advantages_KBA.device)
    if weights_K.shape != advantages_KBA.shape[:1] or not bool((weights_K.isfinite() & (weights_K > 0)).all()):
        raise ValueError(f"weights must be {len(advantages_KBA)} positive finite numbers, found {weights_K.tolist()}")
    return weights_K


def _find_active(
    active: Sequence[bool] | Tensor | None, advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor
) -> Tensor:
    """(K,) true for the objectives that carry signal; all of them if none does."""
    active_K = advantages_KBA.new_ones(len(advantages_KBA), dtype=torch.bool)
    if active is not None:
        active_K = torch.as_tensor(active, dtype=torch.bool, device=advantages_KBA.device)
        if active_K.shape != advantages_KBA.shape[:1]:
            raise ValueError(f"active must be {len(advantages_KBA)} flags, found {active_K.tolist()}")
    active_K = active_K & present_KB.any(-1)
    if mask_BA.sum() > 1:  # one token has no spread to judge by
        spread = [
            _std(row_BA, mask_BA & present_B.unsqueeze(-1)) for row_BA, present_B in zip(advantages_KBA, present_KB)
        ]
        active_K = active_K & (torch.stack(spread) >= INACTIVE_STD)
    return active_K if bool(active_K.any()) else torch.ones_like(active_K)


def _std(advantages_BA: Tensor, valid_BA: Tensor) -> Tensor:
    count = valid_BA.sum().clamp(min=1)
    mean = advantages_BA.masked_fill(~valid_BA, 0).sum() / count
    return (advantages_BA - mean).masked_fill_(~valid_BA, 0).square_().sum().div(count).sqrt()


def _describe(advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor, combined_BA: Tensor) -> dict[str, float]:
    count = mask_BA.sum().clamp(min=1)
    positive_BA, negative_BA = torch.zeros_like(mask_BA), torch.zeros_like(mask_BA)
    gains = {}
    for index, (advantages_BA, present_B) in enumerate(zip(advantages_KBA, present_KB)):
        valid_BA = mask_BA & present_B.unsqueeze(-1)
        positive_BA |= (advantages_BA > 0) & valid_BA
        negative_BA |= (advantages_BA < 0) & valid_BA
        total = advantages_BA.masked_fill(~valid_BA, 0).mul_(combined_BA).sum()
        gains[f"gain/{index}"] = float(total / valid_BA.sum().clamp(min=1))
    return {
        "active_fraction": float((combined_BA != 0).sum() / count),
        "conflict_rate": float((positive_BA & negative_BA).sum() / count),
        "rms": float((combined_BA.square().sum() / count).sqrt()),
    } | gains

"""PAMA: He & Maghsudi, "Pareto Multi-Objective Alignment for Language Models", arXiv 2508.07768, Theorem 1."""

import functools
import math
from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pama_plugin.aggregation.blocks import blocks, valid_at
from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.unit_scale import by_response, projection_rms, sampled_rms

# The constant of a soft minimum is sampled; more objectives agree too rarely for that.
LARGEST_SOFT = 8


@register_rule("pama")
def pama(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_KB: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    level: str = "token",
    noon: bool | None = None,
    log_ratio_BA: Tensor | None = None,
    reference_clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None,
    soft: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None,
    leak: Annotated[float, Field(ge=0, le=1)] = 0.0,
) -> Combination:
    """``min_c (Σ_i c_i a_i)²``, c on the simplex (Eq. 10): the projection of 0 on ``[min_i a_i, max_i a_i]``.

    The minimum is ``s* = min_i a_i`` if all are positive, ``max_i a_i`` if all are negative, else 0. ``a_i`` is
    ``A_i / w_i``, with the weights scaled to mean 1 over the combined objectives: an objective with a larger weight
    determines ``s*`` more often, and its gain is at least proportional to it, ``A_i · s* ≥ w_i · s*²``. With Noon ("No
    Negative", Eq. 5) ``a_i`` is ``max(A_i, 0) / w_i``. ``level`` selects what is projected:

    - ``token``: every token, ``s*[b,t]``. The bound of the paper is exact here, because at one token all objectives
      share the direction ``∇ log π``.
    - ``sequence``: the means over the tokens of a response, before Noon. All its tokens get ``s*[b]``.
    - ``batch``: one projection of the batch means of ``a_i``, taken after Noon as in Algorithm 1; tokens get
      ``Σ_i c_i a_i``. With Noon, c selects one objective per step. Signed batch means vanish under estimators that
      whiten, and rounding then determines c.

    Inactive objectives are excluded, because a constant would veto all others. An objective without a reward for a
    response is excluded for that response. Coefficients are the mean of c over the tokens with an advantage.

    Args:
        level: see above.
        noon: see above. Default: true with ``level=batch`` only.
        log_ratio_BA: for ``reference_clip``.
        reference_clip: ε of the paper's ``I(A)``, with the reference policy in the ratio: a positive ``a_i`` counts as
            0 at tokens whose probability is over 1 + ε times that under the reference policy, at the token level. The
            paper's text allows this reading. The other one, the ratio to the policy that sampled the responses, is the
            clip of PPO. Such a token is never made likelier again; but most tokens soon are such ones.
        soft: replace the minimum by ``Σ_i c_i a_i`` with ``c = softmax(−soft · a / σ)``, σ the root mean square of the
            ``a_i`` of the token or response, and the maximum by its mirror image: one noisy objective no longer vetoes
            all others. Large values approach the minimum, small ones the mean. Not with ``level=batch``.
        leak: with Noon, the share of negative advantages that is kept: ``a_i = max(A_i, 0) + leak · min(A_i, 0)``. 1 is
            signed PAMA.

    The unit size is ``projection_rms``, so ``rescale`` multiplies the result by 2.346 for two signed objectives of
    equal weight, 4.555 for three, 8.141 for four, and √2 times as much with Noon: by a constant, where K counts the
    active objectives with a reward for the response. The result is at most the constant times the smallest ``|a_i|`` of
    the token or response, and still goes to 0 where objectives only disagree. This bound does not hold with ``soft``
    and ``level=batch``, which have other constants and do not take the smallest. Rewards of ±1 give a root mean square
    of 1.66 for two objectives and 2.88 for four. The size of a soft minimum of more than eight is not known.

    Raises:
        ValueError: ``leak`` without Noon, ``soft`` with ``level=batch``, or ``reference_clip`` without ``log_ratio_BA``
            or at another level than ``token``.

    Differs from the paper in: at token and sequence level, signed advantages and ``rescale`` are the default; neither
    is in the paper, which is ``noon=True, rescale="none"``. Only the PPO clip gates the importance ratio, so c is
    computed once per rollout. ``soft``, ``leak`` and ``level=sequence`` are not in the paper.
    """
    noon = level == "batch" if noon is None else noon
    if leak and not noon:
        raise ValueError("leak needs noon: without it all negative advantages are kept")
    if soft is not None and level == "batch":
        raise ValueError("soft has no meaning with level=batch, which has one minimum per batch")
    if reference_clip is not None and (log_ratio_BA is None or level != "token"):
        found = f"level={level}" if level != "token" else "no reference policy"
        raise ValueError(f"reference_clip needs level=token and a reference policy, found {found}")
    slope = leak if noon else 1.0
    present_KB = present_KB[active_K]
    weights_KB = weights_KB[active_K]
    # Weights have mean 1 over the objectives that are combined for a response; at batch level, over all with a weight.
    counted_KB = (weights_KB > 0).expand_as(present_KB) if level == "batch" else present_KB
    mean_B = (weights_KB * counted_KB).sum(0) / counted_KB.sum(0).clamp(min=1)
    units_KB1 = (weights_KB / torch.where(mean_B > 0, mean_B, 1)).unsqueeze(-1)

    def block(rows: slice) -> tuple[Tensor, Tensor]:
        """``a`` before Noon, and the mask of its valid entries."""
        return advantages_KBA[active_K, rows].div_(units_KB1[:, rows]), valid_at(rows, mask_BA, present_KB)

    combined_BA = torch.empty_like(advantages_KBA[0])
    shares_K = torch.zeros(len(present_KB), dtype=torch.float64, device=mask_BA.device)
    if level == "batch":
        shares_K = _project_means((_leaky(a_KbA, slope), valid) for a_KbA, valid in map(block, blocks(advantages_KBA)))
    for rows in blocks(advantages_KBA):
        a_KbA, valid_KbA = block(rows)
        if reference_clip is not None and log_ratio_BA is not None:
            beyond_bA = log_ratio_BA[rows] > math.log1p(reference_clip)
            a_KbA = torch.where(beyond_bA & (a_KbA > 0), 0, a_KbA)
        if level == "batch":
            mixed_KbA = _leaky(a_KbA, slope).mul_(shares_K.to(a_KbA.dtype)[:, None, None])
            combined_BA[rows] = mixed_KbA.masked_fill_(~valid_KbA, 0).sum(0)
            continue
        projected, c = _project(_leaky(a_KbA, slope), valid_KbA, soft)
        combined_BA[rows] = projected
        shares_K += (c * mask_BA[rows]).sum((1, 2), dtype=torch.float64)
    coefficients_K = weights_KB.new_zeros(len(active_K))
    coefficients_K[active_K] = (shares_K / torch.where(shares_K.sum() > 0, shares_K.sum(), 1)).to(weights_KB.dtype)
    unit_rms = None
    if soft is None or len(present_KB) <= LARGEST_SOFT:
        unit_rms = by_response(weights_KB, counted_KB, functools.partial(_unit_rms, level, slope, soft))
    return Combination(combined_BA, coefficients_K, unit_rms=unit_rms)


@functools.lru_cache(maxsize=1024)
def _unit_rms(level: str, slope: float, soft: float | None, weights: tuple[float, ...]) -> float:
    """The root mean square of the rule for independent standard normal advantages, which are combined with weights."""
    mean = sum(weights) / len(weights)
    weights = tuple(weight / mean for weight in weights)
    if len(weights) == 1:
        return projection_rms(weights, slope)
    weights_K1 = torch.tensor(weights, dtype=torch.float64).unsqueeze(-1)
    if level == "batch":
        if slope < 1:  # c selects the objective with the smallest mean, which is that with the largest weight
            return projection_rms((1.0,), slope) / max(weights)
        return sampled_rms(len(weights), lambda normal_KN: _rms_of_mix(normal_KN / weights_K1, weights_K1))
    if soft is None:
        return projection_rms(weights, slope)

    def project(normal_KN: Tensor) -> Tensor:
        a_KN = _leaky(normal_KN / weights_K1, slope)
        return _project(a_KN, torch.ones_like(a_KN, dtype=torch.bool), soft)[0]

    return sampled_rms(len(weights), project)


def _rms_of_mix(means_KN: Tensor, weights_K1: Tensor) -> Tensor:
    """``√Σ (c_i / w_i)²`` with the c of ``_project_means`` for N batches: the size of the mix."""
    (low_N, at_low_N), (high_N, at_high_N) = means_KN.min(0), means_KN.max(0)
    spread_N = (high_N - low_N).clamp(min=1e-300)
    c_low_N = torch.where(high_N > low_N, (high_N / spread_N).clamp(0, 1), 0.5)
    parts = ((c_low_N, at_low_N), (1 - c_low_N, at_high_N))
    low_part_N, high_part_N = (c_N / weights_K1.squeeze(-1)[index_N] for c_N, index_N in parts)
    return low_part_N.hypot(high_part_N)


def _leaky(a: Tensor, slope: float) -> Tensor:
    """``max(a, 0) + slope · min(a, 0)``: Noon with slope 0."""
    return a.clamp_(min=0) if slope == 0 else a if slope == 1 else torch.where(a < 0, a * slope, a)


def _project(a_KU: Tensor, valid_KU: Tensor, soft: float | None) -> tuple[Tensor, Tensor]:
    """``s*`` (U,) of every unit, a token or a response, and its ``c`` (K', U), which is 0 where ``s* = 0``."""
    if soft is not None:
        return _project_softly(a_KU.masked_fill(~valid_KU, 0), valid_KU, soft)
    if len(valid_KU) < len(a_KU):  # one mask for all objectives
        low_U, high_U = a_KU.amin(0), a_KU.amax(0)
    else:
        low_U = torch.where(valid_KU, a_KU, torch.inf).amin(0)
        high_U = torch.where(valid_KU, a_KU, -torch.inf).amax(0)
    projected_U = torch.where(valid_KU.any(0), low_U.clamp_(min=0) + high_U.clamp_(max=0), 0)
    # Where s* ≠ 0 it is the value of the extreme objective, for which c is 1, or 1/m for each of m tied ones.
    extreme_KU = (a_KU == projected_U).logical_and_(valid_KU).to(a_KU.dtype)
    share_U = (projected_U != 0) / extreme_KU.sum(0).clamp_(min=1)
    return projected_U, extreme_KU.mul_(share_U)


def _project_softly(a_KU: Tensor, valid_KU: Tensor, soft: float) -> tuple[Tensor, Tensor]:
    rms_U = (a_KU.square().sum(0) / valid_KU.expand_as(a_KU).sum(0).clamp(min=1)).sqrt()
    sharp_KU = soft * a_KU / torch.where(rms_U > 0, rms_U, 1)
    c_low_KU, c_high_KU = (
        logits_KU.masked_fill(~valid_KU, -torch.inf).softmax(0).nan_to_num_(nan=0.0)
        for logits_KU in (-sharp_KU, sharp_KU)
    )
    low_U, high_U = ((c_KU * a_KU).sum(0) for c_KU in (c_low_KU, c_high_KU))
    projected_U = low_U.clamp(min=0) + high_U.clamp(max=0)
    return projected_U, torch.where(low_U > 0, c_low_KU, c_high_KU) * (projected_U != 0)


def _project_means(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """c for the whole batch, on the objectives with the lowest and the highest mean, whose mix is ``s*`` of the means.

    The mean of an objective is over the valid tokens of responses for which it has a reward.
    """
    sums = [
        (a_KbA.masked_fill(~valid, 0).sum((1, 2), dtype=torch.float64), valid.expand_as(a_KbA).sum((1, 2)))
        for a_KbA, valid in parts
    ]
    totals_K, tokens_K = (torch.stack(columns).sum(0) for columns in zip(*sums))
    means_K = totals_K / tokens_K.clamp(min=1)
    low, high = means_K.min(), means_K.max()
    at_low_K, at_high_K = means_K == low, means_K == high
    # c_low·low + (1 - c_low)·high = 0 unless both have the same sign; if low = high, any c_low is right.
    spread = torch.where(high > low, high - low, 1)
    c_low = (high / spread).clamp(0, 1)
    return c_low * at_low_K / at_low_K.sum() + (1 - c_low) * at_high_K / at_high_K.sum()

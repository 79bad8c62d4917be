"""Rules that weight objectives by the Gram matrix of their advantages, with the weightings of TorchJD.

``Σ_i c_i w_i A_i`` with c from TorchJD's weighting of the Gram matrix ``M_ij = w_i w_j E_t[A_i A_j]``. The weightings
were published for gradients of losses; with advantages in place of gradients they need no backward pass.

- ``gram:upgrad``: arXiv 2406.16232
- ``gram:cagrad``: arXiv 2110.14048, with its authors' radius of 0.5
- ``gram:pcgrad``: arXiv 2001.06782, in a fixed random order
- ``gram:imtl_g``: Liu et al., ICLR 2021; it is invariant to scale, so weights have no effect
- ``gram:aligned_mtl``: arXiv 2305.19000

A weight scales the advantages of its objective. c may be negative and need not sum to 1; coefficients are the shares
of ``|c_i|``. Inactive objectives are excluded. The unit size is ``√(c'Mc)`` for the M of independent standard normal
advantages.

The option ``balance`` b divides the advantages of each objective by the power b of their root mean square first. With 0
an objective has the influence of its scale, with 1 scales do not matter, and in between they matter less. ORPG and GAPO
balance the norms of the objectives' gradients in this way; here, those of their advantages.

On a Pareto front the result goes to 0 with ``upgrad``, ``imtl_g`` and ``aligned_mtl``,
and with all weightings for two objectives. With three or more objectives, ``cagrad`` keeps its share of the mean of the
objectives and ``pcgrad`` a part that depends on its order, so the policy drifts.

These rules need ``pip install 'pama_plugin[gram]'``.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from pama_plugin.aggregation.blocks import blocks, tokens_per_response, valid_at
from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.unit_scale import normal_gram, size_of_mix
from pama_plugin.aggregation.weights import at, distinct, shares

# Name of the rule → class in TorchJD, and its arguments.
WEIGHTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "upgrad": ("UPGradWeighting", {}),
    "cagrad": ("CAGradWeighting", {"c": 0.5}),
    "pcgrad": ("PCGradWeighting", {}),
    "imtl_g": ("IMTLGWeighting", {}),
    "aligned_mtl": ("AlignedMTLWeighting", {}),
}


def gram_matrix(advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor, scale_K: Tensor, slope: float) -> Tensor:
    """(K, K) float64 ``M_ij = Σ_t a_i a_j / √(T_i T_j)`` with ``a = scale · (max(A, 0) + slope · min(A, 0))``.

    If token gradients are orthogonal and of equal norm, M is the Gram matrix of the objectives' gradients: the shared
    representation of MGDA-UB (Sener & Koltun, arXiv 1810.04650), with the token ratios as that representation. ``a`` is
    0 where an objective has no reward, and ``T_i`` the number of valid tokens where objective i has one. So an
    objective that applies to few responses has no small M_ii, which would give it a large coefficient.
    """
    tokens_K = (present_KB * tokens_per_response(mask_BA)).sum(-1).clamp(min=1).double()
    total_KK = torch.zeros(len(scale_K), len(scale_K), dtype=torch.float64, device=mask_BA.device)
    for rows in blocks(advantages_KBA):
        flat_KN = scaled(rows, advantages_KBA, mask_BA, present_KB, scale_K.unsqueeze(-1), slope).flatten(1).double()
        total_KK += flat_KN @ flat_KN.T
    return total_KK / torch.outer(tokens_K, tokens_K).sqrt()


def mix_by_gram(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    present_KB: Tensor,
    scale_KB: Tensor,
    slope: float,
    weigh: Callable[[Tensor], Tensor],
    factor_K: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``Σ_i c_i a_i`` with c from the Gram matrix of all responses, for each of the scales that responses have.

    Scales are 0 for objectives that are excluded. Responses with other scales have another matrix: that of the whole
    batch if it had their scales. So c is what it would be if these were the scales of all.

    Args:
        weigh: M (k, k) float64 on the CPU, of the objectives that are not excluded → c (k,).
        factor_K: by which advantages are multiplied beforehand, because they are not standard normal.

    Returns:
        (B, A) the combination; c (K, B) or (K, 1); and (B,) the root mean square of the combination for independent
        standard normal advantages.
    """
    scale_KP, which_B = distinct(scale_KB)
    factor_K = torch.ones_like(scale_KP[:, 0]) if factor_K is None else factor_K
    same = scale_KP.shape[1] == 1
    first_K = (factor_K * scale_KP[:, 0] if same else factor_K).to(advantages_KBA.dtype)
    gram_KK = gram_matrix(advantages_KBA, mask_BA, present_KB, first_K, slope).cpu()
    c_KP = torch.zeros(scale_KP.shape, dtype=torch.float64)
    unit_rms_B = torch.zeros(present_KB.shape[1], dtype=torch.float64, device=mask_BA.device)
    for index, scale_K in enumerate(scale_KP.double().cpu().T):
        if not (kept_K := scale_K > 0).any():
            continue  # these responses have weights for inactive objectives only
        own_KK = gram_KK if same else gram_KK * torch.outer(scale_K, scale_K)
        c_KP[kept_K, index] = weigh(own_KK[kept_K][:, kept_K])
        normal_KK = normal_gram(scale_K[kept_K], slope)
        with_scale_B = (which_B == index).expand_as(unit_rms_B)
        unit_rms_B[with_scale_B] = size_of_mix(weigh(normal_KK), normal_KK, present_KB[kept_K][:, with_scale_B])
    c_KB = c_KP.to(mask_BA.device)[:, which_B]
    # One factor where scales differ, because a scale may be far too large for the type, and its c far too small.
    factors_KB = c_KB if same else c_KB * scale_KB.double() * factor_K.unsqueeze(-1)
    in_matrix_K1 = (first_K if same else torch.ones_like(first_K)).unsqueeze(-1)
    combined_BA = torch.empty_like(advantages_KBA[0])
    for rows in blocks(advantages_KBA):
        a_KbA = scaled(rows, advantages_KBA, mask_BA, present_KB, in_matrix_K1, slope)
        combined_BA[rows] = a_KbA.mul_(at(rows, factors_KB.to(a_KbA.dtype))).sum(0)
    return combined_BA, c_KB, unit_rms_B


def scaled(
    rows: slice, advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor, scale_KB: Tensor, slope: float
) -> Tensor:
    """(K, b, A) ``a`` of a block; 0 at invalid tokens and where an objective has no reward."""
    a_KbA = advantages_KBA[:, rows].masked_fill(~valid_at(rows, mask_BA, present_KB), 0).mul_(at(rows, scale_KB))
    return a_KbA if slope == 1 else torch.where(a_KbA < 0, a_KbA * slope, a_KbA)


def _torchjd(
    name: str,
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_KB: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    balance: Annotated[float, Field(ge=0, le=1)] = 0.0,
) -> Combination:
    """The rule ``gram:<name>``; see the docstring of this module.

    Raises:
        ValueError: TorchJD, or a dependency of this weighting, is not installed.
    """
    kind, settings = WEIGHTINGS[name]
    try:
        from torchjd import aggregation

        weighting = getattr(aggregation, kind)(**settings)
    except ImportError as error:
        raise ValueError(f"rule 'gram:{name}' needs pip install 'pama_plugin[gram]', found {error}") from error
    factor_K = None
    if balance:
        one_K = weights_KB[:, 0] if weights_KB.shape[1] == 1 else torch.ones_like(weights_KB[:, 0])
        rms_K = gram_matrix(advantages_KBA, mask_BA, present_KB, one_K, 1.0).diagonal().sqrt() / one_K
        factor_K = torch.where(rms_K > 0, rms_K**-balance, 0)
    scale_KB, weigh = weights_KB * active_K.unsqueeze(-1), functools.partial(_weigh, weighting)
    combined_BA, c_KB, unit_rms_B = mix_by_gram(advantages_KBA, mask_BA, present_KB, scale_KB, 1.0, weigh, factor_K)
    return Combination(combined_BA, shares(c_KB.abs()).to(weights_KB.dtype), unit_rms=unit_rms_B)


def _weigh(weighting: Callable[[Tensor], Tensor], gram_KK: Tensor) -> Tensor:
    """(K,) float64 c of TorchJD's weighting; 0 for objectives without advantages."""
    kept_K = gram_KK.diagonal() > 1e-40 * gram_KK.diagonal().max()  # some weightings divide by the diagonal
    c_K = torch.zeros(len(gram_KK), dtype=torch.float64)
    if kept_K.any():
        gram_KK = gram_KK[kept_K][:, kept_K]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # PCGrad draws an order: keep it the same
            c_K[kept_K] = weighting(gram_KK / gram_KK.trace()).double()  # scaled, so that no entry is tiny
    return c_K


for _name in WEIGHTINGS:
    register_rule(f"gram:{_name}")(functools.partial(_torchjd, _name))

"""The min-norm point of the objectives' advantages: MGDA, with a Gram matrix of advantages in place of gradients."""

import torch
from torch import Tensor

from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.rules.gram import mix_by_gram


@register_rule("min_norm")
def min_norm(
    advantages_KBA: Tensor,
    mask_BA: Tensor,
    weights_KB: Tensor,
    active_K: Tensor,
    present_KB: Tensor,
    *,
    noon: bool = False,
) -> Combination:
    """``Σ_i c_i a_i`` with ``min_c c'Mc``, c on the simplex, ``M_ij = E_t[a_i a_j]`` (see ``gram_matrix``).

    ``a_i`` is ``A_i / w_i``, the weights scaled to mean 1 (with ``noon``, ``max(A_i, 0) / w_i``). It is MGDA-UB (Sener
    & Koltun, arXiv 1810.04650) with the token ratios as the shared representation. Unlike ``pama``, it is right for
    signed advantages of any estimator: every objective gains, ``E_t[A_i · d] ≥ w_i E_t[d²]`` for the result d, if no
    reward is missing. For two
    objectives ``c_1 = (M_22 − M_12) / (M_11 + M_22 − 2 M_12)``, clamped to [0, 1]; for more, Wolfe's algorithm, which
    is exact. Cost: O(K² · tokens), no backward pass. Inactive objectives are excluded; ``a_i`` is 0 for a response
    without a reward. Coefficients are c. The unit size is ``√(min_c c'Mc)`` for the M of independent standard normal
    advantages, 1/√K with equal weights.

    On a Pareto front the result goes to 0 with ``min_c c'Mc``. With ``noon`` it
    does not go to 0, because positive parts cannot cancel.

    >>> from pama_plugin import aggregate
    >>> advantages_KBA = torch.tensor([[[1.0, -0.5, -1.2, 0.7]], [[0.4, 0.8, -0.6, -0.6]]])
    >>> result = aggregate("min_norm", advantages_KBA, torch.ones(1, 4), rescale="none")
    >>> [round(c, 3) for c in result.coefficients.tolist()]
    [0.298, 0.702]
    >>> [round(a, 2) for a in result.advantages.flatten().tolist()]
    [0.58, 0.41, -0.78, -0.21]
    """
    weighted_KB = active_K.unsqueeze(-1) & (weights_KB > 0)
    if weights_KB.shape[1] > 1:
        weights_KB = weights_KB.double()  # the largest over the smallest may be too large for float32
    mean_B = weights_KB[active_K].sum(0) / weighted_KB.sum(0).clamp(min=1)
    scale_KB = torch.where(weighted_KB, mean_B / weights_KB, 0)
    combined_BA, c_KB, unit_rms_B = mix_by_gram(
        advantages_KBA, mask_BA, present_KB, scale_KB, 0.0 if noon else 1.0, min_norm_point
    )
    c_K = c_KB[:, (c_KB > 0).any(0)].mean(1)
    return Combination(combined_BA, c_K.to(advantages_KBA.dtype), unit_rms=unit_rms_B)


def min_norm_point(gram_KK: Tensor) -> Tensor:
    """(K,) ``argmin_c c'Mc`` over the simplex, for a positive semidefinite M in double precision.

    Wolfe, "Finding the nearest point in a polytope", Mathematical Programming 11 (1976): grow a set of objectives whose
    affine hull has its point of least norm inside the simplex, until no other objective is nearer to the origin.

    >>> min_norm_point(torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    tensor([0.2000, 0.8000], dtype=torch.float64)
    """
    largest = float(gram_KK.diagonal().max())
    c_K = torch.zeros(len(gram_KK), dtype=torch.float64)
    c_K[int(gram_KK.diagonal().argmin())] = 1.0
    if not largest > 0:
        return torch.full_like(c_K, 1 / len(c_K))
    gram_KK = gram_KK / largest
    if len(c_K) == 2:
        spread = gram_KK[0, 0] + gram_KK[1, 1] - 2 * gram_KK[0, 1]
        first = ((gram_KK[1, 1] - gram_KK[0, 1]) / spread).clamp(0, 1) if spread > 1e-15 else torch.tensor(0.5)
        return torch.stack([first, 1 - first]).double()
    # Every round lowers c'Mc, so no set of objectives recurs; the bound guards against rounding.
    lengths_K = gram_KK.diagonal().clamp(min=1e-300).sqrt()
    for _ in range(50 * len(c_K)):
        slopes_K = gram_KK @ c_K
        value = (c_K @ slopes_K).clamp(min=0)
        # By how much an objective is nearer than the current point, in units of its length: scales may differ a lot.
        nearness_K = (value - slopes_K) / lengths_K
        nearest = int(nearness_K.argmax())
        if nearness_K[nearest] <= 1e-12 * value.sqrt() + 1e-15 * lengths_K[nearest] or c_K[nearest] > 0:
            break
        kept = torch.cat([c_K.nonzero().flatten(), torch.tensor([nearest])])
        while True:
            inside = _affine_minimum(gram_KK[kept][:, kept], lengths_K[kept])
            if bool((inside > 0).all()):
                break
            now = c_K[kept]
            outward = inside <= 0
            step = (now[outward] / (now - inside)[outward].clamp(min=1e-300)).min().clamp(0, 1)
            moved = now + step * (inside - now)
            moved[outward & (moved <= 1e-15)] = 0
            if not bool((moved == 0).any()):
                moved[torch.where(outward, moved, torch.inf).argmin()] = 0
            c_K[kept] = moved
            kept = kept[moved > 0]
        c_K.zero_()
        c_K[kept] = inside
    return c_K / c_K.sum()


def _affine_minimum(gram_SS: Tensor, lengths_S: Tensor) -> Tensor:
    """``argmin_c c'Mc`` with ``Σ c = 1`` and any signs; the unknowns are ``c_i`` times the length of objective i."""
    size = len(gram_SS)
    unit_S = lengths_S.min() / lengths_S
    system = gram_SS.new_zeros(size + 1, size + 1)
    system[:size, :size] = gram_SS / lengths_S / lengths_S.unsqueeze(-1)
    system[size, :size] = system[:size, size] = unit_S
    target = gram_SS.new_zeros(size + 1)
    target[size] = 1
    solution: Tensor = torch.linalg.lstsq(system, target.unsqueeze(-1), driver="gelsd").solution
    return solution[:size, 0] * unit_S

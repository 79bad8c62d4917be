"""Constants that scale a projection of K independent standard normal advantages to unit root mean square."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

_DRAWS = 2**16  # within 2 % of the integral for up to eight objectives


@functools.cache
def unit_scale(objectives: int, slope: float = 1.0) -> float:
    """``1 / rms(s*)`` for K independent standard normal advantages: a pure number that does not depend on a batch.

    ``s*`` is ``min_i a_i`` where all are positive and ``max_i a_i`` where all are negative, ``a_i`` being
    ``max(A_i, 0) + slope · min(A_i, 0)``. With ``Q(t) = P(A > t) = erfc(t/√2)/2`` a minimum of K exceeds t with
    probability ``Q(t)^K``, so ``E[s*²] = (1 + slope²) ∫_0^∞ 2t Q(t)^K dt``. For two signed objectives that is
    ``½ (1 − 2/π)``. The derivation is ours; the paper (arXiv 2508.07768) leaves ``s*`` as it is.

    With this factor, the projection of independent normal objectives has the size of one objective's advantages, that
    of objectives that agree is up to that many times larger, and that of objectives that conflict still goes to 0, as
    Theorem 2 of the paper requires. A factor that is computed from the projection would violate that.

    Args:
        objectives: K, at least 1.
        slope: 1 for signed advantages, 0 for Noon, ``leak`` in between.

    >>> [round(unit_scale(k), 3) for k in (1, 2, 3, 4, 8)]
    [1.0, 2.346, 4.555, 8.141, 58.978]
    >>> round(unit_scale(2, slope=0.0), 3)
    3.318
    """
    sides = 1 + slope**2
    if objectives == 1:
        return math.sqrt(2 / sides)  # exact: one signed objective is unchanged, bit for bit
    # erfc = 2Q: the factor 2^K keeps the integral from becoming tiny.
    t = torch.linspace(0, 12, 2**16, dtype=torch.float64)
    integral = float(torch.trapezoid(2 * t * torch.special.erfc(t / math.sqrt(2)) ** objectives, t))
    return 2 ** (objectives / 2) / math.sqrt(sides * integral)


def sampled_scale(objectives: int, combine: Callable[[Tensor], Tensor]) -> float:
    """``1 / rms`` of ``combine`` (K, N) → (N,) over standard normal draws, for combinations without a closed form.

    The draws are fixed (a Sobol sequence, mapped by the inverse normal distribution function).

    >>> round(sampled_scale(2, lambda a_KN: a_KN.sum(0)), 2)  # 1/√2
    0.71
    """
    engine = torch.quasirandom.SobolEngine(objectives, scramble=True, seed=0)  # type: ignore[no-untyped-call]
    draws_NK = engine.draw(_DRAWS, dtype=torch.float64)
    normal_KN = torch.special.ndtri(draws_NK.clamp(1e-12, 1 - 1e-12)).T.contiguous()
    return 1 / math.sqrt(float(combine(normal_KN).square().mean()))

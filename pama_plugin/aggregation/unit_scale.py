"""The size of a combination of independent standard normal advantages, by which ``rescale`` divides."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from pama_plugin.aggregation.weights import distinct

_DRAWS = 2**16  # within 2 % of the integral for up to eight objectives


@functools.lru_cache(maxsize=1024)  # weights may have a schedule
def projection_rms(weights: tuple[float, ...], slope: float = 1.0) -> float:
    """``rms(s*)``, the projection of ``pama`` with these weights, for independent standard normal advantages.

    ``s*`` is ``min_i a_i`` where all are positive and ``max_i a_i`` where all are negative, ``a_i`` being
    ``(max(A_i, 0) + slope · min(A_i, 0)) / w_i``. With ``Q(t) = P(A > t) = erfc(t/√2)/2`` the minimum exceeds t with
    probability ``Π_i Q(w_i t)``, so ``E[s*²] = (1 + slope²) ∫_0^∞ 2t Π_i Q(w_i t) dt``. For two signed objectives of
    equal weight that is ``½ (1 − 2/π)``. The derivation is ours; the paper (arXiv 2508.07768) leaves ``s*`` as it is.

    Divided by this number, the projection of independent normal objectives has the size of one objective's advantages,
    that of objectives that agree is up to ``1 / projection_rms`` times larger, and that of objectives that conflict
    still goes to 0, as Theorem 2 of the paper requires. A number that is computed from the projection violates that.

    Args:
        weights: of the objectives that are combined, with mean 1.
        slope: 1 for signed advantages, 0 for Noon, ``leak`` in between.

    >>> [round(1 / projection_rms((1.0,) * objectives), 3) for objectives in (1, 2, 3, 4, 8)]
    [1.0, 2.346, 4.555, 8.141, 58.978]
    >>> round(1 / projection_rms((1.0, 1.0), slope=0.0), 3)
    3.318
    """
    sides = 1 + slope**2
    if len(weights) == 1:
        return math.sqrt(sides / 2) / weights[0]  # exact: one signed objective of weight 1 is unchanged, bit for bit
    # erfc = 2Q: the factor 2^K keeps the integral from becoming tiny.
    t_N = torch.linspace(0, 12 / max(weights), 2**16, dtype=torch.float64)
    above_N = torch.stack([torch.special.erfc(weight * t_N / math.sqrt(2)) for weight in weights]).prod(0)
    integral = float(torch.trapezoid(2 * t_N * above_N, t_N))
    return math.sqrt(sides * integral) / 2 ** (len(weights) / 2)


def sampled_rms(objectives: int, combine: Callable[[Tensor], Tensor]) -> float:
    """The rms of ``combine`` (K, N) → (N,) over standard normal draws, for combinations without a closed form.

    The draws are fixed (a Sobol sequence, mapped by the inverse normal distribution function).

    >>> round(sampled_rms(2, lambda a_KN: a_KN.sum(0)), 2)  # √2
    1.41
    """
    return math.sqrt(float(combine(_normal_draws(objectives)).square().mean()))


@functools.lru_cache(maxsize=8)  # with preferences every step has many weight vectors
def _normal_draws(objectives: int) -> Tensor:
    engine = torch.quasirandom.SobolEngine(objectives, scramble=True, seed=0)  # type: ignore[no-untyped-call]
    draws_NK = engine.draw(_DRAWS, dtype=torch.float64)
    normal_NK: Tensor = torch.special.ndtri(draws_NK.clamp(1e-12, 1 - 1e-12))
    return normal_NK.T.contiguous()


def normal_gram(scale_K: Tensor, slope: float = 1.0) -> Tensor:
    """(K, K) ``E[a_i a_j]`` for ``a_i = scale_i · (max(A_i, 0) + slope · min(A_i, 0))``, A independent standard normal.

    >>> normal_gram(torch.tensor([1.0, 2.0], dtype=torch.float64))
    tensor([[1., 0.],
            [0., 4.]], dtype=torch.float64)
    """
    means_K = scale_K * (1 - slope) / math.sqrt(2 * math.pi)
    return torch.outer(means_K, means_K) + torch.diag(scale_K**2 * (1 + slope**2) / 2 - means_K**2)


def size_of_mix(c_K: Tensor, normal_KK: Tensor, present_KB: Tensor) -> Tensor:
    """(B,) float64 ``√(Σ_ij c_i c_j M_ij)`` over the objectives that have a reward for a response, M as normal_gram.

    >>> present_KB = torch.tensor([[True, True], [True, False]])
    >>> size_of_mix(torch.tensor([0.6, 0.8]), torch.eye(2), present_KB).round(decimals=3)
    tensor([1.0000, 0.6000], dtype=torch.float64)
    """
    mixed_BK = present_KB.T.double() * c_K.to(present_KB.device).double()
    return ((mixed_BK @ normal_KK.to(present_KB.device).double()) * mixed_BK).sum(-1).sqrt()


def by_response(weights_KB: Tensor, counted_KB: Tensor, rms: Callable[[tuple[float, ...]], float]) -> Tensor:
    """(B,) float64 ``rms`` of the weights, sorted, of the objectives that are combined for each response; 0 for none.

    >>> counted_KB = torch.tensor([[True, True, False], [True, False, False]])
    >>> by_response(torch.tensor([[3.0], [4.0]]), counted_KB, lambda weights: math.hypot(*weights))
    tensor([5., 3., 0.], dtype=torch.float64)
    """
    weights_KP, which_B = distinct(weights_KB * counted_KB)
    weights = (tuple(sorted(weight for weight in weights_K if weight)) for weights_K in weights_KP.T.tolist())
    sizes = [rms(each) if each else 0.0 for each in weights]
    return torch.tensor(sizes, dtype=torch.float64, device=counted_KB.device)[which_B]

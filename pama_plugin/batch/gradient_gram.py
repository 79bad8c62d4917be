"""Inner products of the objectives' policy gradients, without the noise that a gradient shares with itself.

The gradient of a batch is the true one plus noise, and the noise of two objectives is that of the same responses. So
product of two gradients of one batch is mostly noise: its expectation exceeds the true product by that of the noises,
and the squared length of a gradient never goes to 0. Products of gradients of *disjoint* responses have no such excess.
The responses are therefore divided into blocks of whole prompts, and only products between blocks are used.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pama_plugin.aggregation.rules.min_norm import min_norm_point

WIDTH = 2**18  # numbers in a sketch: it changes a product by about 0.2 % of the product of the lengths
DRAWS = 1000
FEWEST = 8  # blocks for an interval: of half of them, resampling must find different products


class Estimate(NamedTuple):
    """A number and its standard error; NaN if it cannot be estimated."""

    value: float
    error: float


def sketch(gradients: Iterable[Tensor | None], sizes: Sequence[int], width: int = WIDTH) -> Tensor:
    """(width,) float32 random projection of a gradient, which keeps inner products on average; all of it, if it fits.

    The flat gradient is cut into rows of ``width`` numbers, each with random signs and rotated by a random number of
    places, and the rows are added. The product of two sketches equals that of the gradients x and y on average, with a
    standard deviation of ``‖x‖ ‖y‖ / √width``. All gradients of a comparison get the same signs and places.

    Args:
        gradients: one tensor for each parameter; None is 0.
        sizes: the number of elements of each parameter.
        width: of the sketch.

    >>> sketch([torch.tensor([1.0, 2.0]), None], [2, 1], width=4)
    tensor([1., 2., 0., 0.])
    """
    exact, place = sum(sizes) <= width, 0
    generator = torch.Generator().manual_seed(0)
    signs_W = torch.randint(2, (width,), generator=generator) * 2.0 - 1
    total_W: Tensor | None = None
    for gradient, size in zip(gradients, sizes, strict=True):
        flat = None if gradient is None else gradient.reshape(-1)
        for start in range(0, size, width):
            shift, sign = (int(torch.randint(high, (), generator=generator)) for high in (width, 2))
            if flat is None:
                continue
            piece = flat[start : start + width].float()
            if total_W is None:
                total_W, signs_W = piece.new_zeros(width), signs_W.to(piece.device)
            if exact:
                total_W[place : place + len(piece)] = piece
            else:
                moved_W = torch.nn.functional.pad(piece * signs_W[: len(piece)], (0, width - len(piece))).roll(shift)
                total_W += moved_W if sign else -moved_W
        place += size
    return torch.zeros(width) if total_W is None else total_W


def unbiased_gram(products_MJMJ: Tensor) -> Tensor:
    """(J, J) mean of ``⟨g_i^a, g_j^b⟩`` over all pairs of different blocks a and b.

    >>> gradients_MJ1 = torch.tensor([[[1.0]], [[3.0]], [[2.0]]])  # three blocks of one objective
    >>> unbiased_gram(torch.einsum("aiw,bjw->aibj", gradients_MJ1, gradients_MJ1))
    tensor([[3.6667]])
    """
    blocks = len(products_MJMJ)
    within_JJ = torch.einsum("aiaj->ij", products_MJMJ)
    between_JJ = products_MJMJ.sum((0, 2)) - within_JJ
    return (between_JJ + between_JJ.T) / 2 / (blocks * (blocks - 1)) if blocks > 1 else within_JJ * math.nan


def jackknife(products_MJMJ: Tensor, statistic: Callable[[Tensor], Tensor]) -> list[Estimate]:
    """``statistic`` (J, J) → (N,) of the unbiased Gram, with standard errors from leaving out one block at a time.

    An entry that is undefined for some block that is left out has no error.
    """
    blocks = len(products_MJMJ)
    values_N = statistic(unbiased_gram(products_MJMJ))
    if blocks < 3:
        return [Estimate(value, math.nan) for value in values_N.tolist()]
    kept = [[other for other in range(blocks) if other != left_out] for left_out in range(blocks)]
    without_MN = torch.stack([statistic(unbiased_gram(products_MJMJ[rows][:, :, rows])) for rows in kept])
    errors_N = ((blocks - 1) * without_MN.var(0, correction=0)).sqrt()
    return [Estimate(value, error) for value, error in zip(values_N.tolist(), errors_N.tolist())]


def cosines(gram_JJ: Tensor) -> Tensor:
    """(J − 1,) cosine of the first gradient with each of the others; NaN where a squared length is not positive.

    >>> cosines(torch.tensor([[4.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, -0.1]]))
    tensor([0.5000,    nan])
    """
    squares_J = gram_JJ.diagonal()
    lengths_J = torch.where(squares_J > 0, squares_J, math.nan).sqrt()
    return gram_JJ[0, 1:] / (lengths_J[0] * lengths_J[1:])


class MinNorm(NamedTuple):
    """``min_c ‖Σ_i c_i g_i‖²`` over the simplex, of the true gradients.

    Attributes:
        value: without the excess of the noise. 0 at a Pareto-stationary point. May be negative by chance.
        low, high: bounds of the 95 % interval of the value, from resampled blocks.
        floor: by how much the squared length of the sampled gradient with these shares exceeds its unbiased estimate:
            what it would be at a stationary point.
        coefficients: (K,) c, the mean of both halves.
    """

    value: float
    low: float
    high: float
    floor: float
    coefficients: tuple[float, ...]


def min_norm(products_MKMK: Tensor, draws: int = DRAWS) -> MinNorm:
    """The min-norm point, with c from one half of the blocks and the value from the other, and the other way round.

    c is chosen to make the value small, so with c and value from the same responses it would be too small. The interval
    is the percentile bootstrap over the blocks of each half, with c as it is; it needs eight blocks, and ``draws``.

    >>> gradients_MKW = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).repeat(4, 1, 1)  # orthogonal, without noise
    >>> found = min_norm(torch.einsum("aiw,bjw->aibj", gradients_MKW, gradients_MKW))
    >>> found.value, found.floor, found.coefficients
    (0.5, 0.0, (0.5, 0.5))
    """
    products_MKMK = products_MKMK.double()
    blocks = len(products_MKMK)
    if blocks < 4:
        return MinNorm(math.nan, math.nan, math.nan, math.nan, (math.nan,) * products_MKMK.shape[1])
    halves = (range(0, blocks, 2), range(1, blocks, 2))
    gram_KK = [unbiased_gram(products_MKMK[list(half)][:, :, list(half)]) for half in halves]
    coefficients = [min_norm_point(_positive(part_KK)) for part_KK in gram_KK]
    generator = torch.Generator().manual_seed(0)
    values, draws_D = [], torch.zeros(draws, dtype=torch.float64)
    for half, c_K in zip(halves, reversed(coefficients)):
        rows = torch.tensor(list(half))
        mixed_MM = torch.einsum("i,aibj,j->ab", c_K, products_MKMK[rows][:, :, rows], c_K)
        values.append(_between(mixed_MM))
        for draw in range(draws):
            drawn = torch.randint(len(rows), (len(rows),), generator=generator)
            draws_D[draw] += _between_different(mixed_MM, drawn) / 2
    c_K = (coefficients[0] + coefficients[1]) / 2
    sampled = float(torch.einsum("i,aibj,j->", c_K, products_MKMK, c_K)) / blocks**2
    whole = float(c_K @ unbiased_gram(products_MKMK) @ c_K)
    low, high = math.nan, math.nan
    if draws and blocks >= FEWEST:
        low, high = (float(draws_D.nanquantile(share)) for share in (0.025, 0.975))
    return MinNorm(sum(values) / 2, low, high, sampled - whole, tuple(c_K.tolist()))


def _between(products_MM: Tensor) -> float:
    count = len(products_MM)
    return float((products_MM.sum() - products_MM.diagonal().sum()) / (count * (count - 1)))


def _between_different(products_MM: Tensor, drawn_M: Tensor) -> float:
    """The mean product of drawn blocks that are not the same block; NaN if only one block was drawn."""
    different_MM = drawn_M.unsqueeze(0) != drawn_M.unsqueeze(1)
    values = products_MM[drawn_M][:, drawn_M][different_MM]
    return float(values.mean()) if len(values) else math.nan


def _positive(gram_KK: Tensor) -> Tensor:
    """The nearest positive semidefinite matrix: an unbiased Gram matrix may have negative eigenvalues by chance."""
    values_K, vectors_KK = torch.linalg.eigh(gram_KK)
    nearest_KK: Tensor = (vectors_KK * values_K.clamp(min=0)) @ vectors_KK.T
    return nearest_KK

"""Products of noisy gradients: right on average, with errors and intervals that hold, where the naive ones do not."""

import math

import pytest
import torch

from pama_plugin.batch.gradient_gram import (
    MinNorm,
    cosines,
    jackknife,
    min_norm,
    sketch,
    unbiased_gram,
)
from pama_plugin.batch.metrics import describe_gradients

pytestmark = pytest.mark.property

TRUE_KW = torch.zeros(2, 400, dtype=torch.float64)
TRUE_KW[0, 0], TRUE_KW[1, :2] = 1.0, torch.tensor([0.6, 0.8], dtype=torch.float64)  # of length 1, with the cosine 0.6


def products(true_KW: torch.Tensor, blocks: int, noise: float, seed: int) -> torch.Tensor:
    """Of gradients whose noise is the same for all objectives of a block."""
    generator = torch.Generator().manual_seed(seed)
    noise_M1W = noise * torch.randn(blocks, 1, true_KW.shape[1], generator=generator, dtype=torch.float64)
    gradients_MKW = true_KW + noise_M1W
    return torch.einsum("aiw,bjw->aibj", gradients_MKW, gradients_MKW)


def test_the_gram_matrix_is_right_on_average_where_that_of_the_sampled_gradient_is_not() -> None:
    drawn = [products(TRUE_KW, 8, noise=0.3, seed=seed) for seed in range(300)]
    mean_KK = torch.stack([unbiased_gram(each) for each in drawn]).mean(0)
    torch.testing.assert_close(mean_KK, TRUE_KW @ TRUE_KW.T, atol=0.06, rtol=0)
    naive_KK = torch.stack([each.sum((0, 2)) / 64 for each in drawn]).mean(0)
    assert float(naive_KK[0, 1]) > 4, "the common noise of the objectives"


def test_the_standard_error_of_a_cosine_is_what_it_varies_by() -> None:
    found = [jackknife(products(TRUE_KW, 16, noise=0.1, seed=seed), cosines)[0] for seed in range(300)]
    values, errors = (torch.tensor([getattr(each, field) for each in found]) for field in ("value", "error"))
    assert float(values.mean()) == pytest.approx(0.6, abs=0.03)
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.25)


def test_the_min_norm_is_zero_on_average_at_a_stationary_point_and_its_interval_holds() -> None:
    """Two opposed gradients: some convex combination is 0, in spite of the noise."""
    opposed_KW = torch.stack([TRUE_KW[0], -TRUE_KW[0]])
    found = [min_norm(products(opposed_KW, 16, noise=0.3, seed=seed)) for seed in range(60)]
    assert sum(each.value for each in found) / 60 == pytest.approx(0.0, abs=0.1)
    assert sum(each.floor for each in found) / 60 == pytest.approx(400 * 0.3**2 / 16, rel=0.1)
    covered = sum(each.low <= 0 <= each.high for each in found)
    assert covered >= 54, covered  # 57 of 60 on average


def test_the_min_norm_of_gradients_that_agree() -> None:
    found = [min_norm(products(TRUE_KW, 16, noise=0.05, seed=seed)) for seed in range(30)]
    exact = 0.8  # of two unit vectors with the cosine 0.6: (1 + 0.6) / 2
    assert sum(each.value for each in found) / 30 == pytest.approx(exact, abs=0.05)
    assert sum(each.low <= exact <= each.high for each in found) >= 25
    for each in found:
        assert each.coefficients == pytest.approx((0.5, 0.5), abs=0.25)


@pytest.mark.parametrize(("blocks", "least"), [(7, None), (8, 51)])
def test_an_interval_needs_eight_blocks(blocks, least) -> None:
    opposed_KW = torch.stack([TRUE_KW[0], -TRUE_KW[0]])
    found = [min_norm(products(opposed_KW, blocks, noise=0.3, seed=seed)) for seed in range(60)]
    if least is None:
        assert all(math.isnan(each.low) and not math.isnan(each.value) for each in found)
    else:
        assert sum(each.low <= 0 <= each.high for each in found) >= least


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_few_blocks_leave_undefined_what_they_cannot_tell(blocks) -> None:
    few = products(TRUE_KW, blocks, noise=0.0, seed=0)
    assert math.isnan(min_norm(few).value) and isinstance(min_norm(few), MinNorm)
    (cosine,) = jackknife(few, cosines)
    assert math.isnan(cosine.value) == (blocks == 1) and math.isnan(cosine.error) == (blocks < 3)


def test_a_sketch_keeps_products() -> None:
    """Of gradients whose neighbours are alike, as those of the rows of a matrix are."""
    generator = torch.Generator().manual_seed(1)
    smooth = torch.randn(2, 60, 1, generator=generator).expand(2, 60, 500).reshape(2, 30_000) + 0.5
    sizes = [10_000, 7, 19_993]
    sketches = [sketch(row.split(sizes), sizes, width=4096) for row in smooth]
    lengths = float(smooth[0].norm() * smooth[1].norm())
    for one, other in ((0, 0), (0, 1), (1, 1)):
        exact = float(smooth[one] @ smooth[other])
        assert float(sketches[one] @ sketches[other]) == pytest.approx(exact, abs=5 * lengths / math.sqrt(4096))
    assert not torch.equal(sketch(smooth[0].split(sizes), sizes, 4096), smooth[0][:4096])


def test_a_missing_gradient_is_zero_and_moves_no_other() -> None:
    sizes = [5000, 5000]
    one, other = torch.randn(5000), torch.randn(5000)
    both = sketch([one, other], sizes, width=1024)
    torch.testing.assert_close(both, sketch([one, None], sizes, 1024) + sketch([None, other], sizes, 1024))
    assert (sketch([None, None], sizes, 1024) == 0).all()


def test_the_logged_metrics() -> None:
    true_JW = torch.stack([TRUE_KW.mean(0), *TRUE_KW])
    found = describe_gradients(products(true_JW, 4, noise=0.0, seed=0), ["a", "b"])
    assert found == {
        "pama/gradient_cosine/a": pytest.approx(0.8**0.5),
        "pama/gradient_cosine_error/a": pytest.approx(0, abs=1e-6),
        "pama/gradient_cosine/b": pytest.approx(0.8**0.5),
        "pama/gradient_cosine_error/b": pytest.approx(0, abs=1e-6),
        "pama/gradient_gram/a": pytest.approx(1),
        "pama/gradient_gram/a/b": pytest.approx(0.6),
        "pama/gradient_gram/b": pytest.approx(1),
        "pama/gradient_min_norm": pytest.approx(0.8),
        "pama/gradient_min_norm_floor": pytest.approx(0, abs=1e-9),
    }

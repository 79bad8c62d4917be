"""Four tokens of two objectives, with the results of the rules computed by hand."""

import pytest
import torch

from pama_plugin import aggregate

pytestmark = pytest.mark.property

ADVANTAGES_KBA = torch.tensor([[[1.0, -0.5, -1.2, 0.7]], [[0.4, 0.8, -0.6, -0.6]]])
MASK_BA = torch.ones(1, 4, dtype=torch.bool)

# rule and options, token advantages, coefficients, gains
ROWS = {
    "linear": (
        dict(rule="linear", weights=[0.5, 0.5], rescale="none"),
        [0.70, 0.15, -0.90, 0.05],
        [0.5, 0.5],
        [0.435, 0.2275],
    ),
    "token, Noon": (dict(rule="pama", noon=True, rescale="none"), [0.40, 0, 0, 0], [0, 1], [0.100, 0.040]),
    "token, signed": (dict(rule="pama", rescale="none"), [0.40, 0, -0.60, 0], [0, 1], [0.280, 0.130]),
    # the same times c_2 = 1 / √(½ (1 − 2/π)) = 2.346034
    "pama": (dict(rule="pama"), [0.938414, 0, -1.407621, 0], [0, 1], [0.656890, 0.304984]),
    # c_1 = .4 / 1.49 and 1.22 / 4.1
    "min-norm, Noon": (
        dict(rule="min_norm", noon=True, rescale="none"),
        [0.561074, 0.585235, 0, 0.187919],
        [0.268456, 0.731544],
        [0.1, 0.144966],
    ),
    "min-norm, signed": (
        dict(rule="min_norm", rescale="none"),
        [0.578537, 0.413171, -0.778537, -0.213171],
        [0.297561, 0.702439],
        [0.289244, 0.289244],
    ),
    "batch, Noon": (dict(rule="pama", level="batch"), [0.40, 0.80, 0, 0], [0, 1], [0.0, 0.200]),
}


@pytest.mark.parametrize("row", ROWS)
def test_row(row: str, immutable_call) -> None:
    options, advantages, coefficients, gains = ROWS[row]
    rule, options = options["rule"], {key: value for key, value in options.items() if key != "rule"}
    result = immutable_call(aggregate, rule, ADVANTAGES_KBA, MASK_BA, **options)
    torch.testing.assert_close(result.advantages, torch.tensor([advantages]), atol=1e-6, rtol=0)
    torch.testing.assert_close(result.coefficients, torch.tensor(coefficients, dtype=torch.float32), atol=1e-6, rtol=0)
    assert [result.metrics["gain/0"], result.metrics["gain/1"]] == pytest.approx(gains, abs=1e-6)
    assert result.metrics["conflict_rate"] == 0.5
    assert result.metrics["active_fraction"] == sum(value != 0 for value in advantages) / 4

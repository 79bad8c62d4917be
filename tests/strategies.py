"""What hypothesis draws: advantages of K objectives over a ragged batch, with rubbish wherever the mask is false."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from pama_plugin import Aggregation, aggregate


@st.composite
def advantages(draw: st.DrawFn, min_objectives: int = 1, max_objectives: int = 8) -> tuple[Tensor, Tensor]:
    """(K, B, A) float32 advantages and a (B, A) mask with at least one valid token; padding is NaN."""
    shape = draw(st.integers(min_objectives, max_objectives)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values_KBA = torch.randn(shape, generator=generator)
    if draw(st.booleans()):  # few distinct values, so that ties and exact zeros happen
        values_KBA = values_KBA.round()
    mask_BA = torch.rand(shape[1:], generator=generator) < 0.7
    mask_BA[0, 0] = True
    return values_KBA.masked_fill(~mask_BA, float("nan")), mask_BA


VARIANTS = [
    dict(rule="linear"),
    *(
        dict(rule="pama", level=level, noon=noon, rescale=rescale)
        for level in ("token", "sequence", "batch")
        for noon in (True, False)
        for rescale in ("unit", "none")
    ),
]
variants = st.sampled_from(VARIANTS)


def call(variant: dict, advantages_KBA: Tensor, mask_BA: Tensor, **more) -> Aggregation:
    return aggregate(advantages_KBA=advantages_KBA, mask_BA=mask_BA, **variant, **more)

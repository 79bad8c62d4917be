"""Whitening within groups, shared by GDPO and its variants. A group is the responses to one prompt."""

import torch
from torch import Tensor

from pama_plugin.aggregation.blocks import tokens_per_response

# Values are constant up to rounding if their standard deviation is below this share of the largest magnitude.
CONSTANT = 1e-6


def group_scores(advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor, groups_B: Tensor) -> Tensor:
    """(K, B) float64 ``Z_i[b] = (m_i[b] − μ) / σ``, where m is the mean over the valid tokens of the response.

    μ and σ are the mean and sample standard deviation of m over the responses of the group that have a reward. Z is 0
    if the group is constant or has a single response, and for a response without a reward.
    """
    totals_KB = torch.stack([row_BA.masked_fill(~mask_BA, 0).sum(-1, dtype=torch.float64) for row_BA in advantages_KBA])
    tokens_B = tokens_per_response(mask_BA)
    counted_KB = present_KB & (tokens_B > 0)
    means_KB = (totals_KB / tokens_B.clamp(min=1)).masked_fill(~counted_KB, 0)
    _, group_B = torch.unique(groups_B, return_inverse=True)

    def over_group(numbers_KB: Tensor, reduce: str) -> Tensor:
        reduced_KG = numbers_KB.new_zeros(len(numbers_KB), len(group_B))
        index_KB = group_B.expand_as(numbers_KB)
        return reduced_KG.scatter_reduce_(1, index_KB, numbers_KB, reduce).gather(1, index_KB)

    count_KB = over_group(counted_KB.double(), "sum")
    centred_KB = (means_KB - over_group(means_KB, "sum") / count_KB.clamp(min=1)).masked_fill(~counted_KB, 0)
    std_KB = (over_group(centred_KB.square(), "sum") / (count_KB - 1).clamp(min=1)).sqrt()
    varies_KB = std_KB > CONSTANT * over_group(means_KB.abs(), "amax")
    return torch.where(varies_KB, centred_KB / torch.where(varies_KB, std_KB, 1), 0)


def spread_and_whiten(values_B: Tensor, counts_B: Tensor, mask_BA: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, A) the value of a response at all its tokens, with mean 0 and standard deviation 1 over the valid tokens.

    Responses where ``counts_B`` is false are excluded and get 0. If the values are constant, all get 0.
    """
    tokens_B = tokens_per_response(mask_BA) * counts_B
    total = tokens_B.sum().clamp(min=1)
    centred_B = (values_B - (values_B * tokens_B).sum() / total) * (tokens_B > 0)
    std = ((centred_B.square() * tokens_B).sum() / total).sqrt()
    varies = std > CONSTANT * centred_B.abs().max()
    whitened_B = torch.where(varies, centred_B / torch.where(varies, std, 1), 0)
    return whitened_B.to(dtype).unsqueeze(-1).repeat(1, mask_BA.shape[1])

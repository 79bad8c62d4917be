"""What the rules of GDPO's family have in common: each objective measured within its prompt's group of responses."""

import torch
from torch import Tensor

from pama_plugin.aggregation.blocks import tokens_per_response

# A standard deviation below this share of the largest advantage is that of a constant, up to rounding.
CONSTANT = 1e-6


def group_scores(advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor, groups_B: Tensor) -> Tensor:
    """(K, B) float64 ``Z_i[b] = (m_i[b] − μ) / σ``, with m the mean over the valid tokens of the response.

    μ and σ are mean and sample standard deviation of m over the group's responses that have a reward. It is 0 where a
    group does not vary, is a single response, or has no reward.
    """
    totals_KB = torch.stack([row_BA.masked_fill(~mask_BA, 0).sum(-1, dtype=torch.float64) for row_BA in advantages_KBA])
    tokens_B = tokens_per_response(mask_BA)
    counted_KB = present_KB & (tokens_B > 0)
    means_KB = (totals_KB / tokens_B.clamp(min=1)).masked_fill(~counted_KB, 0)
    _, group_B = torch.unique(groups_B, return_inverse=True)

    def over_group(numbers_KB: Tensor, reduce: str) -> Tensor:
        found_KG = numbers_KB.new_zeros(len(numbers_KB), len(group_B))
        index_KB = group_B.expand_as(numbers_KB)
        return found_KG.scatter_reduce_(1, index_KB, numbers_KB, reduce).gather(1, index_KB)

    count_KB = over_group(counted_KB.double(), "sum")
    centred_KB = (means_KB - over_group(means_KB, "sum") / count_KB.clamp(min=1)).masked_fill(~counted_KB, 0)
    std_KB = (over_group(centred_KB.square(), "sum") / (count_KB - 1).clamp(min=1)).sqrt()
    varies_KB = std_KB > CONSTANT * over_group(means_KB.abs(), "amax")
    return torch.where(varies_KB, centred_KB / torch.where(varies_KB, std_KB, 1), 0)


def spread_and_whiten(values_B: Tensor, counts_B: Tensor, mask_BA: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, A) one value for all tokens of a response, with mean 0 and standard deviation 1 over the valid tokens.

    Only responses that count do, the others are 0; so are all if the values do not vary.
    """
    tokens_B = tokens_per_response(mask_BA) * counts_B
    total = tokens_B.sum().clamp(min=1)
    centred_B = (values_B - (values_B * tokens_B).sum() / total) * (tokens_B > 0)
    std = ((centred_B.square() * tokens_B).sum() / total).sqrt()
    varies = std > CONSTANT * centred_B.abs().max()
    whitened_B = torch.where(varies, centred_B / torch.where(varies, std, 1), 0)
    return whitened_B.to(dtype).unsqueeze(-1).repeat(1, mask_BA.shape[1])

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
    centred_KB, std_KB = centre_groups(means_KB, counted_KB, groups_B), _stds(means_KB, counted_KB, groups_B)
    return torch.where(std_KB > 0, centred_KB / torch.where(std_KB > 0, std_KB, 1), 0)


def group_spreads(rewards_KB: Tensor, groups_B: Tensor) -> Tensor:
    """(K, B) float64 sample standard deviation of the rewards of each response's group; NaN is missing.

    >>> group_spreads(torch.tensor([[1.0, 3.0, torch.nan, 5.0]]), torch.tensor([0, 0, 0, 1]))
    tensor([[1.4142, 1.4142, 1.4142, 0.0000]], dtype=torch.float64)
    """
    return _stds(rewards_KB.double().nan_to_num(), ~rewards_KB.isnan(), groups_B)


def centre_groups(values_KB: Tensor, counted_KB: Tensor, groups_B: Tensor) -> Tensor:
    """(K, B) minus the mean of the group over the values that count; 0 for those that do not."""
    values_KB = values_KB.masked_fill(~counted_KB, 0)
    count_KB = _over_group(counted_KB.double(), groups_B, "sum").clamp(min=1)
    return (values_KB - _over_group(values_KB, groups_B, "sum") / count_KB).masked_fill(~counted_KB, 0)


def _stds(values_KB: Tensor, counted_KB: Tensor, groups_B: Tensor) -> Tensor:
    """(K, B) sample standard deviation of the group; 0 if its values are equal up to rounding."""
    squares_KB = _over_group(centre_groups(values_KB, counted_KB, groups_B).square(), groups_B, "sum")
    count_KB = _over_group(counted_KB.double(), groups_B, "sum")
    std_KB = (squares_KB / (count_KB - 1).clamp(min=1)).sqrt()
    largest_KB = _over_group(values_KB.masked_fill(~counted_KB, 0).abs(), groups_B, "amax")
    return torch.where(std_KB > CONSTANT * largest_KB, std_KB, 0)


def _over_group(numbers_KB: Tensor, groups_B: Tensor, reduce: str) -> Tensor:
    """(K, B) for each response the sum, or largest, of its group."""
    _, group_B = torch.unique(groups_B, return_inverse=True)
    reduced_KG = numbers_KB.new_zeros(len(numbers_KB), len(group_B))
    index_KB = group_B.expand_as(numbers_KB)
    return reduced_KG.scatter_reduce_(1, index_KB, numbers_KB, reduce).gather(1, index_KB)


def spread(values_B: Tensor, mask_BA: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, A) the value of a response at all its tokens."""
    return values_B.to(dtype).unsqueeze(-1).expand_as(mask_BA)


def centre(values_B: Tensor, counts_B: Tensor, mask_BA: Tensor) -> Tensor:
    """(B,) minus the mean over the valid tokens; 0 for responses where ``counts_B`` is false, which are excluded."""
    tokens_B = tokens_per_response(mask_BA) * counts_B
    return (values_B - (values_B * tokens_B).sum() / tokens_B.sum().clamp(min=1)) * (tokens_B > 0)


def whiten(values_B: Tensor, counts_B: Tensor, mask_BA: Tensor) -> Tensor:
    """(B,) with mean 0 and standard deviation 1 over the valid tokens.

    Responses where ``counts_B`` is false are excluded and get 0. If the values are constant, all get 0.
    """
    tokens_B = tokens_per_response(mask_BA) * counts_B
    centred_B = centre(values_B, counts_B, mask_BA)
    std = ((centred_B.square() * tokens_B).sum() / tokens_B.sum().clamp(min=1)).sqrt()
    varies = std > CONSTANT * centred_B.abs().max()
    return torch.where(varies, centred_B / torch.where(varies, std, 1), 0)

"""A reading of PAMA that cannot learn, as a negative control: every token gets the same scalar of the batch."""

import torch
from torch import Tensor

from pama_plugin.aggregation import Combination


def uniform_scalar(
    advantages_KBA: Tensor, mask_BA: Tensor, weights_KB: Tensor, active_K: Tensor, present_KB: Tensor
) -> Combination:
    """``s* = min_i E_t[max(A_i, 0) / w_i]`` at every token, as in the baseline of the CTWA code.

    It does not distinguish tokens or responses, so it makes all sampled responses more likely. Coefficients are 1 for
    the objective with the smallest mean, or 1/m for each of m tied objectives.
    """
    valid_KBA = mask_BA & present_KB.unsqueeze(-1)
    positive_KBA = torch.where(valid_KBA, advantages_KBA.clamp(min=0) / weights_KB.unsqueeze(-1), 0)
    means_K = positive_KBA.sum((1, 2), dtype=torch.float64) / valid_KBA.sum((1, 2)).clamp(min=1)
    means_K = means_K.masked_fill(~active_K, torch.inf)
    least_K = means_K == means_K.min()
    scalar = means_K.min().to(advantages_KBA.dtype)
    rewarded_BA = valid_KBA.any(0).to(advantages_KBA.dtype)
    return Combination(scalar * rewarded_BA, (least_K / least_K.sum()).to(weights_KB.dtype))

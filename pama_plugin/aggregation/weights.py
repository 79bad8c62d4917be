"""Weights of the objectives: the same for all responses, (K, 1), or each response's own, (K, B)."""

import torch
from torch import Tensor


def at(rows: slice, weights_KB: Tensor) -> Tensor:
    """(K, b or 1, 1) the weights of a block of responses, for products with (K, b, A)."""
    return (weights_KB if weights_KB.shape[1] == 1 else weights_KB[:, rows]).unsqueeze(-1)


def weighted_sum(weights_KB: Tensor, values_KB: Tensor) -> Tensor:
    """(B,) ``Σ_i w_i v_i`` of each response.

    >>> values_KB = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    >>> weighted_sum(torch.tensor([[1.0], [0.5]]), values_KB)
    tensor([ 6., 12.])
    >>> weighted_sum(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), values_KB)
    tensor([ 1., 20.])
    """
    return weights_KB[:, 0] @ values_KB if weights_KB.shape[1] == 1 else (weights_KB * values_KB).sum(0)


def shares(weights_KB: Tensor) -> Tensor:
    """(K,) the share of each objective in the weights of a response, as mean over the responses that have weights.

    >>> shares(torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))
    tensor([0.6250, 0.3750])
    """
    if weights_KB.shape[1] == 1:
        total = weights_KB[:, 0].sum()
        return weights_KB[:, 0] / torch.where(total > 0, total, 1)
    totals_B = weights_KB.double().sum(0)
    means_K = (weights_KB / torch.where(totals_B > 0, totals_B, 1)).sum(1) / (totals_B > 0).sum().clamp(min=1)
    return means_K.to(weights_KB.dtype)


def distinct(weights_KB: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct columns (K, P), and for each response, (B,) or (1,), which it has."""
    weights_KP, which_B = torch.unique(weights_KB, dim=1, return_inverse=True)
    return weights_KP, which_B

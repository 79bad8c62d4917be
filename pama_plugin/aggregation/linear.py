"""Linear scalarisation of advantages: the weighted sum that most multi-reward trainers use."""

import torch
from torch import Tensor

from pama_plugin.aggregation.registry import Combination, register_rule


@register_rule("linear")
def linear(
    advantages_KBA: Tensor, mask_BA: Tensor, weights_K: Tensor, active_K: Tensor, present_KB: Tensor
) -> Combination:
    """``Σ_i w_i A_i``: each ``A_i`` from its own run of the host's estimator, so whitened where the estimator whitens.

    Weights are used as given, and an objective without signal stays in: it adds what its estimator made of it. With one
    objective of weight 1 the result is ``A_1`` bit for bit. Of a response it sums the objectives that have a
    reward for it.
    """
    combined_BA = torch.zeros_like(advantages_KBA[0])
    for advantages_BA, weight, present_B in zip(advantages_KBA, weights_K, present_KB):
        combined_BA.add_((advantages_BA * weight).masked_fill_(~present_B.unsqueeze(-1), 0))
    return Combination(combined_BA.masked_fill_(~mask_BA, 0), weights_K / weights_K.sum())

"""MORLHF: one reward from all, before the estimator: what multi-objective RLHF is usually compared with."""

from torch import Tensor

from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.rules.linear import linear


@register_rule("morlhf", of="rewards", linear=True)
def morlhf(
    advantages_KBA: Tensor, mask_BA: Tensor, weights_K: Tensor, active_K: Tensor, present_KB: Tensor
) -> Combination:
    """``Σ_i w_i r_i`` of the rewards (K, B, 1), which the estimator then takes for the one reward of each response.

    The baseline of arXiv 2508.07768 and of most work before it. It feels the scale of every reward: one that varies ten
    times as much as another has ten times its say, whatever the weights. ``linear`` sums after the estimator, which
    whitens each objective by itself. Weights are used as given, coefficients are their shares. With a critic the
    baseline is ``Σ_i w_i V_i`` of the value heads, which is the value of this sum unless the KL is part of the rewards:
    every head has learned it, so that it counts ``Σ w`` times; take it as a loss, or weights that sum to 1.

    On a Pareto front it goes on as ``linear`` does, and an estimator that whitens (all but ``rloo``, ``dr_grpo`` and
    ``flash_reinforce``) divides by what is left: the less the sum varies, the more its noise grows.

    An objective without signal stays in. A missing reward adds nothing here; a training run has filled it in before,
    with the mean of the objective's rewards for the same prompt where the estimator compares those, else of the batch.

    >>> import torch
    >>> from pama_plugin import aggregate
    >>> rewards_KB1 = torch.tensor([[[1.0], [2.0]], [[10.0], [30.0]]])
    >>> aggregate("morlhf", rewards_KB1, torch.ones(2, 1), weights=[1, 0.1]).advantages.flatten()
    tensor([2., 5.])
    """
    return linear(advantages_KBA, mask_BA, weights_K, active_K, present_KB)

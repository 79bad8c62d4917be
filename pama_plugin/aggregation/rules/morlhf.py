"""MORLHF: a weighted sum of rewards before the estimator, the usual baseline of multi-objective RLHF."""

from torch import Tensor

from pama_plugin.aggregation.registry import Combination, register_rule
from pama_plugin.aggregation.rules.linear import linear


@register_rule("morlhf", of="rewards", linear=True)
def morlhf(
    advantages_KBA: Tensor, mask_BA: Tensor, weights_KB: Tensor, active_K: Tensor, present_KB: Tensor
) -> Combination:
    """``Σ_i w_i r_i`` of the rewards (K, B, 1), passed to the estimator as the reward of each response.

    The baseline of arXiv 2508.07768 and of most work before it. It depends on the scale of every reward: a reward that
    varies ten times as much as another has ten times its influence at equal weights. ``linear`` sums after the
    estimator, which whitens each objective separately. Weights are not normalised; coefficients are their shares. With
    a critic the baseline is ``Σ_i w_i V_i`` of the value heads. It is the value of this sum unless the KL is part of
    the rewards: every head then includes the KL, which counts ``Σ w`` times. Use the KL as a loss, or weights that sum
    to 1. The estimator sets the size of the result, so ``rescale`` has no unit size for it.

    On a Pareto front it moves as ``linear`` does. An estimator that whitens (all but ``rloo``, ``dr_grpo`` and
    ``flash_reinforce``) divides by the standard deviation of the sum: the less the sum varies, the more noise grows.

    An inactive objective is excluded, with its value head. A missing reward adds 0 here; training fills it in
    beforehand, with the mean of the objective's rewards for the same prompt if the estimator compares those, else with
    the mean of the batch.

    >>> import torch
    >>> from pama_plugin import aggregate
    >>> rewards_KB1 = torch.tensor([[[1.0], [2.0]], [[10.0], [30.0]]])
    >>> aggregate("morlhf", rewards_KB1, torch.ones(2, 1), weights=[1, 0.1]).advantages.flatten()
    tensor([2., 5.])
    """
    return linear(advantages_KBA, mask_BA, weights_KB, active_K, present_KB)._replace(unit_rms=None)

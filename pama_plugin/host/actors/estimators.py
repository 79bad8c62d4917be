"""OpenRLHF's advantage estimators: which rewards they compare and which they clip."""

from typing import NamedTuple

import torch
from torch import Tensor

from pama_plugin.batch.combine import tells_responses_apart

# These subtract a statistic of the prompt's group of responses.
BY_GROUP = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")
# These subtract nothing before OpenRLHF clips to --reward.clip_range.
WITHOUT_BASELINE = ("gae", "reinforce")


class Estimator(NamedTuple):
    """The name of one of OpenRLHF's estimators, and ``--reward.clip_range``.

    >>> rewards_GN = torch.tensor([[11.0, 12.0], [11.0, 12.0]])
    >>> estimator = Estimator("reinforce", (-10.0, 10.0))
    >>> estimator.count_clipped(rewards_GN), estimator.tells_responses_apart(rewards_GN, rewards_GN > 0)
    (4, False)
    >>> estimator = Estimator("rloo", (-10.0, 10.0))
    >>> estimator.count_clipped(rewards_GN), estimator.tells_responses_apart(rewards_GN, rewards_GN > 0)
    (0, True)
    """

    name: str
    clip_range: tuple[float, float]

    @property
    def by_group(self) -> bool:
        """Whether the estimator compares the responses to one prompt, rather than the whole batch."""
        return self.name in BY_GROUP

    def for_fewer(self, rewards_GN: Tensor, present_GN: Tensor) -> Tensor:
        """Rewards for which the estimator of N responses gives those present what that of so many would.

        ``rloo`` multiplies the distance from the mean by N / (N − 1); k responses need k / (k − 1). Missing rewards are
        the mean of the others, which keeps the mean.

        >>> rewards_GN = torch.tensor([[0.0, 2.0, 1.0]])
        >>> Estimator("rloo", (-10.0, 10.0)).for_fewer(rewards_GN, torch.tensor([[True, True, False]]))
        tensor([[-0.3333,  2.3333,  1.0000]])
        """
        if self.name != "rloo":
            return rewards_GN
        size, present_G1 = rewards_GN.shape[1], present_GN.sum(1, keepdim=True)
        factor_G1 = present_G1 * (size - 1) / (size * (present_G1 - 1).clamp(min=1))
        mean_G1 = rewards_GN.mean(1, keepdim=True)
        fewer_G1 = (present_G1 > 1) & (present_G1 < size)
        return torch.where(fewer_G1, mean_G1 + factor_G1.to(rewards_GN) * (rewards_GN - mean_G1), rewards_GN)

    def excess_of_fewer(self, rewards_GN: Tensor, present_GN: Tensor) -> Tensor:
        """(G, N) what to subtract from the advantages of ``group_norm`` in groups in which rewards are missing.

        It divides by the standard deviation of N responses, of which k differ from the mean: by too little.

        >>> rewards_GN = torch.tensor([[0.0, 2.0, 1.0]])
        >>> Estimator("group_norm", (-10.0, 10.0)).excess_of_fewer(rewards_GN, torch.tensor([[True, True, False]]))
        tensor([[-0.2929,  0.2929,  0.0000]])
        """
        if self.name != "group_norm":
            return torch.zeros_like(rewards_GN)
        size, present_G1 = rewards_GN.shape[1], present_GN.sum(1, keepdim=True)
        std_G1 = rewards_GN.std(1, keepdim=True) + 1e-9  # as OpenRLHF computes them
        estimated_GN = (rewards_GN - rewards_GN.mean(1, keepdim=True)) / std_G1
        factor_G1 = ((present_G1 - 1).clamp(min=0) / (size - 1)).sqrt()
        return estimated_GN.clamp(*self.clip_range) - (factor_G1 * estimated_GN).clamp(*self.clip_range)

    def tells_responses_apart(self, rewards_GN: Tensor, present_GN: Tensor) -> bool:
        """Whether the clipped rewards differ among the responses that the estimator compares."""
        if self.name in WITHOUT_BASELINE:  # the others clip after subtracting a baseline, so a difference remains
            rewards_GN = rewards_GN.clamp(*self.clip_range)
        return tells_responses_apart(rewards_GN, present_GN, by_group=self.by_group)

    def count_clipped(self, rewards_GN: Tensor) -> int:
        """Count the rewards, minus the baseline, that OpenRLHF clips silently."""
        if self.name == "group_norm":
            return 0  # it divides by the standard deviation before it clips
        if self.by_group:
            rewards_GN = rewards_GN - rewards_GN.mean(1, keepdim=True)
        elif self.name not in WITHOUT_BASELINE:
            rewards_GN = rewards_GN - rewards_GN.mean()
        low, high = self.clip_range
        return int(((rewards_GN < low) | (rewards_GN > high)).sum())

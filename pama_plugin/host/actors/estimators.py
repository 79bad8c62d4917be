"""OpenRLHF's advantage estimators: which rewards they compare and which they clip."""

from typing import NamedTuple

from torch import Tensor

from pama_plugin.batch.combine import tells_responses_apart

# These subtract a statistic of the prompt's group of responses.
BY_GROUP = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")
# These subtract nothing before OpenRLHF clips to --reward.clip_range.
WITHOUT_BASELINE = ("gae", "reinforce")


class Estimator(NamedTuple):
    """The name of one of OpenRLHF's estimators, and ``--reward.clip_range``.

    >>> import torch
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

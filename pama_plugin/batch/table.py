"""``RewardTable``: the rewards of one rollout batch, and the reasons for missing rewards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardTable:
    """Rewards of K objectives × B responses, in the order of the responses in the micro-batches.

    Attributes:
        names: names of the objectives.
        values_KB: float64 rewards, NaN if missing.
        problems: (objective, response) → reason for the missing reward. Where a reward is missing without a reason, the
            objective does not apply to the response.
        order_B: position of each response in the rollout, where the responses to one prompt are consecutive.
        group_size: number of responses to each prompt.
        sizes: sizes of the micro-batches.

    >>> values_KB = torch.tensor([[1.0, 2.0, torch.nan, 4.0]])
    >>> table = RewardTable(("a",), values_KB, {("a", 2): "HTTP 502"}, torch.tensor([2, 3, 0, 1]), 2, (3, 1))
    >>> table.grouped(table.row("a"))
    tensor([[nan, 4.],
            [1., 2.]])
    >>> table.centred(torch.tensor([1.0, 2.0, 5.0, torch.nan]))
    tensor([-0.5000,  0.5000,  0.0000,     nan])
    >>> RewardTable(("a",), values_KB, {}, torch.arange(3), 3, (3,)).centred(torch.tensor([0.1, 0.1, 0.1]))
    tensor([0., 0., 0.])
    >>> table.groups_B
    tensor([1, 1, 0, 0])
    >>> table.share_of_uniform_groups([b"no", b"yes", b"yes", b"yes"])
    0.5
    >>> table.split(table.ungrouped(torch.tensor([[0, 1], [2, 3]])))
    (tensor([2, 3, 0]), tensor([1]))
    """

    names: tuple[str, ...]
    values_KB: Tensor
    problems: Mapping[tuple[str, int], str]
    order_B: Tensor
    group_size: int
    sizes: tuple[int, ...]

    def row(self, name: str) -> Tensor:
        """(B,) rewards of one objective."""
        return self.values_KB[self.names.index(name)]

    def applies_to(self, name: str) -> Tensor:
        """(B,) true where the objective ``name`` applies, whether it has a reward or has failed."""
        applies_B = ~self.row(name).isnan()
        applies_B[[response for response, _ in self.problems_of(name)]] = True
        return applies_B

    def problems_of(self, name: str) -> list[tuple[int, str]]:
        """The responses without a reward from the objective ``name``, in order, with the reasons."""
        return sorted((response, why) for (objective, response), why in self.problems.items() if objective == name)

    @property
    def groups_B(self) -> Tensor:
        """(B,) index of the prompt of each response."""
        return self.order_B // self.group_size

    def grouped(self, values_B: Tensor) -> Tensor:
        """(G, N): one row per prompt."""
        ordered_B = torch.empty_like(values_B)
        ordered_B[self.order_B] = values_B
        return ordered_B.reshape(-1, self.group_size)

    def ungrouped(self, values_GN: Tensor) -> Tensor:
        """(B,): inverse of ``grouped``, in the order of the micro-batches."""
        return values_GN.flatten()[self.order_B]

    def centred(self, values_B: Tensor) -> Tensor:
        """(B,): values minus their mean over the responses to the same prompt that have one."""
        values_GN = self.grouped(values_B)
        centred_GN = values_GN - values_GN.nanmean(1, keepdim=True)
        low_G = values_GN.nan_to_num(torch.inf).amin(1, keepdim=True)
        high_G = values_GN.nan_to_num(-torch.inf).amax(1, keepdim=True)
        constant_GN = (low_G == high_G) & values_GN.isfinite()
        return self.ungrouped(centred_GN.masked_fill(constant_GN, 0))  # instead of what rounding leaves

    def share_of_uniform_groups(self, responses: Sequence[bytes]) -> float:
        """The share of prompts whose responses are all the same; ``responses`` in the order of the micro-batches."""
        answers: dict[int, set[bytes]] = {}
        for group, response in zip(self.groups_B.tolist(), responses, strict=True):
            answers.setdefault(group, set()).add(response)
        return sum(len(different) == 1 for different in answers.values()) / len(answers)

    def split(self, values_B: Tensor) -> tuple[Tensor, ...]:
        """One tensor per micro-batch."""
        return torch.split(values_B, list(self.sizes))

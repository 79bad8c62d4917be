"""The rewards of one rollout batch, or why there is none: what every later step reads."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardTable:
    """K objectives × B responses, in the order in which the responses stand in the micro-batches.

    Attributes:
        names: of the objectives.
        values_KB: float64 rewards, NaN where there is none.
        problems: why there is none, by objective and response.
        order_B: where each response stands among those of the rollout, in which a prompt's own are side by side.
        group_size: responses to each prompt.
        sizes: of the micro-batches.

    >>> values_KB = torch.tensor([[1.0, 2.0, torch.nan, 4.0]])
    >>> table = RewardTable(("a",), values_KB, {("a", 2): "HTTP 502"}, torch.tensor([2, 3, 0, 1]), 2, (3, 1))
    >>> table.grouped(table.row("a"))
    tensor([[nan, 4.],
            [1., 2.]])
    >>> table.groups_B
    tensor([1, 1, 0, 0])
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
        """(B,) the rewards of one objective."""
        return self.values_KB[self.names.index(name)]

    def problems_of(self, name: str) -> list[tuple[int, str]]:
        """The responses without a reward of the objective, in order, and why."""
        return sorted((response, why) for (own, response), why in self.problems.items() if own == name)

    @property
    def groups_B(self) -> Tensor:
        """(B,) the prompt of each response, as a number."""
        return self.order_B // self.group_size

    def grouped(self, values_B: Tensor) -> Tensor:
        """(G, N): by prompt, each prompt's responses side by side."""
        ordered_B = torch.empty_like(values_B)
        ordered_B[self.order_B] = values_B
        return ordered_B.reshape(-1, self.group_size)

    def ungrouped(self, values_GN: Tensor) -> Tensor:
        """(B,): back in the order of the micro-batches."""
        return values_GN.flatten()[self.order_B]

    def split(self, values_B: Tensor) -> tuple[Tensor, ...]:
        """One part for each micro-batch."""
        return torch.split(values_B, list(self.sizes))

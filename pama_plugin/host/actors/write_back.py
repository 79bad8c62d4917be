"""Writes K runs of the estimator and the combined advantages to the tensors that OpenRLHF trains on and logs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from pama_plugin.batch.metrics import explained_variance
from pama_plugin.host.actors.critic import flatten_objectives
from pama_plugin.host.protocols import Experience


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Join micro-batches (B_i, A_i) → (ΣB_i, max A_i), padded on the right with 0."""
    length = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([pad(tensor, (0, length - tensor.shape[1])) for tensor in tensors])


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """Sum in order, starting from the first tensor: a single tensor of weight 1 stays the same, bit for bit.

    A weight is a number, or has one for each row of the tensors.
    """
    total, *rest = (
        tensor * (weight.reshape(-1, *[1] * (tensor.dim() - 1)) if isinstance(weight, Tensor) else weight)
        for tensor, weight in zip(tensors, weights, strict=True)
    )
    for term in rest:
        total = total + term
    return total


def of_rows(weights_KB: Tensor, rows_b: Tensor) -> list[float | Tensor]:
    """The weight of each objective for some responses: one number if all have the same, else (b,) numbers.

    >>> of_rows(torch.tensor([[0.5]]), torch.tensor([1])), of_rows(torch.tensor([[0.5, 1.0]]), torch.tensor([1]))
    ([0.5], [tensor([1.])])
    """
    if weights_KB.shape[1] == 1:
        return list(weights_KB[:, 0].tolist())
    return list(weights_KB[:, rows_b].float())


def write_back(
    experiences: Sequence[Experience],
    runs: Sequence[Sequence[Experience]],
    shown: Sequence[Sequence[Experience]],
    weights_KB: Tensor,
    advantages: Sequence[Tensor],
    metrics: dict[str, float],
) -> list[Experience]:
    """Give the actor one advantage per token, the critic K columns of values and returns, and the logs the metrics.

    Args:
        experiences: as OpenRLHF made them, one per micro-batch.
        runs: the estimator's output for each objective; the copies of the first run are changed and returned.
        shown: the runs whose rewards and returns OpenRLHF shows as its own, summed with their weights.
        weights_KB: those of ``shown``, (K, 1) or (K, B).
        advantages: the combined advantages, (b, A) or longer for each micro-batch.
        metrics: metrics of the whole rollout batch.
    """
    sizes = [len(experience.sequences) for experience in experiences]
    rows = torch.split(torch.arange(sum(sizes)), sizes)
    for stock, advantages_BA, rows_b, copies, parts in zip(
        experiences, advantages, rows, zip(*runs), zip(*shown), strict=True
    ):
        combined, weights = copies[0], of_rows(weights_KB, rows_b)
        if combined.values is not None:
            combined.values, combined.returns = (
                flatten_objectives(torch.stack([getattr(experience, field) for experience in copies], -1))
                for field in ("values", "returns")
            )
        valid_BA = combined.action_mask.bool()
        advantages_BA = advantages_BA[:, : valid_BA.shape[1]]
        combined.advantages = torch.where(valid_BA, advantages_BA, combined.advantages)  # padding stays OpenRLHF's
        combined.rewards = weighted_sum([experience.rewards for experience in parts], weights)
        for key in [key for key, value in combined.info.items() if value is not stock.info.get(key)]:
            combined.info[key] = weighted_sum([experience.info[key] for experience in parts], weights)
        if len(parts) > 1:  # a sum of standard deviations is not a standard deviation
            combined.info.pop("group_reward_std", None)
        # As columns of ``info``, because OpenRLHF carries nothing else; the trainer removes them.
        combined.info |= {key: torch.full((len(valid_BA),), value) for key, value in metrics.items()}
    return list(runs[0])


def explain_variance(run: Sequence[Experience], present: Sequence[Tensor]) -> float:
    """``explained_variance`` of the values, at valid tokens of responses with a reward (``present``: (b,) each)."""
    masks = [
        experience.action_mask.bool() & present_b.unsqueeze(-1)
        for experience, present_b in zip(run, present, strict=True)
    ]
    returns_N = torch.cat([experience.returns[mask] for experience, mask in zip(run, masks)])
    return explained_variance(returns_N, torch.cat([experience.values[mask] for experience, mask in zip(run, masks)]))

"""From the rewards of a batch to those that the estimator is given: failures, statistics, normalising, clipping."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pama_plugin.batch.state import Moments, RunState
from pama_plugin.batch.table import RewardTable
from pama_plugin.errors import RewardError
from pama_plugin.rewards.options import LARGEST
from pama_plugin.settings.objective import Objective

# A standard deviation below this share of the largest reward is that of a constant, up to rounding.
CONSTANT = 1e-6


def apply_failure_policy(objectives: Sequence[Objective], table: RewardTable, text: Callable[[int], str]) -> None:
    """End the run where an objective has no reward for a response that must have one, or for too many.

    Args:
        objectives: all of the table.
        table: the rewards, and why some are missing.
        text: of a response, for the error.

    Raises:
        RewardError: with the objective, what happened, and a response that it happened to.
    """
    responses = table.values_KB.shape[1]
    for objective in objectives:
        failures = table.problems_of(objective.name)
        if not failures:
            continue
        response, problem = failures[0]
        if objective.on_failure.action == "fail":
            raise RewardError(objective.name, problem, text(response))
        if len(failures) > objective.max_failures * responses:
            most, count = Counter(why for _, why in failures).most_common(1)[0]
            many = f"{len(failures)} of {responses} responses have no reward, more than max_failures"
            response = next(response for response, why in failures if why == most)
            problem = f"{many}={objective.max_failures}; {count} of them: {most}"
            raise RewardError(objective.name, problem, text(response))


def shape_trained(
    objectives: Sequence[Objective], table: RewardTable, state: RunState, *, by_group: bool
) -> tuple[Tensor, Tensor]:
    """The rewards that the estimator is given, and which of them count.

    Args:
        objectives: the K that are combined.
        table: rewards of these, and of others.
        state: their running statistics.
        by_group: whether the estimator compares the responses to one prompt, or all of the batch.

    Returns:
        (K, B) float32, finite; (K, B) bool, false where an objective has no reward, neither computed nor imputed.
    """
    moments = [state.objectives[objective.name].rewards for objective in objectives]
    filled_KB = torch.stack([fill_in(*each, table) for each in zip(objectives, moments)])
    shaped = [
        table.ungrouped(shape_rewards(objective, table.grouped(filled_B.float()), moment, fill_by_group=by_group))
        for objective, filled_B, moment in zip(objectives, filled_KB, moments)
    ]
    return torch.stack(shaped), filled_KB.isfinite()


def measure(objectives: Sequence[Objective], table: RewardTable, state: RunState) -> None:
    """Take the measured rewards into the running statistics; frozen after so many steps, once anything has varied."""
    for objective in objectives:
        own = state.objectives[objective.name]
        if objective.freeze_after is not None and own.steps >= objective.freeze_after and own.rewards.std > 0:
            continue
        rewards_B = table.row(objective.name)
        own.rewards.update(rewards_B[rewards_B.isfinite()])
        own.steps += 1


def fill_in(objective: Objective, moments: Moments, table: RewardTable) -> Tensor:
    """(B,): what was measured or is imputed; NaN where the objective is left out of the combination."""
    rewards_B = table.row(objective.name)
    if objective.on_failure.action == "impute":
        value = objective.on_failure.value
        if value is None and moments.count:
            value = moments.mean
        if value is not None:
            return rewards_B.nan_to_num(value)
    return rewards_B


def shape_rewards(objective: Objective, rewards_GN: Tensor, seen: Moments, *, fill_by_group: bool) -> Tensor:
    """``(r − mean) / std`` by ``objective.normalize``, then ``objective.clip``, then something for the missing ones.

    A response without a reward is left out of the aggregation, but the host's estimator compares all responses with
    each other. So a missing reward becomes the mean of those that it is compared with: means stay what they are. With k
    of n rewards in a group, ``rloo`` gives advantages times ``n (k − 1) / (k (n − 1))`` and ``group_norm`` times
    ``√((n − 1) / (k − 1))`` of what the k alone would get.

    Args:
        objective: says how.
        rewards_GN: raw rewards of G prompts with N responses each, NaN where there is none. Not modified.
        seen: of all rewards so far, for ``normalize=running``.
        fill_by_group: whether the estimator compares the responses to one prompt, or all of the batch.

    Returns:
        (G, N), finite; bit for bit what was given where nothing is asked for. What is normalised is computed in double
        precision and no larger than a reward may be.

    >>> from pama_plugin.settings.objective import parse_objective
    >>> rewards_GN = torch.tensor([[1.0, 3.0], [5.0, torch.nan]])
    >>> shape_rewards(parse_objective("a=builtin:length"), rewards_GN, Moments(), fill_by_group=True)
    tensor([[1., 3.],
            [5., 5.]])
    >>> shape_rewards(parse_objective("a=builtin:length,normalize=batch"), rewards_GN, Moments(), fill_by_group=False)
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    """
    shaped_GN = rewards_GN
    exact_GN = rewards_GN.double()  # squares of the largest rewards, and quotients by small deviations, are too large
    if objective.normalize == "running":
        # While nothing has varied there is no unit to divide by.
        shaped_GN = (exact_GN - seen.mean) / (seen.std if seen.std > CONSTANT * abs(seen.mean) else 1.0)
    elif objective.normalize == "batch":
        present = exact_GN[exact_GN.isfinite()]
        shaped_GN = _standardize(exact_GN, present.mean(), present.std(), exact_GN.abs().nan_to_num(0.0).max())
    elif objective.normalize == "group":
        mean_G1 = exact_GN.nanmean(1, keepdim=True)
        count_G1 = exact_GN.isfinite().sum(1, keepdim=True)
        std_G1 = ((exact_GN - mean_G1).square().nansum(1, keepdim=True) / (count_G1 - 1)).sqrt()
        largest_G1 = exact_GN.abs().nan_to_num(0.0).amax(1, keepdim=True)
        shaped_GN = _standardize(exact_GN, mean_G1, std_G1, largest_G1)
    if objective.normalize != "none":
        shaped_GN = shaped_GN.clamp(-LARGEST, LARGEST).to(rewards_GN.dtype)
    if objective.clip is not None:
        shaped_GN = shaped_GN.clamp(*objective.clip)

    missing_GN = shaped_GN.isnan()
    if not missing_GN.any():
        return shaped_GN
    means = shaped_GN.nanmean().expand(len(shaped_GN), 1)
    if fill_by_group:
        means = torch.where(shaped_GN.isnan().all(1, keepdim=True), means, shaped_GN.nanmean(1, keepdim=True))
    return torch.where(missing_GN, means.nan_to_num(0.0), shaped_GN)  # 0 if the whole batch has none: all are left out


def _standardize(rewards_GN: Tensor, mean: Tensor, std: Tensor, largest: Tensor) -> Tensor:
    """0 where the rewards do not vary: what is left there is rounding, or a single reward."""
    varies = std > CONSTANT * largest  # false of NaN, too
    return torch.where(varies, (rewards_GN - mean) / torch.where(varies, std, 1.0), (rewards_GN - mean) * 0.0)

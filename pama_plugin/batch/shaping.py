"""From the rewards of a batch to the inputs of the estimator: failures, statistics, normalisation, clipping."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pama_plugin.batch.state import Moments, RunState
from pama_plugin.batch.table import RewardTable
from pama_plugin.errors import RewardError
from pama_plugin.rewards.options import LARGEST
from pama_plugin.settings.objective import Objective

# Rewards with a standard deviation below this share of the largest reward are constant up to rounding.
CONSTANT = 1e-6


def apply_failure_policy(objectives: Sequence[Objective], table: RewardTable, text: Callable[[int], str]) -> None:
    """End the run if a reward is missing with ``on_failure=fail``, or if more than ``max_failures`` are missing.

    Args:
        objectives: all objectives of the table.
        table: the rewards, and the reasons for missing ones.
        text: returns the text of a response, for the error.

    Raises:
        RewardError: names the objective, the reason and one of the responses.
    """
    for objective in objectives:
        failures = table.problems_of(objective.name)
        if not failures:
            continue
        response, problem = failures[0]
        if objective.on_failure.action == "fail":
            raise RewardError(objective.name, problem, text(response))
        responses = int(table.applies_to(objective.name).sum())
        if len(failures) > objective.max_failures * responses:
            most, count = Counter(why for _, why in failures).most_common(1)[0]
            many = f"{len(failures)} of {responses} responses have no reward, more than max_failures"
            response = next(response for response, why in failures if why == most)
            problem = f"{many}={objective.max_failures}; {count} of them: {most}"
            raise RewardError(objective.name, problem, text(response))


def shape_trained(
    objectives: Sequence[Objective], table: RewardTable, state: RunState, *, by_group: bool
) -> tuple[Tensor, Tensor]:
    """The rewards for the estimator, and which of them are present.

    Args:
        objectives: the K trained objectives.
        table: the rewards of all objectives.
        state: running statistics of the objectives.
        by_group: whether the estimator compares the responses to one prompt, or those of the whole batch.

    Returns:
        (K, B) float32, finite; (K, B) bool, false where a reward was neither computed nor imputed, or does not apply.
    """
    moments = [state.objectives[objective.name].rewards for objective in objectives]
    filled_KB = torch.stack([fill_in(*each, table) for each in zip(objectives, moments)])
    shaped = [
        table.ungrouped(shape_rewards(objective, table.grouped(filled_B.float()), moment, fill_by_group=by_group))
        for objective, filled_B, moment in zip(objectives, filled_KB, moments)
    ]
    return torch.stack(shaped), filled_KB.isfinite()


def measure(objectives: Sequence[Objective], table: RewardTable, state: RunState) -> None:
    """Update the running statistics, unless they are frozen: after ``freeze_after`` steps, if rewards have varied."""
    for objective in objectives:
        statistics = state.objectives[objective.name]
        moments = statistics.rewards
        if objective.freeze_after is not None and statistics.steps >= objective.freeze_after and moments.std > 0:
            continue
        rewards_B = table.row(objective.name)
        rewards = rewards_B[rewards_B.isfinite()]
        moments.update(rewards)
        statistics.steps += bool(len(rewards))


def spreads(objectives: Sequence[Objective], table: RewardTable, state: RunState) -> dict[str, float]:
    """Objective → standard deviation of its rewards over the batch, divided by that of the first batch.

    The first standard deviation other than 0 is stored in ``state``; before it an objective has no spread.
    """
    found = {}
    for objective in objectives:
        rewards_B = table.row(objective.name)
        std = float(rewards_B[rewards_B.isfinite()].std()) if rewards_B.isfinite().sum() > 1 else math.nan
        statistics = state.objectives[objective.name]
        if statistics.first_std is None and std > 0:
            statistics.first_std = std
        if statistics.first_std is not None and not math.isnan(std):
            found[objective.name] = std / statistics.first_std
    return found


def varies_enough(objective: Objective, rewards_GN: Tensor, state: RunState, *, share: float, by_group: bool) -> bool:
    """Whether the rewards of a step spread over at least ``share`` of what they do in a step on average.

    An estimator that whitens gives an objective full advantages however little its rewards spread, and these are noise
    if all responses are nearly the same to it.

    Args:
        objective: an objective of ``state``, whose average is updated.
        rewards_GN: rewards of G prompts with N responses each, NaN if missing.
        share: of the mean, over the steps so far and this one, of the standard deviation of a step.
        by_group: whether the estimator compares the responses to one prompt, or those of the whole batch.
    """
    exact_GN = rewards_GN.double()
    if by_group:
        exact_GN = exact_GN - exact_GN.nanmean(1, keepdim=True)
    present = exact_GN[exact_GN.isfinite()]
    if len(present) < 2:
        return True
    usual, std = state.objectives[objective.name].spread, present.std()
    usual.update(std.reshape(1))
    return bool(std >= share * usual.mean)


def fill_in(objective: Objective, moments: Moments, table: RewardTable) -> Tensor:
    """(B,) rewards, with missing ones imputed, or NaN where the objective is excluded from the combination."""
    rewards_B = table.row(objective.name)
    if objective.on_failure.action == "impute":
        value = objective.on_failure.value
        if value is None and moments.count:
            value = moments.mean
        if value is not None:
            return torch.where(table.applies_to(objective.name), rewards_B.nan_to_num(value), rewards_B)
    return rewards_B


def shape_rewards(objective: Objective, rewards_GN: Tensor, running: Moments, *, fill_by_group: bool) -> Tensor:
    """Normalise to ``(r − mean) / std`` by ``objective.normalize``, apply ``objective.clip``, fill missing rewards.

    A response without a reward is excluded from the combination, but OpenRLHF's estimator compares all responses. So a
    missing reward is filled with the mean of the rewards with which it is compared, which keeps that mean.

    Args:
        objective: has ``normalize`` and ``clip``.
        rewards_GN: raw rewards of G prompts with N responses each, NaN if missing. Not modified.
        running: moments of all rewards so far, for ``normalize=running``.
        fill_by_group: whether the estimator compares the responses to one prompt, or those of the whole batch.

    Returns:
        (G, N), finite; equal to the input bit for bit without ``normalize``, ``clip`` and missing rewards. Normalised
        rewards are computed in double precision and limited to the largest valid reward.

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
    exact_GN = rewards_GN.double()  # large rewards overflow float32 when squared or divided by a small std
    if objective.normalize == "running":
        # Do not divide as long as all rewards were equal.
        shaped_GN = (exact_GN - running.mean) / (running.std if running.std > CONSTANT * abs(running.mean) else 1.0)
    elif objective.normalize == "batch":
        present = exact_GN[exact_GN.isfinite()]
        std = present.std() if len(present) > 1 else present.new_tensor(math.nan)  # torch would warn
        shaped_GN = _standardize(exact_GN, present.mean(), std, exact_GN.abs().nan_to_num(0.0).max())
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

    return fill_with_means(shaped_GN, by_group=fill_by_group)


def fill_with_means(rewards_GN: Tensor, *, by_group: bool) -> Tensor:
    """(G, N) with missing rewards (NaN) replaced by the mean of those of the group, or of the batch; 0 if it has none.

    >>> fill_with_means(torch.tensor([[1.0, 3.0], [5.0, torch.nan]]), by_group=False)
    tensor([[1., 3.],
            [5., 3.]])
    """
    missing_GN = rewards_GN.isnan()
    if not missing_GN.any():
        return rewards_GN
    means = rewards_GN.nanmean().expand(len(rewards_GN), 1)
    if by_group:
        means = torch.where(missing_GN.all(1, keepdim=True), means, rewards_GN.nanmean(1, keepdim=True))
    return torch.where(missing_GN, means.nan_to_num(0.0), rewards_GN)


def _standardize(rewards_GN: Tensor, mean: Tensor, std: Tensor, largest: Tensor) -> Tensor:
    """``(rewards − mean) / std``, or 0 for constant rewards and for a single reward."""
    varies = std > CONSTANT * largest  # false if std is NaN
    return torch.where(varies, (rewards_GN - mean) / torch.where(varies, std, 1.0), (rewards_GN - mean) * 0.0)

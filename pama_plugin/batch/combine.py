"""Combine K rewards per response, or K advantages per token, into one. The only module of a run that calls a rule."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pama_plugin.aggregation import Aggregation, describe
from pama_plugin.batch.state import RunState
from pama_plugin.batch.table import RewardTable
from pama_plugin.settings.run import PamaConfig


def combine(
    config: PamaConfig,
    state: RunState,
    table: RewardTable,
    values_KBA: Tensor,
    mask_BA: Tensor,
    present_KB: Tensor,
    steps_done: int,
    active: list[bool] | None = None,
    log_ratio_BA: Tensor | None = None,
    rewards_KB: Tensor | None = None,
    preferences: Sequence[Sequence[float]] = (),
) -> Aggregation:
    """Apply the rule to the values, with all context that rules use, and store the rule's memory in ``state``.

    Args:
        config: the rule and its options.
        state: contains the memory of the rule. Modified.
        table: the rewards, for the violations of constraints, and the prompt of each response.
        values_KBA: advantages of the trained objectives, or their rewards (K, B, 1) for a rule that combines rewards.
        mask_BA: true at valid tokens.
        present_KB: true where an objective has a reward for a response.
        steps_done: number of steps done, for the weights.
        active: for each objective, whether its rewards differ between responses, if known.
        log_ratio_BA: log π − log π_ref at every token, for the rules that need it.
        rewards_KB: the rewards that the estimator received, for the rules that need them.
        preferences: of each response, if prompts have them.
    """
    result = config.combine(
        values_KBA,
        mask_BA,
        steps_done=steps_done,
        active=active,
        present_KB=present_KB,
        log_ratio_BA=log_ratio_BA,
        groups_B=table.groups_B,
        rewards_KB=None if rewards_KB is None else rewards_KB.masked_fill(~present_KB, math.nan),
        violations=_violations(config, state, table),
        memory=[state.objectives[name].memory for name in config.trained_names],
        preferences=preferences,
    )
    for name, memory in zip(config.trained_names, result.memory_K):
        state.objectives[name].memory = memory
    return result


def _violations(config: PamaConfig, state: RunState, table: RewardTable) -> list[float | None]:
    """Threshold minus mean reward of each constraint, in standard deviations of its rewards so far; None for others."""
    violations: list[float | None] = []
    for objective in config.trained:
        if objective.threshold is None:
            violations.append(None)
            continue
        mean = table.row(objective.name).float().nanmean().item()
        # Without any reward, a violation of 0 keeps the multiplier.
        std = state.objectives[objective.name].rewards.std
        violations.append(0.0 if math.isnan(mean) else (objective.threshold - mean) / (std if std > 0 else 1.0))
    return violations


def estimated(
    of_rewards: Aggregation, estimate_BA: Tensor, advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor
) -> Aggregation:
    """A combination of rewards, with its estimated advantages, and metrics computed from advantages."""
    active_K = active_flags(of_rewards)
    estimate_BA = estimate_BA.masked_fill(~(mask_BA & present_KB.any(0).unsqueeze(-1)), 0)
    metrics = describe(advantages_KBA, mask_BA, present_KB, active_K, estimate_BA)
    return Aggregation(estimate_BA, of_rewards.coefficients, of_rewards.metrics | metrics)


def active_flags(result: Aggregation) -> Tensor:
    """(K,) true for the objectives that were active."""
    flags = [result.metrics[f"inactive/{index}"] == 0 for index in range(len(result.coefficients))]
    return torch.tensor(flags, device=result.coefficients.device)


def tells_responses_apart(rewards_GN: Tensor, present_GN: Tensor, *, by_group: bool) -> bool:
    """Whether rewards differ among the responses that the estimator compares: in the batch, or in a group.

    If they do not differ, advantages are 0 up to rounding errors, which whitening would amplify.

    >>> import torch
    >>> rewards_GN = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    >>> [tells_responses_apart(rewards_GN, rewards_GN > 0, by_group=by_group) for by_group in (True, False)]
    [False, True]
    """
    low_GN, high_GN = rewards_GN.masked_fill(~present_GN, math.inf), rewards_GN.masked_fill(~present_GN, -math.inf)
    size = rewards_GN.shape[1] if by_group else rewards_GN.numel()
    return bool((low_GN.reshape(-1, size).amin(1) < high_GN.reshape(-1, size).amax(1)).any())

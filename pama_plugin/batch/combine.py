"""K rewards per response, or K advantages per token, into one: the only place of a run that calls a rule."""

import math

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
) -> Aggregation:
    """What the rule makes of the values, with everything that a rule may ask for; multipliers go into ``state``.

    Args:
        config: the rule and its options.
        state: holds the multipliers of constraints.
        table: the rewards, from which constraints are judged, and which responses are to one prompt.
        values_KBA: advantages of the trained objectives; of a rule of rewards these, as (K, B, 1).
        mask_BA: valid tokens.
        present_KB: which responses each has a reward for.
        steps_done: decides the weights.
        active: which objectives tell responses apart, if that is known.
    """
    result = config.combine(
        values_KBA,
        mask_BA,
        steps_done=steps_done,
        active=active,
        present_KB=present_KB,
        groups_B=table.groups_B,
        violations=_violations(config, table),
        multipliers=[state.objectives[name].multiplier for name in config.trained_names],
    )
    for index, name in enumerate(config.trained_names):
        state.objectives[name].multiplier = result.metrics.get(f"multiplier/{index}")
    return result


def _violations(config: PamaConfig, table: RewardTable) -> list[float | None]:
    """How far each constraint's mean reward is from its threshold; None of what is no constraint."""
    violations: list[float | None] = []
    for objective in config.trained:
        if objective.threshold is None:
            violations.append(None)
            continue
        mean = table.row(objective.name).float().nanmean().item()
        # With no reward at all there is nothing to learn from: the multiplier stays.
        violations.append(0.0 if math.isnan(mean) else objective.threshold - mean)
    return violations


def estimated(
    found: Aggregation, estimate_BA: Tensor, advantages_KBA: Tensor, mask_BA: Tensor, present_KB: Tensor
) -> Aggregation:
    """A combination of rewards, with what the estimator made of it; the metrics are of the advantages."""
    estimate_BA = estimate_BA.masked_fill(~(mask_BA & present_KB.any(0).unsqueeze(-1)), 0)
    metrics = describe(advantages_KBA, mask_BA, present_KB, estimate_BA)
    return Aggregation(estimate_BA, found.coefficients, found.metrics | metrics)


def tells_responses_apart(rewards_GN: Tensor, present_GN: Tensor, *, by_group: bool) -> bool:
    """Whether the rewards that the estimator sees differ where it compares them: in the batch, or a prompt's group.

    Where they do not, the advantages are 0 up to rounding, which whitening blows up to a signal.

    >>> import torch
    >>> rewards_GN = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    >>> [tells_responses_apart(rewards_GN, rewards_GN > 0, by_group=by_group) for by_group in (True, False)]
    [False, True]
    """
    low_GN, high_GN = rewards_GN.masked_fill(~present_GN, math.inf), rewards_GN.masked_fill(~present_GN, -math.inf)
    size = rewards_GN.shape[1] if by_group else rewards_GN.numel()
    return bool((low_GN.reshape(-1, size).amin(1) < high_GN.reshape(-1, size).amax(1)).any())

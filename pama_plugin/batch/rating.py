"""Metrics of an evaluation, and its rating, by which the best checkpoint is chosen."""

import math

import torch
from torch import Tensor

from pama_plugin.batch.keys import ALL, AT_PREFERENCE, FOLLOWED, OVER_ALL, label
from pama_plugin.batch.metrics import spearman
from pama_plugin.batch.state import RunState
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig

BEST = "eval_pama_best"


def summarise(
    rewards: dict[str, Tensor], applies: dict[str, Tensor], datasets: list[str], n_samples_per_prompt: int
) -> dict[str, float]:
    """Mean and standard error of every objective, for each dataset and for all datasets together.

    Responses to one prompt are correlated, so the standard error is computed from the means of the prompts. Responses
    without a reward (NaN) are ignored, and an objective has no metrics for a dataset to which it does not apply.

    Args:
        rewards: objective → (P·n,) rewards for P prompts with n responses each, grouped by prompt.
        applies: objective → (P·n,) true where it applies.
        datasets: the dataset of each of the P·n responses.
        n_samples_per_prompt: n.

    Returns:
        ``eval_<dataset>/<name>``, ``…_se`` and ``…_std``, the standard deviation over prompts. The dataset ``all``
        stands for all datasets.

    >>> rewards = torch.tensor([1.0, 3.0, 2.0, 6.0])
    >>> summarise({"length": rewards}, {"length": rewards > 0}, ["a"] * 4, 2)["eval_a/length_se"]
    1.0
    """
    names = datasets[::n_samples_per_prompt]
    metrics: dict[str, float] = {}
    for objective, rewards_PN in rewards.items():
        means_P = rewards_PN.double().reshape(-1, n_samples_per_prompt).nanmean(1)
        applies_P = applies[objective].reshape(-1, n_samples_per_prompt).any(1)
        for dataset in (*dict.fromkeys(names), ALL):
            chosen_P = torch.tensor([dataset in (ALL, name) for name in names])
            if not (applies_P & chosen_P).any():
                continue
            means = means_P[chosen_P]
            means = means[~means.isnan()]
            std = float(means.std()) if len(means) > 1 else math.nan
            error = std / math.sqrt(max(1, len(means)))
            key = f"eval_{dataset}/{objective}"
            metrics |= {key: float(means.mean()), f"{key}_se": error, f"{key}_std": std}
    return metrics


def summarise_front(config: PamaConfig, rewards: dict[str, Tensor], n_samples_per_prompt: int) -> dict[str, float]:
    """Every objective with every preference, and whether it follows its weight.

    Args:
        config: the evaluated preferences, L of them.
        rewards: objective → (P·L·n,) rewards for P prompts with L preferences and n responses each, in this order.
        n_samples_per_prompt: n.

    Returns:
        ``eval_preference/<weights>/<name>``, the mean over prompts, and ``…_se``, its standard error; and
        ``eval_follows/<name>``, Spearman's rank correlation between the weight of a trained objective and its mean.
    """
    preferences = config.evaluated_preferences
    metrics: dict[str, float] = {}
    for name, rewards_PLN in rewards.items():
        means_PL = rewards_PLN.double().reshape(-1, len(preferences), n_samples_per_prompt).nanmean(2)
        means_L = means_PL.nanmean(0)
        others_L = (~means_PL.isnan()).sum(0) - 1
        errors_L = ((means_PL - means_L).square().nanmean(0) / others_L).sqrt()  # NaN for a single prompt
        for preference, mean, error in zip(preferences, means_L.tolist(), errors_L.tolist()):
            key = f"{AT_PREFERENCE}{label(preference)}/{name}"
            metrics |= {key: mean, f"{key}_se": error}
        if name in config.trained_names:
            weights = [preference[config.trained_names.index(name)] for preference in preferences]
            metrics[f"{FOLLOWED}{name}"] = spearman(torch.tensor(weights), means_L)
    return {key: value for key, value in metrics.items() if not math.isnan(value)}


def rate(config: PamaConfig, state: RunState, metrics: dict[str, float]) -> float:
    """Rating of an evaluation by ``config.best``; larger is better.

    ``z_i`` is the rise of objective i since the first evaluation of the run, in standard deviations (over prompts) of
    that evaluation, which makes rewards of different scales comparable.

    - ``min``: ``min_i z_i / w_i`` with weights scaled to mean 1: the objective that rose least.
    - ``weighted``: ``Σ w_i m_i`` with the mean rewards m_i, the quantity that ``--loss linear`` maximises.
    - ``hypervolume``: ``Π max(0, 1 + z_i)``, the volume dominated above the reference point one standard deviation
      below the first evaluation; 1 at the first evaluation. With --pama.preferences, the volume that the means with all
      preferences dominate together; the first evaluation is then the mean over all preferences.

    Weights are the final ones of their schedules. ``state``, and so the checkpoint, stores the first evaluation of each
    objective. An objective that has never varied over the prompts has no unit, and no say in ``min``; ``min`` is 0 if
    none has varied. An objective that applies to no held-out prompt has no say at all. For a single prompt, ``min`` and
    ``hypervolume`` are NaN.
    """
    rises: list[tuple[float, float]] = []  # of each objective that has a unit, and its weight
    evaluated = [objective for objective in config.trained if f"{OVER_ALL}{objective.name}" in metrics]
    for objective in evaluated:
        mean, std = metrics[f"{OVER_ALL}{objective.name}"], metrics[f"{OVER_ALL}{objective.name}_std"]
        measured = state.objectives[objective.name]
        if measured.first_evaluation is None and std > 0:
            measured.first_evaluation = (mean, std)
        if measured.first_evaluation is not None:
            first, unit = measured.first_evaluation
            rises.append(((mean - first) / unit, objective.weight.end))
        elif std != 0:  # NaN: with a single prompt there never is a standard deviation
            rises.append((math.nan, objective.weight.end))
    if config.best == "weighted":
        return sum(objective.weight.end * metrics[f"{OVER_ALL}{objective.name}"] for objective in evaluated)
    if any(math.isnan(rise) for rise, _ in rises):
        return math.nan  # never better than another rating
    if config.preferences is not None:
        return _dominated_by_front(config, state, metrics, evaluated)
    if config.best == "hypervolume":
        return math.prod(max(0.0, 1 + rise) for rise, _ in rises)
    if not rises:
        return 0.0
    mean_weight = sum(weight for _, weight in rises) / len(rises)
    return min(rise * mean_weight / weight for rise, weight in rises)


def _dominated_by_front(
    config: PamaConfig, state: RunState, metrics: dict[str, float], evaluated: list[Objective]
) -> float:
    """The hypervolume of the means with all preferences, in the units of ``rate``."""
    import moocore  # not needed by other runs

    scales = {each.name: state.objectives[each.name].first_evaluation for each in evaluated}
    units = {name: first for name, first in scales.items() if first is not None}
    if not units:
        return 0.0
    front = []
    for preference in config.evaluated_preferences:
        found = [metrics.get(f"{AT_PREFERENCE}{label(preference)}/{name}", math.nan) for name in units]
        point = [(value - mean) / std for value, (mean, std) in zip(found, units.values())]
        front += [] if any(map(math.isnan, point)) else [point]  # with this one an objective has no reward
    return float(moocore.hypervolume(front, ref=[-1.0] * len(units), maximise=True)) if front else math.nan

"""Metrics of an evaluation, and its rating, by which the best checkpoint is chosen."""

import math

import torch
from torch import Tensor

from pama_plugin.batch.state import RunState
from pama_plugin.settings.run import PamaConfig

BEST = "eval_pama_best"
ALL = "all"  # name of the union of all datasets


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


def rate(config: PamaConfig, state: RunState, metrics: dict[str, float]) -> float:
    """Rating of an evaluation by ``config.best``; larger is better.

    ``z_i`` is the rise of objective i since the first evaluation of the run, in standard deviations (over prompts) of
    that evaluation, which makes rewards of different scales comparable.

    - ``min``: ``min_i z_i / w_i`` with weights scaled to mean 1: the objective that rose least.
    - ``weighted``: ``Σ w_i m_i`` with the mean rewards m_i, the quantity that ``--loss linear`` maximises.
    - ``hypervolume``: ``Π max(0, 1 + z_i)``, the volume dominated above the reference point one standard deviation
      below the first evaluation; 1 at the first evaluation.

    Weights are the final ones of their schedules. ``state``, and so the checkpoint, stores the first evaluation of each
    objective. An objective that has never varied over the prompts has no unit, and no say in ``min``; ``min`` is 0 if
    none has varied. An objective that applies to no held-out prompt has no say at all. For a single prompt, ``min`` and
    ``hypervolume`` are NaN.
    """
    rises: list[tuple[float, float]] = []  # of each objective that has a unit, and its weight
    evaluated = [objective for objective in config.trained if f"eval_{ALL}/{objective.name}" in metrics]
    for objective in evaluated:
        mean, std = metrics[f"eval_{ALL}/{objective.name}"], metrics[f"eval_{ALL}/{objective.name}_std"]
        measured = state.objectives[objective.name]
        if measured.first_evaluation is None and std > 0:
            measured.first_evaluation = (mean, std)
        if measured.first_evaluation is not None:
            first, unit = measured.first_evaluation
            rises.append(((mean - first) / unit, objective.weight.end))
        elif std != 0:  # NaN: with a single prompt there never is a standard deviation
            rises.append((math.nan, objective.weight.end))
    if config.best == "weighted":
        return sum(objective.weight.end * metrics[f"eval_{ALL}/{objective.name}"] for objective in evaluated)
    if any(math.isnan(rise) for rise, _ in rises):
        return math.nan  # never better than another rating
    if config.best == "hypervolume":
        return math.prod(max(0.0, 1 + rise) for rise, _ in rises)
    if not rises:
        return 0.0
    mean_weight = sum(weight for _, weight in rises) / len(rises)
    return min(rise * mean_weight / weight for rise, weight in rises)

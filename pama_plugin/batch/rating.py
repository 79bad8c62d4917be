"""Evaluations of every objective, and one number to choose a checkpoint by."""

import math

import torch
from torch import Tensor

from pama_plugin.batch.state import RunState
from pama_plugin.settings.run import PamaConfig

BEST = "eval_pama_best"
ALL = "all"  # stands for the datasets together


def summarise(rewards: dict[str, Tensor], datasets: list[str], n_samples_per_prompt: int) -> dict[str, float]:
    """Mean and standard error of every objective, by dataset and over all of them.

    Responses to one prompt are alike, so the standard error is that of the prompts' means. A response without a reward
    (NaN) does not count.

    Args:
        rewards: by objective, (P·n,) for P prompts with n responses each, those of one prompt side by side.
        datasets: the P·n names of where the prompts come from.
        n_samples_per_prompt: n.

    Returns:
        ``eval_<dataset>/<name>``, ``…_se`` and ``…_std``, the deviation over prompts; <dataset> ``all`` is all of them.

    >>> summarise({"length": torch.tensor([1.0, 3.0, 2.0, 6.0])}, ["a"] * 4, 2)["eval_a/length_se"]
    1.0
    """
    names = datasets[::n_samples_per_prompt]
    metrics: dict[str, float] = {}
    for objective, rewards_PN in rewards.items():
        means_P = rewards_PN.double().reshape(-1, n_samples_per_prompt).nanmean(1)
        for dataset in (*dict.fromkeys(names), ALL):
            own = means_P[torch.tensor([dataset in (ALL, name) for name in names])]
            own = own[~own.isnan()]
            std = float(own.std()) if len(own) > 1 else math.nan
            error = std / math.sqrt(max(1, len(own)))
            key = f"eval_{dataset}/{objective}"
            metrics |= {key: float(own.mean()), f"{key}_se": error, f"{key}_std": std}
    return metrics


def rate(config: PamaConfig, state: RunState, metrics: dict[str, float]) -> float:
    """How good an evaluation is, by ``config.best``; the larger the better.

    ``z_i`` is the rise of objective i since the run's first evaluation, in standard deviations (over prompts) of that
    evaluation: rewards of different scale can only be compared so.

    - ``min``: ``min_i z_i / w_i``, weights scaled to mean 1: the objective that rose least.
    - ``weighted``: ``Σ w_i m_i`` of the mean rewards as they are, the quantity that ``--loss linear`` climbs.
    - ``hypervolume``: ``Π max(0, 1 + z_i)``, the volume that the evaluation dominates over the reference point one
      standard deviation below the first one; 1 at the first evaluation.

    Weights are those at the end of their schedules. ``state`` keeps the first evaluation of each objective, and so does
    the checkpoint. Of a single prompt ``min`` and ``hypervolume`` are NaN.
    """
    rises = []
    for objective in config.trained:
        mean, std = metrics[f"eval_{ALL}/{objective.name}"], metrics[f"eval_{ALL}/{objective.name}_std"]
        own = state.objectives[objective.name]
        if own.first_evaluation is None and std > 0:
            own.first_evaluation = (mean, std)
        if own.first_evaluation is None:  # no unit yet to measure a rise in; of one prompt there never is
            rises.append(0.0 if std == 0 else math.nan)
        else:
            rises.append((mean - own.first_evaluation[0]) / own.first_evaluation[1])
    if config.best == "weighted":
        return sum(own.weight.end * metrics[f"eval_{ALL}/{own.name}"] for own in config.trained)
    if any(map(math.isnan, rises)):
        return math.nan  # which is no better than anything
    if config.best == "hypervolume":
        return math.prod(max(0.0, 1 + rise) for rise in rises)
    weights = [objective.weight.end for objective in config.trained]
    mean_weight = sum(weights) / len(weights)
    return min(rise * mean_weight / weight for rise, weight in zip(rises, weights))

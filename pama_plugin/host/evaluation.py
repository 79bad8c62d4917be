"""Evaluation per objective: every reward of every held-out response, and one number to choose a checkpoint by."""

import math
from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from torch import Tensor

from pama_plugin.config import PamaConfig
from pama_plugin.state import RunState

BEST = "eval_pama_best"
ALL = "all"  # stands for the datasets together


class ScoredSamplesGenerator(SamplesGenerator):
    """The host's generator, whose evaluation samples come with the rewards of all objectives, ``rm`` ones too."""

    def __init__(self, stock: SamplesGenerator, experience_maker: Any) -> None:
        super().__init__(
            stock.strategy, stock.prompts_dataloader, stock.eval_dataloader, stock.tokenizer, stock.vllm_engines
        )
        self.experience_maker = experience_maker
        self.metrics: dict[str, float] = {}
        self.batches = 0
        self.ended = False

    def generate_samples(self, **generate_kwargs: Any) -> Any:
        """As the host's, counting the rollout batches; once the run is to end, as if there were no prompts left."""
        if self.ended:
            return [], None, 0, True
        samples, *rest = super().generate_samples(**generate_kwargs)
        self.batches += bool(samples)
        if self.args.train.full_determinism_enable:  # the host has them in the order in which vLLM was done with them
            samples.sort(key=lambda sample: sample.prompts[0])
        return samples, *rest

    @torch.no_grad()
    def generate_eval_samples(self, **generate_kwargs: Any) -> list[Experience]:
        """As the host's; the one reward per sample, which its metrics show, sums ours, times their last weights."""
        samples: list[Experience] = super().generate_eval_samples(**generate_kwargs)
        rewards = self.experience_maker.score(samples)
        config = self.experience_maker.config
        weighted = torch.stack([rewards[objective.name] * objective.weight.end for objective in config.trained])
        totals = weighted.sum(0)  # NaN where one of them is missing
        for sample, total in zip(samples, totals):
            sample.rewards = total.reshape(1)
        datasets = {
            prompt: dataset for names, prompts, *_ in self.eval_dataloader for prompt, dataset in zip(prompts, names)
        }
        self.metrics = summarise(
            rewards,
            [datasets.get(sample.prompts[0], "unknown") for sample in samples],  # as the host's own metrics name it
            generate_kwargs["n_samples_per_prompt"],
        )
        return samples

    def pop_metrics(self) -> dict[str, float]:
        """Those of the last evaluation."""
        metrics, self.metrics = self.metrics, {}
        return metrics


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
    metrics = {}
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

"""Evaluation per objective: all rewards of every held-out response."""

from typing import Any

import torch
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

from pama_plugin.batch.rating import summarise
from pama_plugin.host.actors.collector import RewardCollector
from pama_plugin.host.actors.prompts import columns_of
from pama_plugin.host.protocols import Experience
from pama_plugin.settings.names import DATASOURCE

FEW_PROMPTS = 0.1  # share of prompts left by dynamic filtering, below which a warning says so


class ScoredSamplesGenerator(SamplesGenerator):
    """OpenRLHF's generator; its evaluation samples carry the rewards of all objectives, including ``rm``."""

    def __init__(self, stock: SamplesGenerator, collector: RewardCollector) -> None:
        super().__init__(
            stock.strategy, stock.prompts_dataloader, stock.eval_dataloader, stock.tokenizer, stock.vllm_engines
        )
        self.collector = collector
        self.metrics: dict[str, float] = {}
        self.batches = 0
        self.ended = False

    def generate_samples(self, **generate_kwargs: Any) -> Any:
        """Generate as OpenRLHF does and count the batches; once ``ended`` is set, report that no prompts are left."""
        if self.ended:
            return [], None, 0, True
        samples, pass_rate, prompts, exhausted = super().generate_samples(**generate_kwargs)
        self.batches += bool(samples)
        if pass_rate is not None:
            self._warn_of_filtering(pass_rate / 100 * prompts / self.args.rollout.n_samples_per_prompt, prompts)
        if self.args.train.full_determinism_enable:  # OpenRLHF returns them in the order in which vLLM finished
            samples.sort(key=lambda sample: sample.prompts[0])
        return samples, pass_rate, prompts, exhausted

    def _warn_of_filtering(self, kept: float, prompts: int) -> None:
        """OpenRLHF logs its rate only for batches that it trains on, as a multiple of the responses per prompt."""
        if kept < FEW_PROMPTS * prompts:
            low, high = self.args.algo.dynamic_filtering_range
            print(
                f"[Warning] PAMA: dynamic filtering kept {kept:.0f} of {prompts} prompts, those whose mean "
                f"{self.collector.config.filter_by} lies within --algo.dynamic_filtering_range {low:g} {high:g}",
                flush=True,
            )

    @torch.no_grad()
    def generate_eval_samples(self, **generate_kwargs: Any) -> list[Experience]:
        """Generate as OpenRLHF does; ``rewards``, for its metrics, is the sum of ours with their final weights."""
        samples: list[Experience] = super().generate_eval_samples(**generate_kwargs)
        table = self.collector.score(samples)
        rewards = {name: table.row(name).float() for name in table.names}
        trained = self.collector.config.trained
        applies = {name: table.applies_to(name) for name in table.names}
        applying = [applies[objective.name] for objective in trained]
        weighted = torch.stack([rewards[objective.name] * objective.weight.end for objective in trained])
        totals = weighted.masked_fill(~torch.stack(applying), 0).sum(0)  # NaN where a reward is missing
        for sample, total in zip(samples, totals):
            sample.rewards = total.reshape(1)
        datasets = {
            prompt: dataset for names, prompts, *_ in self.eval_dataloader for prompt, dataset in zip(prompts, names)
        }
        prompts = [sample.prompts[0] for sample in samples]
        if DATASOURCE in self.collector.config.columns:  # the same text may be in several data sets
            of_responses = [str(columns_of(prompt)[DATASOURCE]) for prompt in prompts]
        else:
            of_responses = [datasets.get(prompt, "unknown") for prompt in prompts]  # as in OpenRLHF's metrics
        self.metrics = summarise(rewards, applies, of_responses, generate_kwargs["n_samples_per_prompt"])
        return samples

    def pop_metrics(self) -> dict[str, float]:
        """Return the metrics of the last evaluation and forget them."""
        metrics, self.metrics = self.metrics, {}
        return metrics

"""Evaluation per objective: all rewards of every held-out response."""

from collections.abc import Sequence
from typing import Any

import torch
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

from pama_plugin.batch.rating import summarise, summarise_front
from pama_plugin.batch.rollouts import Row, choose_responses, describe_rewards
from pama_plugin.host.actors.collector import RewardCollector
from pama_plugin.host.actors.dataset import NumberedDraw, PromptsWithPreferences
from pama_plugin.host.actors.prompts import columns_of, plain, preference_of, whole
from pama_plugin.host.actors.rollout_log import add_texts
from pama_plugin.host.protocols import Experience
from pama_plugin.settings.names import DATASOURCE

FEW_PROMPTS = 0.1  # share of prompts left by dynamic filtering, below which a warning says so


class ScoredSamplesGenerator(SamplesGenerator):
    """OpenRLHF's generator; its evaluation samples carry the rewards of all objectives, including ``rm``.

    With --pama.preferences, prompts get theirs here: one drawn for each prompt of training, and the whole grid for each
    held-out prompt.
    """

    def __init__(self, stock: SamplesGenerator, collector: RewardCollector) -> None:
        config, prompts, held_out = collector.config, stock.prompts_dataloader, stock.eval_dataloader
        self.draw = NumberedDraw(config, stock.strategy.args.train.seed)
        if config.preferences is not None:
            grid = list(config.evaluated_preferences)
            prompts = PromptsWithPreferences(prompts, config.template, self.draw)
            held_out = held_out and PromptsWithPreferences(held_out, config.template, lambda _: grid)
        super().__init__(stock.strategy, prompts, held_out, stock.tokenizer, stock.vllm_engines)
        self.collector = collector
        self.metrics: dict[str, float] = {}
        self.rows: list[Row] = []
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
        config, size = self.collector.config, generate_kwargs["n_samples_per_prompt"]
        samples: list[Experience] = super().generate_eval_samples(**generate_kwargs)
        if config.preferences is not None:
            samples = in_order_of_preferences(samples, size, config.evaluated_preferences)
        table = self.collector.score(samples)
        rewards = {name: table.row(name).float() for name in table.names}
        trained = config.trained
        applies = {name: table.applies_to(name) for name in table.names}
        applying = [applies[objective.name] for objective in trained]
        preferences = [preference_of(sample.prompts[0]) for sample in samples] if config.preferences is not None else []
        weights = config.weights_with(preferences, None)
        weighted = torch.stack([rewards[objective.name] for objective in trained]) * weights.float()
        totals = weighted.masked_fill(~torch.stack(applying), 0).sum(0)  # NaN where a reward is missing
        for sample, total in zip(samples, totals):
            sample.rewards = total.reshape(1)
        datasets = {
            prompt: dataset for names, prompts, *_ in self.eval_dataloader for prompt, dataset in zip(prompts, names)
        }
        prompts = [sample.prompts[0] for sample in samples]
        if DATASOURCE in config.columns:  # the same text may be in several data sets
            of_responses = [str(columns_of(prompt)[DATASOURCE]) for prompt in prompts]
        elif config.preferences is not None:
            of_responses = [whole(prompt).source for prompt in prompts]
        else:
            of_responses = [datasets.get(prompt, "unknown") for prompt in prompts]  # as in OpenRLHF's metrics
        self.metrics = summarise(rewards, applies, of_responses, size * max(len(config.evaluated_preferences), 1))
        if config.preferences is not None:
            self.metrics |= summarise_front(config, rewards, size)
        chosen = choose_responses([plain(prompt) for prompt in prompts], range(len(samples)), config.log_rollouts)
        self.rows = describe_rewards(config, table, chosen, weights)
        add_texts(self.rows, chosen, samples, self.tokenizer)
        return samples

    def pop(self, step: int) -> tuple[dict[str, float], list[Row]]:
        """Return the metrics of the last evaluation, and its responses to be logged, and forget them."""
        metrics, rows = self.metrics, [row | {"step": step} for row in self.rows]
        self.metrics, self.rows = {}, []
        return metrics, rows


def in_order_of_preferences(
    samples: Sequence[Experience], size: int, preferences: Sequence[tuple[float, ...]]
) -> list[Experience]:
    """The samples, ``size`` of each prompt with each preference, by prompt and then in the order of ``preferences``.

    OpenRLHF returns prompts in the order in which vLLM finished.
    """
    places = {preference: place for place, preference in enumerate(preferences)}
    prompts = [whole(sample.prompts[0]) for sample in samples[::size]]
    order = sorted(range(len(prompts)), key=lambda group: (prompts[group].row, places[prompts[group].preference]))
    return [sample for group in order for sample in samples[group * size : (group + 1) * size]]

"""Collects all rewards of a rollout batch, from the rollout and from the reward models, in one table."""

import functools
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
import torch
from openrlhf.trainer.ppo_utils.experience import Experience as HostExperience
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pama_plugin.batch.keys import ABSTAINED, FAILURES, PROBLEM, REWARD, SECONDS
from pama_plugin.batch.outcome import ABSTAINED_CODE, NOT_ASKED_CODE, judge_column
from pama_plugin.batch.shaping import apply_failure_policy
from pama_plugin.batch.table import RewardTable
from pama_plugin.errors import RewardError
from pama_plugin.host.actors.pending import PendingRewards
from pama_plugin.host.actors.prompts import columns_of, plain
from pama_plugin.host.protocols import Experience, Strategy, Tokenizer
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig
from pama_plugin.settings.source import Source

logger = logging.getLogger(__name__)

SECONDS_FOR_REASONS = 60  # to wait for the engines' answers before the run ends


class Requested(NamedTuple):
    """Rewards that a model was asked for.

    Attributes:
        source: the objectives.
        applies_KB: true where an objective applies to a response; a response to which one applies is scored.
        pending: None if there is none.
        sizes: of the micro-batches in which the model scores.
    """

    source: Source
    applies_KB: Tensor
    pending: PendingRewards | None
    sizes: list[int]


class RewardCollector:
    """Requests rewards from the models and builds one table of all objectives' rewards.

    Args:
        strategy: OpenRLHF's strategy, whose ``args`` hold OpenRLHF's flags and our configuration.
        tokenizer: the policy's tokenizer.
        groups: name of an objective that a model scores → its ``RankGroup`` or ``ReplicaGroup``.
        vllm_engines: return the reasons of rewards that are missing from the rollout.
    """

    def __init__(
        self, strategy: Strategy, tokenizer: Tokenizer, groups: dict[str, Any], vllm_engines: Sequence[Any]
    ) -> None:
        self.strategy, self.args, self.tokenizer = strategy, strategy.args, tokenizer
        self.groups, self.vllm_engines = groups, vllm_engines
        self.config: PamaConfig = self.args.pama

    @functools.cached_property
    def conversations(self) -> Any:
        """Converts rollouts to text, for models that read text."""
        from pama_plugin.host.actors.conversations import Conversations  # other runs do not need its imports

        return Conversations(self.strategy, self.tokenizer)

    def request(self, samples_list: list[Experience], *, everything: bool = False) -> list[Requested]:
        """Request the rewards of all micro-batches from every model, without waiting for them.

        Args:
            samples_list: micro-batches.
            everything: whether to score responses to all prompts, whatever the objectives apply to.
        """
        # Models that share a GPU run one at a time and free the cache after each, as OpenRLHF's own models do.
        shared_with_critic = self.args.train.colocate_critic_reward and self.args.algo.advantage.estimator == "gae"
        one_by_one = self.args.train.colocate_all or shared_with_critic
        prompts = list(itertools.chain.from_iterable(samples.prompts for samples in samples_list))
        conversations = self.conversations.of(samples_list) if self.config.scored_in("replicas") else []
        readable = samples_list
        if self.config.preferences is not None and self.config.scored_in("ranks"):
            readable = [without_preferences(samples, self.tokenizer) for samples in samples_list]
        requests = []
        for source in self.config.sources("ranks", "replicas"):
            applies_KB = torch.ones(len(source.objectives), len(prompts), dtype=torch.bool)
            if not everything:
                applies_KB = torch.tensor(
                    [[_applies(each, prompt) for prompt in prompts] for each in source.objectives]
                )
            asked_B, in_text = applies_KB.any(0), source.objectives[0].reward_kind.scored_in == "replicas"
            inputs: list[Any] = conversations if in_text else readable
            if not asked_B.all():
                chosen = itertools.compress(conversations, asked_B.tolist())
                inputs = list(chosen) if in_text else _choose(readable, asked_B)
            sizes = [len(inputs)] if in_text else [len(samples.sequences) for samples in inputs]
            pending = self.groups[source.name].request(inputs, one_by_one=one_by_one) if inputs else None
            requests.append(Requested(source, applies_KB, pending, sizes))
        return requests

    def collect(self, requests: list[Requested], experiences: list[Experience]) -> RewardTable:
        """Wait for the models' rewards, build the table and apply each objective's failure policy.

        Writes columns of rewards, failures, abstentions and seconds to ``info`` for the logs; a missing reward is NaN.

        Raises:
            RewardError: an objective's failure policy ends the run.
        """
        reasons_of_models = self._receive(requests, experiences)
        sizes = [len(experience.sequences) for experience in experiences]
        rows: list[Tensor] = []
        problems: dict[tuple[str, int], str] = {}
        for objective in self.config.objectives:
            name = objective.name
            for first, experience in zip(itertools.accumulate(sizes, initial=0), experiences):
                if f"{REWARD}{name}" not in experience.info:  # not a failed reward: the rollout does not score
                    raise RewardError(name, "returned nothing", self._text(experiences, first))
            rewards_B = torch.cat([experience.info[f"{REWARD}{name}"] for experience in experiences])
            codes_B = torch.cat([experience.info.pop(f"{PROBLEM}{name}") for experience in experiences]).long()
            if name in reasons_of_models:
                asked_N = (codes_B >= 0).nonzero().flatten()
                of_column = judge_column(objective, rewards_B[asked_N])
                reasons = {int(asked_N[row]): reason for row, reason in of_column.items()} | reasons_of_models[name]
            else:
                reasons = self._explain(objective, rewards_B, codes_B)
            failed_B = torch.zeros(len(rewards_B), dtype=torch.bool)
            failed_B[list(reasons)] = True
            rewards_B = rewards_B.masked_fill(failed_B, math.nan)
            columns = {REWARD: rewards_B, FAILURES: failed_B.float()}
            if objective.abstain:
                columns[ABSTAINED] = (codes_B == ABSTAINED_CODE).float()
            self._write(columns, name, experiences)
            rows.append(rewards_B.double())
            problems |= {(name, response): reason for response, reason in reasons.items()}
        order = [experience.index for experience in experiences if experience.index is not None]
        # Samples outside training have no index: they keep the order of their prompts.
        order_B = torch.tensor(list(itertools.chain.from_iterable(order)) or range(len(rows[0])))
        group_size = self.args.rollout.n_samples_per_prompt
        table = RewardTable(self.config.names, torch.stack(rows), problems, order_B, group_size, tuple(sizes))
        apply_failure_policy(self.config.objectives, table, lambda response: self._text(experiences, response))
        return table

    def score(self, samples: list[Experience]) -> RewardTable:
        """Return the rewards of B single samples that are not trained on."""
        micro_batches = self._in_micro_batches(samples)
        return self.collect(self.request(micro_batches), micro_batches)

    def score_with_models(self, samples: list[Experience]) -> dict[str, Tensor]:
        """Return the models' rewards (B,) of B single samples, whatever they apply to, before any failure policy."""
        micro_batches = self._in_micro_batches(samples)
        self._receive(self.request(micro_batches, everything=True), micro_batches)
        return {
            objective.name: torch.cat([batch.info[f"{REWARD}{objective.name}"] for batch in micro_batches])
            for objective in self.config.scored_in("ranks", "replicas")
        }

    def _in_micro_batches(self, samples: list[Experience]) -> list[Experience]:
        size = self.args.rollout.micro_batch_size
        return [
            HostExperience.concat_experiences(samples[start : start + size], self.tokenizer.pad_token_id)
            for start in range(0, len(samples), size)
        ]

    def _write(self, columns: dict[str, Tensor], name: str, experiences: list[Experience]) -> None:
        """Write columns (B,) of an objective, by their prefixes, to ``info``."""
        sizes = [len(experience.sequences) for experience in experiences]
        for key, values_B in columns.items():
            for experience, values_b in zip(experiences, torch.split(values_B, sizes), strict=True):
                experience.info[f"{key}{name}"] = values_b

    def _receive(self, requests: list[Requested], experiences: list[Experience]) -> dict[str, dict[int, str]]:
        """Wait for the models' rewards and write the same columns as the rollout does for its rewards.

        Returns:
            Objective → response → reason, where a model knows why a reward is missing.
        """
        sizes = [len(experience.sequences) for experience in experiences]
        known: dict[str, dict[int, str]] = {}
        for source, applies_KB, pending, asked_sizes in requests:
            asked = applies_KB.any(0).nonzero().flatten()
            rewards_NK, seconds = torch.empty(0, len(source.objectives)), math.nan
            reasons: dict[int, str] = {}
            if pending is not None:
                rewards = torch.cat(self.groups[source.name].collect(pending, asked_sizes))
                rewards_NK, seconds = rewards.float().reshape(len(asked), -1), pending.seconds()
                reasons = {int(asked[row]): reason for row, reason in pending.reasons.items()}
            for response, reason in list(reasons.items())[:1]:
                names = ", ".join(repr(objective.name) for objective in source.objectives)
                logger.warning(
                    "PAMA: objective %s: %d of %d rewards are missing; the first: %s; response: %r",
                    *(names, len(reasons), len(asked), reason, self._text(experiences, response)[-200:]),
                )
            for objective, applies_B, rewards_N in zip(source.objectives, applies_KB, rewards_NK.T):
                name = objective.name
                rewards_B = torch.full((sum(sizes),), math.nan)
                rewards_B[asked] = rewards_N
                columns = {
                    REWARD: rewards_B.masked_fill(~applies_B, math.nan),
                    SECONDS: torch.full_like(rewards_B, seconds),
                    PROBLEM: torch.where(applies_B, 0, NOT_ASKED_CODE),
                }
                known[name] = {response: reason for response, reason in reasons.items() if applies_B[response]}
                self._write(columns, name, experiences)
        return known

    def _explain(self, objective: Objective, rewards_B: Tensor, codes_B: Tensor) -> dict[int, str]:
        """Map each response without a reward to the reason; the rollout sends its reasons as codes."""
        failed = (~rewards_B.isfinite() & (codes_B >= 0)).nonzero().flatten().tolist()
        codes = {response: int(codes_B[response]) for response in failed}
        reasons = {
            response: "no reward" if code else f"returned {float(rewards_B[response])}"
            for response, code in codes.items()
        }
        applying = int((codes_B >= 0).sum())
        if objective.on_failure.action != "fail" and len(failed) <= objective.max_failures * applying:
            return reasons  # the run continues without the texts: do not query engines that may be generating
        texts: dict[int, str] = {}
        replies = [engine.problems.remote(sorted({*codes.values()} - {0})) for engine in self.vllm_engines]
        try:
            for known in ray.get(replies, timeout=SECONDS_FOR_REASONS):
                texts |= known
        except ray.exceptions.RayError as error:  # an engine is dead or busy: the run ends anyway
            logger.warning("cannot ask the vLLM engines why rewards are missing: %s", error)
        return {response: texts.get(code, reasons[response]) for response, code in codes.items()}

    def _text(self, experiences: list[Experience], response: int) -> str:
        for experience in experiences:
            if response < len(experience.sequences):
                tokens = experience.sequences[response][experience.attention_mask[response].bool()]
                return self.tokenizer.decode(tokens)
            response -= len(experience.sequences)
        raise IndexError(response)


def _applies(objective: Objective, prompt: str) -> bool:
    return objective.when is None or objective.applies_to(columns_of(prompt))


def without_preferences(samples: Experience, tokenizer: Tokenizer) -> Experience:
    """The sequences with the prompts as they are without preferences, padded on the right."""
    rows = []
    for prompt, tokens_S, attention_S, action_A in zip(
        samples.prompts, samples.sequences, samples.attention_mask, samples.action_mask
    ):
        actions = action_A.nonzero()
        first = int(actions[0]) + 1 if len(actions) else len(tokens_S)  # the mask starts at the second token
        before, text = tokens_S[:first][attention_S[:first].bool()], plain(prompt)
        if before.tolist() != tokenizer(prompt, add_special_tokens=False)["input_ids"]:  # of an agent
            text = tokenizer.decode(before).replace(prompt, text, 1)
        plain_S = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=tokens_S.dtype)
        rows.append(torch.cat([plain_S, tokens_S[first:][attention_S[first:].bool()]]))
    sequences = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return HostExperience(sequences=sequences, attention_mask=attention_mask)


def _choose(samples_list: list[Experience], chosen_B: Tensor) -> list[Experience]:
    """The chosen responses of each micro-batch that has any, without columns of padding alone."""
    sizes = [len(samples.sequences) for samples in samples_list]
    chosen = []
    for samples, chosen_b in zip(samples_list, torch.split(chosen_B, sizes)):
        if chosen_b.any():
            attention = samples.attention_mask[chosen_b]
            used = attention.any(0)
            sequences = samples.sequences[chosen_b][:, used]
            chosen.append(HostExperience(sequences=sequences, attention_mask=attention[:, used]))
    return chosen

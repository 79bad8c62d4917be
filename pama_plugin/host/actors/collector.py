"""Collects all rewards of a rollout batch, from the rollout and from the reward models, in one table."""

import functools
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any

import ray
import torch
from openrlhf.trainer.ppo_utils.experience import Experience as HostExperience
from torch import Tensor

from pama_plugin.batch.keys import FAILURES, PROBLEM, REWARD, SECONDS
from pama_plugin.batch.outcome import judge_column
from pama_plugin.batch.shaping import apply_failure_policy
from pama_plugin.batch.table import RewardTable
from pama_plugin.errors import RewardError
from pama_plugin.host.actors.pending import PendingRewards
from pama_plugin.host.protocols import Experience, Strategy, Tokenizer
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig

logger = logging.getLogger(__name__)

SECONDS_FOR_REASONS = 60  # to wait for the engines' answers before the run ends


class RewardCollector:
    """Requests rewards from the models and builds one table of all objectives' rewards.

    Args:
        strategy: OpenRLHF's strategy, whose ``args`` hold OpenRLHF's flags and our configuration.
        tokenizer: the policy's tokenizer.
        groups: one ``RankGroup`` or ``ReplicaGroup`` per objective that a model scores.
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

    def request(self, samples_list: list[Experience]) -> dict[str, PendingRewards]:
        """Request the rewards of all micro-batches from every model, without waiting for them."""
        # Models that share a GPU run one at a time and free the cache after each, as OpenRLHF's own models do.
        shared_with_critic = self.args.train.colocate_critic_reward and self.args.algo.advantage.estimator == "gae"
        one_by_one = self.args.train.colocate_all or shared_with_critic
        pending = {
            objective.name: self.groups[objective.name].request(samples_list, one_by_one=one_by_one)
            for objective in self.config.scored_in("ranks")
        }
        if text_objectives := self.config.scored_in("replicas"):
            conversations = self.conversations.of(samples_list)
            for objective in text_objectives:
                group = self.groups[objective.name]
                pending[objective.name] = group.request(conversations, one_by_one=one_by_one)
        return pending

    def collect(self, pending: dict[str, PendingRewards], experiences: list[Experience]) -> RewardTable:
        """Wait for the models' rewards, build the table and apply each objective's failure policy.

        Writes columns of rewards, failures and seconds to ``info`` for the logs; a missing reward is NaN.

        Raises:
            RewardError: an objective's failure policy ends the run.
        """
        self._receive(pending, experiences)
        sizes = [len(experience.sequences) for experience in experiences]
        rows: list[Tensor] = []
        problems: dict[tuple[str, int], str] = {}
        for objective in self.config.objectives:
            name = objective.name
            for first, experience in zip(itertools.accumulate(sizes, initial=0), experiences):
                if f"{REWARD}{name}" not in experience.info:  # not a failed reward: the rollout does not score
                    raise RewardError(name, "returned nothing", self._text(experiences, first))
            rewards_B = torch.cat([experience.info[f"{REWARD}{name}"] for experience in experiences])
            reasons = self._explain(objective, rewards_B, experiences, pending.get(name))
            failed_B = torch.zeros(len(rewards_B), dtype=torch.bool)
            failed_B[list(reasons)] = True
            rewards_B = rewards_B.masked_fill(failed_B, math.nan)
            for experience, rewards_b, failed_b in zip(
                experiences, torch.split(rewards_B, sizes), torch.split(failed_B, sizes)
            ):
                experience.info[f"{REWARD}{name}"] = rewards_b
                experience.info[f"{FAILURES}{name}"] = failed_b.float()
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
        """Return the models' rewards (B,) of B single samples, before any failure policy."""
        micro_batches = self._in_micro_batches(samples)
        self._receive(self.request(micro_batches), micro_batches)
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

    def _receive(self, pending: dict[str, PendingRewards], experiences: list[Experience]) -> None:
        """Wait for the models' rewards and write the same columns as the rollout does for its rewards."""
        sizes = [len(experience.sequences) for experience in experiences]
        for name, requested in pending.items():
            rewards = self.groups[name].collect(requested, sizes)
            for response, reason in list(requested.reasons.items())[:1]:
                logger.warning(
                    "PAMA: objective %r: %d of %d rewards are missing; the first: %s; response: %r",
                    *(name, len(requested.reasons), sum(sizes), reason, self._text(experiences, response)[-200:]),
                )
            seconds = requested.seconds()
            for experience, rewards_b in zip(experiences, rewards, strict=True):
                experience.info[f"{REWARD}{name}"] = rewards_b.float()
                experience.info[f"{SECONDS}{name}"] = torch.full((len(rewards_b),), seconds)

    def _explain(
        self, objective: Objective, rewards_B: Tensor, experiences: list[Experience], requested: PendingRewards | None
    ) -> dict[int, str]:
        """Map each response without a reward to the reason; the rollout sends its reasons as codes."""
        if requested is not None:
            return judge_column(objective, rewards_B) | requested.reasons
        codes_B = torch.cat([experience.info.pop(f"{PROBLEM}{objective.name}") for experience in experiences]).long()
        failed = (~rewards_B.isfinite()).nonzero().flatten().tolist()
        codes = {response: int(codes_B[response]) for response in failed}
        reasons = {
            response: "no reward" if code else f"returned {float(rewards_B[response])}"
            for response, code in codes.items()
        }
        if objective.on_failure.action != "fail" and len(failed) <= objective.max_failures * len(rewards_B):
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

"""K rewards per response in, one advantage per token out: the host's experience maker, run once per objective."""

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import ray
import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.utils.logging_utils import init_logger
from torch import Tensor
from torch.nn.functional import pad

from pama_plugin.aggregation import Aggregation, get_rule
from pama_plugin.batch.combine import combine, estimated, tells_responses_apart
from pama_plugin.batch.metrics import (
    EXPLAINED,
    FAILURES,
    PAMA,
    PROBLEM,
    REWARD,
    SECONDS,
    explained_variance,
    name_metrics,
)
from pama_plugin.batch.outcome import judge_column
from pama_plugin.batch.shaping import apply_failure_policy, fill_in, measure, shape
from pama_plugin.batch.state import RunState
from pama_plugin.batch.table import RewardTable
from pama_plugin.errors import RewardError
from pama_plugin.host.actors.critic import flatten_objectives
from pama_plugin.host.actors.gradients import gradient_cosines
from pama_plugin.host.actors.pending import PendingRewards
from pama_plugin.host.actors.probe import probe_rollout
from pama_plugin.rewards.kinds import IN_THE_ROLLOUT
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig

logger = init_logger(__name__)

SECONDS_FOR_REASONS = 60  # to wait for the engines before a run ends
# Estimators of the host that subtract something of the prompt's own group of responses.
GROUP_ESTIMATORS = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")
# Those that subtract nothing before the host clips to --reward.clip_range.
CLIPS_THE_REWARD = ("gae", "reinforce")


class MultiObjectiveExperienceMaker(RemoteExperienceMaker):
    """Makes one table of the rewards of all objectives, then combines what the host's own estimator makes of each.

    Everything else (forwards, KL, length penalties, baselines, whitening) is the host's. A step is ``make_experience``:
    request the rewards, collect them in a table, apply the failure policy, take statistics; and then
    ``compute_advantages_and_returns``: shape, estimate, combine, write back.
    """

    table: RewardTable

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config: PamaConfig = self.args.pama
        self.state = RunState.start(self.config, self.args.train.agent_func_path)
        self.vllm_engines: list[Any] = []  # that know why a reward is missing; the trainer has them
        self.steps_done = 0
        self.warned: set[str] = set()
        self.probing = self.config.probe != "off"
        if self.config.of_kind("hf"):
            # Here, because it imports what such an objective alone needs.
            from pama_plugin.host.actors.conversations import Conversations

            self.conversations = Conversations(self.strategy, self.tokenizer)

    @torch.no_grad()
    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        """Score every response with every objective: all reward groups at once, beside the host's forwards."""
        pending = self._request_rewards(samples_list)
        for samples in samples_list:
            # Rewards that are there already keep the host from asking its one reward group. Nothing reads these.
            samples.rewards = torch.zeros(len(samples.sequences))
        experiences: list[Experience] = super().make_experience(samples_list)
        self._collect_rewards(pending, experiences)
        self.table = self._make_table(experiences)
        measure(self.config.objectives, self.table, self.state)
        if self.probing:
            self.probing = False
            probe_rollout(self, experiences)
        return experiences

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """Run the host's estimator with each objective's rewards, and give the actor the combination of the K results.

        ``reward`` and ``return`` of ``info``, and ``rewards``, become sums of what the estimator saw of each objective,
        times the weights: the host shows and logs them. With one objective of weight 1 and the rule ``linear`` every
        tensor is the stock one, bit for bit.
        """
        config, state, table, weights = self.config, self.state, self.table, self.config.weights_at(self.steps_done)
        moments = [state.objectives[objective.name].rewards for objective in config.trained]
        by_group = self.advantage_estimator in GROUP_ESTIMATORS
        filled_KB = torch.stack([fill_in(own, table, measured) for own, measured in zip(config.trained, moments)])
        shaped = [
            shape(own, table, filled_B, measured, by_group=by_group)
            for own, filled_B, measured in zip(config.trained, filled_KB, moments)
        ]
        present_KB = filled_KB.isfinite()
        runs = [
            self._estimate(shaped[index], present_KB[index], experiences, lambda values, head=index: values[..., head])
            for index in range(len(shaped))
        ]
        advantages_KBA = torch.stack([_join([experience.advantages for experience in run]) for run in runs])
        mask_BA = _join([experience.action_mask for experience in experiences]).bool()
        if get_rule(config.loss).combines == "rewards":
            # A missing reward has the mean that shaping put in its place; a response without any is left out.
            one_B1, all_KB = mask_BA.new_ones(len(mask_BA), 1), torch.ones_like(present_KB)
            found = combine(config, state, table, torch.stack(shaped).unsqueeze(-1), one_B1, all_KB, self.steps_done)
            rewards_B = found.advantages.squeeze(-1)
            self._warn_of_clipping(f"the combined reward of --loss {config.loss}", rewards_B)
            run = self._estimate(rewards_B, present_KB.any(0), experiences, lambda values: _weighted(values, weights))
            estimate_BA = _join([experience.advantages for experience in run])
            result = estimated(found, estimate_BA, advantages_KBA, mask_BA, present_KB)
            return self._write_back(experiences, runs, [run], (1.0,), result, advantages_KBA, present_KB)
        for objective, shaped_B in zip(config.trained, shaped):
            self._warn_of_clipping(f"objective {objective.name!r}", shaped_B)
        active = [self._tells_responses_apart(run, present_B) for run, present_B in zip(runs, present_KB)]
        result = combine(config, state, table, advantages_KBA, mask_BA, present_KB, self.steps_done, active)
        return self._write_back(experiences, runs, runs, weights, result, advantages_KBA, present_KB)

    # -- Samples that are not trained on. ------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, samples: list[Experience]) -> dict[str, Tensor]:
        """The rewards (B,) of every objective for B single samples, in their order."""
        micro_batches = self._in_micro_batches(samples)
        self._collect_rewards(self._request_rewards(micro_batches), micro_batches)
        table = self._make_table(micro_batches)
        return {name: table.row(name).float() for name in table.names}

    @torch.no_grad()
    def score_models(self, samples: list[Experience]) -> dict[str, Tensor]:
        """What the reward models alone give, as it is."""
        micro_batches = self._in_micro_batches(samples)
        self._collect_rewards(self._request_rewards(micro_batches), micro_batches)
        return {
            own.name: torch.cat([each.info[f"{REWARD}{own.name}"] for each in micro_batches])
            for own in self.config.of_kind("rm", "hf")
        }

    def _in_micro_batches(self, samples: list[Experience]) -> list[Experience]:
        size = self.args.rollout.micro_batch_size
        return [
            Experience.concat_experiences(samples[start : start + size], self.tokenizer.pad_token_id)
            for start in range(0, len(samples), size)
        ]

    # -- Rewards in. ---------------------------------------------------------------------------------------------------

    def _request_rewards(self, samples_list: list[Experience]) -> dict[str, PendingRewards]:
        # Models that share a GPU run one after the other and free the cache in between, as the host's own do.
        shared_with_critic = self.args.train.colocate_critic_reward and self.args.algo.advantage.estimator == "gae"
        one_by_one = self.args.train.colocate_all or shared_with_critic
        pending = {}
        for objective in self.config.of_kind("rm"):
            group, start = self.reward_model_group.groups[objective.name], time.perf_counter()
            # Copies of the last micro-batch fill up: with ZeRO-3 all ranks must be asked equally often, or they hang.
            ranks = len(group._actor_handlers) // group.duplicate_actors
            filled = samples_list + samples_list[-1:] * (-len(samples_list) % ranks)
            refs = self._dispatch_forward(
                group,
                one_by_one,
                sequences=[samples.sequences for samples in filled],
                attention_mask=[samples.attention_mask for samples in filled],
                pad_sequence=[True] * len(filled),
            )
            pending[objective.name] = PendingRewards(start, refs)
        if readers := self.config.of_kind("hf"):
            conversations = self.conversations.of(samples_list)
            for objective in readers:
                group = self.reward_model_group.groups[objective.name]
                pending[objective.name] = group.score(conversations, one_by_one=one_by_one)
        return pending

    def _collect_rewards(self, pending: dict[str, PendingRewards], experiences: list[Experience]) -> None:
        """Wait for the models' rewards, and make columns of them as the rollout does of its own."""
        sizes = [len(experience.sequences) for experience in experiences]
        copies = self.args.ds.ring_attn_size * self.args.ds.tensor_parallel_size
        for objective in self.config.of_kind("rm", "hf"):
            requested = pending[objective.name]
            if objective.kind == "rm":
                rewards = self._flatten_results(requested.refs, copies)[: len(experiences)]
            else:
                rewards = self.reward_model_group.groups[objective.name].collect(requested).split(sizes)
            seconds = requested.seconds()
            for experience, rewards_B in zip(experiences, rewards, strict=True):
                experience.info[f"{REWARD}{objective.name}"] = rewards_B.float()
                experience.info[f"{SECONDS}{objective.name}"] = torch.full((len(rewards_B),), seconds)

    def _make_table(self, experiences: list[Experience]) -> RewardTable:
        """Of the columns, which from here on have NaN where there is no reward, and say so for the logs."""
        sizes = tuple(len(experience.sequences) for experience in experiences)
        rows, problems = [], {}
        for objective in self.config.objectives:
            name = objective.name
            for first, experience in zip(itertools.accumulate(sizes, initial=0), experiences):
                if f"{REWARD}{name}" not in experience.info:  # no failure of the reward: a rollout that does not score
                    raise RewardError(name, "returned nothing", self._text(experiences, first))
            rewards_B = torch.cat([experience.info[f"{REWARD}{name}"] for experience in experiences])
            found = self._explain(objective, rewards_B, experiences)
            failed_B = torch.zeros(len(rewards_B), dtype=torch.bool)
            failed_B[list(found)] = True
            rewards_B = rewards_B.masked_fill(failed_B, math.nan)
            for experience, part_B, failed_b in zip(experiences, rewards_B.split(sizes), failed_B.split(sizes)):
                experience.info[f"{REWARD}{name}"] = part_B
                experience.info[f"{FAILURES}{name}"] = failed_b.float()
            rows.append(rewards_B.double())
            problems |= {(name, response): why for response, why in found.items()}
        order = [experience.index for experience in experiences if experience.index is not None]
        # What is not trained on has no index, and stands in the order of its prompts.
        order_B = torch.tensor(list(itertools.chain.from_iterable(order)) or range(len(rows[0])))
        size = self.args.rollout.n_samples_per_prompt
        table = RewardTable(self.config.names, torch.stack(rows), problems, order_B, size, sizes)
        apply_failure_policy(self.config.objectives, table, lambda response: self._text(experiences, response))
        return table

    def _explain(self, objective: Objective, rewards_B: Tensor, experiences: list[Experience]) -> dict[int, str]:
        """Why there is no reward, by response. A rollout has judged its rewards itself, and knows the reasons."""
        if objective.kind not in IN_THE_ROLLOUT:
            return judge_column(objective, rewards_B)
        codes_B = torch.cat([experience.info.pop(f"{PROBLEM}{objective.name}") for experience in experiences]).long()
        failed = (~rewards_B.isfinite()).nonzero().flatten().tolist()
        codes = {response: int(codes_B[response]) for response in failed}
        why = {
            response: "no reward" if code else f"returned {float(rewards_B[response])}"
            for response, code in codes.items()
        }
        if objective.on_failure.action != "fail" and len(failed) <= objective.max_failures * len(rewards_B):
            return why  # the run goes on: nobody reads the texts, and engines that generate need not be asked
        known: dict[int, str] = {}
        asked = [engine.problems.remote(sorted({*codes.values()} - {0})) for engine in self.vllm_engines]
        try:
            for texts in ray.get(asked, timeout=SECONDS_FOR_REASONS):
                known |= texts
        except ray.exceptions.RayError as error:  # an engine that is dead or busy: the run ends all the same
            logger.warning(f"the reasons of missing rewards could not be asked for: {error}")
        return {response: known.get(code, why[response]) for response, code in codes.items()}

    def _text(self, experiences: list[Experience], response: int) -> str:
        for experience in experiences:
            if response < len(experience.sequences):
                tokens = experience.sequences[response][experience.attention_mask[response].bool()]
                return str(self.tokenizer.decode(tokens))
            response -= len(experience.sequences)
        raise IndexError(response)

    # -- The host's estimator, and what the actor and the logs are given. ----------------------------------------------

    def _estimate(
        self, rewards_B: Tensor, present_B: Tensor, experiences: list[Experience], pick: Callable[[Tensor], Tensor]
    ) -> list[Experience]:
        """What the host's estimator makes of one reward per response, in copies that share all the rest.

        ``pick`` makes of the values (b, A, K) of all heads those that belong to the reward.
        """
        copies = []
        for experience, rewards_b in zip(experiences, self.table.split(rewards_B)):
            rewards_b = rewards_b.clone()  # the host applies penalties to it in place
            values = experience.values
            changed = {
                "rewards": rewards_b,
                "info": experience.info | {"reward": rewards_b},
                "values": values if values is None or values.dim() == 2 else pick(values),
            }
            copies.append(Experience(**vars(experience) | changed))
        if present_B.all():
            return super().compute_advantages_and_returns(copies)

        # Exclude responses without a reward from whitening and from the value targets.
        rows = self.table.split(present_B)
        if present_B.any():  # of no token at all the host would divide by 0
            for copy, rows_b in zip(copies, rows):
                copy.action_mask = copy.action_mask * rows_b.unsqueeze(-1)
        estimates: list[Experience] = super().compute_advantages_and_returns(copies)
        for copy, experience, rows_b in zip(estimates, experiences, rows):
            copy.action_mask = experience.action_mask
            if copy.values is not None:
                copy.returns = torch.where(rows_b.unsqueeze(-1), copy.returns, copy.values)
        return estimates

    def _tells_responses_apart(self, run: list[Experience], present_B: Tensor) -> bool:
        rewards_B = torch.cat([experience.rewards for experience in run]).float()
        if self.advantage_estimator in CLIPS_THE_REWARD:  # others keep a difference, which they clip after the baseline
            rewards_B = rewards_B.clamp(*self.args.reward.clip_range)
        grouped = self.table.grouped(rewards_B), self.table.grouped(present_B)
        return tells_responses_apart(*grouped, by_group=self.advantage_estimator in GROUP_ESTIMATORS)

    def _warn_of_clipping(self, what: str, rewards_B: Tensor) -> None:
        """The host clamps what is left of a reward after its baseline, without a word: say so, once."""
        if self.advantage_estimator == "group_norm":
            return  # it divides by the standard deviation first
        rewards_GN = self.table.grouped(rewards_B)
        if self.advantage_estimator in GROUP_ESTIMATORS:
            rewards_GN = rewards_GN - rewards_GN.mean(1, keepdim=True)
        elif self.advantage_estimator not in CLIPS_THE_REWARD:
            rewards_GN = rewards_GN - rewards_GN.mean()
        low, high = self.args.reward.clip_range
        clipped = int(((rewards_GN < low) | (rewards_GN > high)).sum())
        if clipped and what not in self.warned:
            self.warned.add(what)
            logger.warning(
                f"{what}: {clipped} of {rewards_GN.numel()} rewards, less the estimator's baseline, lie outside "
                f"--reward.clip_range {low} {high} and are clipped by OpenRLHF; the logs have the raw ones"
            )

    def _write_back(
        self,
        experiences: list[Experience],
        runs: list[list[Experience]],
        seen: list[list[Experience]],
        shares: tuple[float, ...],
        result: Aggregation,
        advantages_KBA: Tensor,
        present_KB: Tensor,
    ) -> list[Experience]:
        """One advantage per token for the actor, K columns of values and returns for the critic, metrics for the logs.

        Args:
            experiences: as the host made them.
            runs: what the estimator made of each objective.
            seen: what it saw as rewards, whose sums by ``shares`` the host shows.
            shares: one for each of these.
            result: the combination.
            advantages_KBA: of the objectives.
            present_KB: which responses each has a reward for.
        """
        metrics = name_metrics(self.config, result, self.steps_done)
        metrics |= self._probe_gradients(experiences, advantages_KBA, present_KB, result)
        if self.advantage_estimator == "gae":
            for objective, run, present_B in zip(self.config.trained, runs, present_KB):
                returns_N, values_N = self._tokens(run, present_B)
                metrics[f"{EXPLAINED}{objective.name}"] = explained_variance(returns_N, values_N)
        for stock, advantages_BA, own, parts in zip(
            experiences, self.table.split(result.advantages), zip(*runs), zip(*seen), strict=True
        ):
            combined = own[0]  # the first run's copy goes on, with the columns of all
            if self.advantage_estimator == "gae":
                combined.values, combined.returns = (
                    flatten_objectives(torch.stack([getattr(experience, field) for experience in own], -1))
                    for field in ("values", "returns")
                )
            valid_BA = combined.action_mask.bool()
            advantages_BA = advantages_BA[:, : valid_BA.shape[1]]
            combined.advantages = torch.where(valid_BA, advantages_BA, combined.advantages)  # padding stays the host's
            combined.rewards = _sum([experience.rewards for experience in parts], shares)
            for key in [key for key, value in combined.info.items() if value is not stock.info.get(key)]:
                combined.info[key] = _sum([experience.info[key] for experience in parts], shares)
            if len(parts) > 1:  # a sum of standard deviations is not one
                combined.info.pop("group_reward_std", None)
            # One value per rollout batch, as a column like any other of ``info``; the trainer takes them out again.
            combined.info |= {key: torch.full((len(valid_BA),), value) for key, value in metrics.items()}
        return runs[0]

    def _tokens(self, run: list[Experience], present_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns and values at the valid tokens of the responses with a reward."""
        kept = [
            experience.action_mask.bool() & rows_b.unsqueeze(-1)
            for experience, rows_b in zip(run, self.table.split(present_B))
        ]
        returns_N = torch.cat([experience.returns[mask] for experience, mask in zip(run, kept)])
        return returns_N, torch.cat([experience.values[mask] for experience, mask in zip(run, kept)])

    def _probe_gradients(
        self, experiences: list[Experience], advantages_KBA: Tensor, present_KB: Tensor, result: Aggregation
    ) -> dict[str, float]:
        every = self.config.probe_gradients
        if every is None or self.steps_done % every:
            return {}
        cosines = gradient_cosines(
            self.actor_model_group,
            experiences,
            advantages_KBA.masked_fill(~present_KB.unsqueeze(-1), 0),
            result.advantages,
            self.args.train.micro_batch_size,
            mean_per_response=self.args.actor.loss_agg_mode == "seq-mean-token-mean"
            or self.args.actor.policy_loss_type == "gspo",
            all_ranks=self.args.ds.zero_stage == 3,
        )
        named = zip(self.config.trained_names, cosines, strict=True)
        return {f"{PAMA}gradient_cosine/{name}": cosine for name, cosine in named if not math.isnan(cosine)}


def _sum(tensors: list[Tensor], shares: tuple[float, ...]) -> Tensor:
    return sum(tensor * share for tensor, share in zip(tensors, shares))


def _weighted(values_bAK: Tensor, weights: tuple[float, ...]) -> Tensor:
    return _sum([values_bAK[..., head] for head in range(len(weights))], weights)


def _join(tensors: list[Tensor]) -> Tensor:
    """Micro-batches (B_i, A_i) → (ΣB_i, max A_i), padded on the right with 0."""
    length = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([pad(tensor, (0, length - tensor.shape[1])) for tensor in tensors])

"""K rewards per response in, one advantage per token out: the host's experience maker, run once per objective."""

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.utils.logging_utils import init_logger
from torch import Tensor
from torch.nn.functional import pad

from pama_plugin.aggregation import Aggregation, aggregate, describe, get_rule
from pama_plugin.config import PamaConfig
from pama_plugin.errors import RewardError
from pama_plugin.host.critic import flatten_objectives
from pama_plugin.host.gradients import gradient_cosines
from pama_plugin.host.probe import probe_rollout
from pama_plugin.host.scored import Scored
from pama_plugin.objective import Objective
from pama_plugin.scoring import check_reward
from pama_plugin.shaping import shape_rewards
from pama_plugin.state import RunState

logger = init_logger(__name__)

# Estimators of the host that subtract something of the prompt's own group of responses.
GROUP_ESTIMATORS = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")
# Those that subtract nothing before the host clips to --reward.clip_range.
CLIPS_THE_REWARD = ("gae", "reinforce")


class MultiObjectiveExperienceMaker(RemoteExperienceMaker):
    """Adds the columns ``info["reward/<name>"]``, then aggregates what the host's own estimator makes of each.

    Everything else (forwards, KL, length penalties, baselines, whitening) is the host's. A step takes the methods in
    their order: ``make_experience`` dispatches and collects rewards, deals with failures and takes statistics;
    ``compute_advantages_and_returns`` shapes and estimates each objective, and aggregates.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config: PamaConfig = self.args.pama
        self.state = RunState.start(self.config, self.args.train.agent_func_path)
        self.steps_done = 0
        self.warned: set[str] = set()
        self.probing = self.config.probe != "off"
        if self.config.of_kind("hf"):
            # Here, because it imports what such an objective alone needs.
            from pama_plugin.host.conversations import Conversations

            self.conversations = Conversations(self.strategy, self.tokenizer)

    # -- Rewards in: a column for each objective, of rollouts, and of samples that are not trained on. -----------------

    @torch.no_grad()
    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        """Score every response with every objective: all reward groups at once, beside the host's forwards."""
        scored = self._dispatch_rewards(samples_list)
        for samples in samples_list:
            # Rewards that are there already keep the host from asking its one reward group. Nothing reads these.
            samples.rewards = torch.zeros(len(samples.sequences))
        experiences: list[Experience] = super().make_experience(samples_list)
        self._collect_rewards(scored, experiences)
        for objective in self.config.objectives:
            self._apply_failure_policy(objective, experiences)
            self._measure(objective, experiences)
        if self.probing:
            self.probing = False
            probe_rollout(self, experiences)
        return experiences

    @torch.no_grad()
    def score(self, samples: list[Experience]) -> dict[str, Tensor]:
        """The rewards (B,) of every objective for B single samples that are not trained on, in their order."""
        micro_batches = self._in_micro_batches(samples)
        self._collect_rewards(self._dispatch_rewards(micro_batches), micro_batches)
        for objective in self.config.objectives:
            self._apply_failure_policy(objective, micro_batches)
        return {name: self._column(name, micro_batches) for name in self.config.names}

    @torch.no_grad()
    def score_models(self, samples: list[Experience]) -> dict[str, Tensor]:
        """What the reward models alone give, as it is."""
        micro_batches = self._in_micro_batches(samples)
        self._collect_rewards(self._dispatch_rewards(micro_batches), micro_batches)
        return {own.name: self._column(own.name, micro_batches) for own in self.config.of_kind("rm", "hf")}

    def _in_micro_batches(self, samples: list[Experience]) -> list[Experience]:
        size = self.args.rollout.micro_batch_size
        return [
            Experience.concat_experiences(samples[start : start + size], self.tokenizer.pad_token_id)
            for start in range(0, len(samples), size)
        ]

    def _dispatch_rewards(self, samples_list: list[Experience]) -> dict[str, Scored]:
        # Models that share a GPU run one after the other and free the cache in between, as the host's own do.
        shared_with_critic = self.args.train.colocate_critic_reward and self.args.algo.advantage.estimator == "gae"
        one_by_one = self.args.train.colocate_all or shared_with_critic
        scored = {}
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
            scored[objective.name] = Scored(start, refs)
        if readers := self.config.of_kind("hf"):
            conversations = self.conversations.of(samples_list)
            for objective in readers:
                group = self.reward_model_group.groups[objective.name]
                scored[objective.name] = group.score(conversations, one_by_one=one_by_one)
        return scored

    def _collect_rewards(self, scored: dict[str, Scored], experiences: list[Experience]) -> None:
        sizes = [len(experience.sequences) for experience in experiences]
        copies = self.args.ds.ring_attn_size * self.args.ds.tensor_parallel_size
        for objective in self.config.of_kind("rm", "hf"):
            own = scored[objective.name]
            if objective.kind == "rm":
                rewards = self._flatten_results(own.refs, copies)[: len(experiences)]
            else:
                rewards = self.reward_model_group.groups[objective.name].collect(own).split(sizes)
            seconds = own.seconds()
            for experience, rewards_B in zip(experiences, rewards, strict=True):
                experience.info[f"reward/{objective.name}"] = rewards_B.float()
                experience.info[f"seconds/{objective.name}"] = torch.full((len(rewards_B),), seconds)

    def _column(self, name: str, experiences: list[Experience]) -> Tensor:
        return torch.cat([experience.info[f"reward/{name}"] for experience in experiences])

    def _apply_failure_policy(self, objective: Objective, experiences: list[Experience]) -> None:
        """After it a column has a number that training can use, or NaN, for every response."""
        name, failures = objective.name, []
        for experience in experiences:
            rewards_B = experience.info.get(f"reward/{name}")
            if rewards_B is None:  # no failure of the reward: a rollout that does not score
                raise RewardError(name, "returned nothing", self._text(experience, 0))
            outcomes = [check_reward(objective, reward) for reward in rewards_B.tolist()]
            failures += [(own.problem, experience, row) for row, own in enumerate(outcomes) if own.problem is not None]
            failed_B = torch.tensor([own.problem is not None for own in outcomes])
            experience.info[f"reward/{name}"] = rewards_B.masked_fill(failed_B, math.nan)
            experience.info[f"pama/failures/{name}"] = failed_B.float()
        if not failures:
            return
        problem, experience, row = failures[0]
        total = sum(len(experience.sequences) for experience in experiences)
        if objective.on_failure.action == "fail":
            raise RewardError(name, problem, self._text(experience, row))
        if len(failures) > objective.max_failures * total:
            ceiling = f"{len(failures)} of {total} responses have no reward, more than max_failures"
            raise RewardError(name, f"{ceiling}={objective.max_failures}", self._text(experience, row))

    def _text(self, experience: Experience, row: int) -> str:
        return self.tokenizer.decode(experience.sequences[row][experience.attention_mask[row].bool()])

    def _measure(self, objective: Objective, experiences: list[Experience]) -> None:
        """Statistics of what was measured; frozen after so many steps, but not before anything has varied."""
        own = self.state.objectives[objective.name]
        if objective.freeze_after is not None and own.steps >= objective.freeze_after and own.rewards.std > 0:
            return
        rewards_B = self._column(objective.name, experiences)
        own.rewards.update(rewards_B[rewards_B.isfinite()])
        own.steps += 1

    # -- What the host's estimator is given of each objective. ---------------------------------------------------------

    def _rewards(self, objective: Objective, experiences: list[Experience]) -> Tensor:
        """(B,): what was measured or is imputed; NaN where the objective is left out of the aggregation."""
        rewards_B = self._column(objective.name, experiences)
        if objective.on_failure.action == "impute":
            value, measured = objective.on_failure.value, self.state.objectives[objective.name].rewards
            if value is None and measured.count:
                value = measured.mean
            if value is not None:
                return rewards_B.nan_to_num(value)
        return rewards_B

    def _shape(self, objective: Objective, experiences: list[Experience]) -> tuple[Tensor, ...]:
        """What the host's estimator is given of one objective, split as ``experiences`` are."""
        order = _order(experiences)
        rewards_B = torch.empty(len(order))
        rewards_B[order] = self._rewards(objective, experiences)
        shaped_GN = shape_rewards(
            objective,
            rewards_B.reshape(-1, self.args.rollout.n_samples_per_prompt),
            self.state.objectives[objective.name].rewards,
            fill_by_group=self.advantage_estimator in GROUP_ESTIMATORS,
        )
        if get_rule(self.config.loss).of != "rewards":
            self._warn_of_clipping(f"objective {objective.name!r}", shaped_GN)
        return shaped_GN.flatten()[order].split([len(experience.sequences) for experience in experiences])

    def _warn_of_clipping(self, what: str, rewards_GN: Tensor) -> None:
        """The host clamps what is left of a reward after its baseline, without a word: say so, once."""
        if self.advantage_estimator == "group_norm":
            return  # it divides by the standard deviation first
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

    # -- Advantages out: an estimate for each objective, their aggregate, and what is logged of it. --------------------

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """Run the host's estimator with each objective's rewards, and give the actor the aggregate of the K results.

        ``reward`` and ``return`` of ``info``, and ``rewards``, become sums of what the estimator saw of each objective,
        times the weights: the host shows and logs them. With one objective of weight 1 and the rule ``linear`` every
        tensor is the stock one, bit for bit.
        """
        trained, weights = self.config.trained, self.config.weights_at(self.steps_done)
        present_KB = torch.stack([self._rewards(objective, experiences).isfinite() for objective in trained])
        shaped = [self._shape(objective, experiences) for objective in trained]
        runs = [
            self._estimate(shaped[index], present_KB[index], experiences, lambda values, head=index: values[..., head])
            for index in range(len(trained))
        ]
        advantages_KBA = torch.stack([_join([experience.advantages for experience in run]) for run in runs])
        mask_BA = _join([experience.action_mask for experience in experiences]).bool()
        if get_rule(self.config.loss).of == "rewards":
            result, scalar = self._scalarise(shaped, experiences, advantages_KBA, mask_BA, present_KB, weights)
            seen, shares = [scalar], (1.0,)  # what the estimator saw is one reward
        else:
            result = aggregate(
                self.config.loss,
                advantages_KBA,
                mask_BA,
                level=self.config.level,
                noon=self.config.noon,
                weights=weights,
                whiten=self.config.whiten,
                active=[self._tells_responses_apart(run, present_B) for run, present_B in zip(runs, present_KB)],
                present_KB=present_KB,
                groups_B=_order(experiences) // self.args.rollout.n_samples_per_prompt,
                **self.config.options,
                **self._duals(experiences),
            )
            seen, shares = runs, weights
        self._remember_multipliers(result)
        metrics = self._name_metrics(result)
        if (every := self.config.probe_gradients) is not None and self.steps_done % every == 0:
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
            named = zip(trained, cosines, strict=True)
            metrics |= {f"pama/gradient_cosine/{own.name}": cosine for own, cosine in named if not math.isnan(cosine)}
        if self.advantage_estimator == "gae":
            metrics |= {
                f"explained_variance/{objective.name}": _explained_variance(run, present_B)
                for objective, run, present_B in zip(trained, runs, present_KB)
            }

        sizes = [len(experience.sequences) for experience in experiences]
        for stock, advantages_BA, own, parts in zip(
            experiences, result.advantages.split(sizes), zip(*runs), zip(*seen), strict=True
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
            combined.rewards = _weighted([experience.rewards for experience in parts], shares)
            for key in [key for key, value in combined.info.items() if value is not stock.info.get(key)]:
                combined.info[key] = _weighted([experience.info[key] for experience in parts], shares)
            if len(parts) > 1:  # a sum of standard deviations is not one
                combined.info.pop("group_reward_std", None)
            # One value per rollout batch, as a column like any other of ``info``; the trainer takes them out again.
            combined.info |= {key: torch.full((len(valid_BA),), value) for key, value in metrics.items()}
        return runs[0]

    def _scalarise(
        self,
        shaped: list[tuple[Tensor, ...]],
        experiences: list[Experience],
        advantages_KBA: Tensor,
        mask_BA: Tensor,
        present_KB: Tensor,
        weights: tuple[float, ...],
    ) -> tuple[Aggregation, list[Experience]]:
        """One reward per response by a rule of rewards, and what the host's estimator makes of it.

        A missing reward counts as the mean that ``shape_rewards`` put in its place; a response without any is left out.
        The metrics are of the advantages.
        """
        rewards_KB1 = torch.stack([torch.cat(columns) for columns in shaped]).unsqueeze(-1)
        present_B1 = mask_BA.new_ones(rewards_KB1.shape[1:])
        found = aggregate(self.config.loss, rewards_KB1, present_B1, weights=weights, **self.config.options)
        rewards_B, order = found.advantages.squeeze(-1), _order(experiences)
        ordered_B = torch.empty_like(rewards_B)
        ordered_B[order] = rewards_B
        ordered_GN = ordered_B.reshape(-1, self.args.rollout.n_samples_per_prompt)
        self._warn_of_clipping(f"the combined reward of --loss {self.config.loss}", ordered_GN)
        run = self._estimate(
            rewards_B.split([len(columns) for columns in shaped[0]]),
            present_KB.any(0),
            experiences,
            lambda values: sum(values[..., head] * weight for head, weight in enumerate(weights)),
        )
        advantages_BA = _join([experience.advantages for experience in run])
        advantages_BA = advantages_BA.masked_fill(~(mask_BA & present_KB.any(0).unsqueeze(-1)), 0)
        metrics = found.metrics | describe(advantages_KBA, mask_BA, present_KB, advantages_BA)
        return Aggregation(advantages_BA, found.coefficients, metrics), run

    def _duals(self, experiences: list[Experience]) -> dict[str, list[float | None]]:
        """How far each constraint's mean reward is from its threshold, and its multiplier so far."""
        if not get_rule(self.config.loss).constrained:
            return {}
        violations: list[float | None] = []
        for objective in self.config.trained:
            mean = self._column(objective.name, experiences).nanmean().item()
            # With no reward at all there is nothing to learn from: the multiplier stays.
            missing = objective.threshold is not None and math.isnan(mean)
            violations.append(None if objective.threshold is None else 0.0 if missing else objective.threshold - mean)
        multipliers = [self.state.objectives[name].multiplier for name in self.config.trained_names]
        return {"violations_K": violations, "multipliers_K": multipliers}

    def _remember_multipliers(self, result: Aggregation) -> None:
        for index, name in enumerate(self.config.trained_names):
            self.state.objectives[name].multiplier = result.metrics.get(f"multiplier/{index}")

    def _tells_responses_apart(self, run: list[Experience], present_B: Tensor) -> bool:
        """Whether the rewards that the estimator sees differ where it compares them: in the batch, or a prompt's group.

        Where they do not, the advantages are 0 up to rounding, which whitening blows up to a signal.
        """
        order = _order(run)
        rewards_B = torch.cat([experience.rewards for experience in run]).float()
        if self.advantage_estimator in CLIPS_THE_REWARD:  # others keep a difference, which they clip after the baseline
            rewards_B = rewards_B.clamp(*self.args.reward.clip_range)
        low_B, high_B = (torch.empty(len(order)) for _ in range(2))
        low_B[order] = rewards_B.masked_fill(~present_B, math.inf)
        high_B[order] = rewards_B.masked_fill(~present_B, -math.inf)
        size = self.args.rollout.n_samples_per_prompt if self.advantage_estimator in GROUP_ESTIMATORS else len(order)
        return bool((low_B.reshape(-1, size).amin(1) < high_B.reshape(-1, size).amax(1)).any())

    def _estimate(
        self,
        rewards: tuple[Tensor, ...],
        present_B: Tensor,
        experiences: list[Experience],
        pick: Callable[[Tensor], Tensor],
    ) -> list[Experience]:
        """What the host's estimator makes of one reward per response, in copies that share all the rest.

        ``pick`` makes of the values (b, A, K) of all heads those that belong to the reward.
        """
        copies = []
        for experience, rewards_B in zip(experiences, rewards):
            rewards_B = rewards_B.clone()  # the host applies penalties to it in place
            values = experience.values
            own = {
                "rewards": rewards_B,
                "info": experience.info | {"reward": rewards_B},
                "values": values if values is None or values.dim() == 2 else pick(values),
            }
            copies.append(Experience(**vars(experience) | own))
        if present_B.all():
            return super().compute_advantages_and_returns(copies)

        # Whoever has no reward must not enter the whitening, nor teach the value head.
        rows = present_B.split([len(experience.sequences) for experience in experiences])
        if present_B.any():  # of no token at all the host would divide by 0
            for copy, rows_B in zip(copies, rows):
                copy.action_mask = copy.action_mask * rows_B.unsqueeze(-1)
        estimated: list[Experience] = super().compute_advantages_and_returns(copies)
        for copy, experience, rows_B in zip(estimated, experiences, rows):
            copy.action_mask = experience.action_mask
            if copy.values is not None:
                copy.returns = torch.where(rows_B.unsqueeze(-1), copy.returns, copy.values)
        return estimated

    def _name_metrics(self, result: Aggregation) -> dict[str, float]:
        """``gain/1`` → ``pama/gain/<name of objective 1>``."""
        names = self.config.trained_names
        named = {f"pama/coefficient/{name}": float(c) for name, c in zip(names, result.coefficients)}
        for key, value in result.metrics.items():
            stem, _, index = key.partition("/")
            of_objective = index.isdecimal() and int(index) < len(names)
            named[f"pama/{stem}/{names[int(index)]}" if of_objective else f"pama/{key}"] = value
        scheduled = [objective for objective in self.config.trained if objective.weight.shape != "constant"]
        return named | {f"pama/weight/{own.name}": own.weight.at(self.steps_done) for own in scheduled}


def _order(experiences: list[Experience]) -> Tensor:
    """(B,): where each response stands among those of the rollout, in which a prompt's own are side by side."""
    return torch.tensor(list(itertools.chain.from_iterable(experience.index for experience in experiences)))


def _weighted(tensors: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    return sum(tensor * weight for tensor, weight in zip(tensors, weights))


def _explained_variance(run: list[Experience], present_B: Tensor) -> float:
    """``1 − Var(R − V) / Var(R)`` over the tokens of the responses with a reward; NaN where the returns do not vary."""
    rows = present_B.split([len(experience.sequences) for experience in run])
    mask = torch.cat([(own.action_mask.bool() & rows_B.unsqueeze(-1)).flatten() for own, rows_B in zip(run, rows)])
    returns, values = (
        torch.cat([getattr(experience, field).flatten() for experience in run])[mask].double()
        for field in ("returns", "values")
    )
    if len(returns) < 2 or returns.std() <= 1e-6 * returns.abs().max():  # rounding
        return math.nan
    return float(1 - (returns - values).var() / returns.var())


def _join(tensors: list[Tensor]) -> Tensor:
    """Micro-batches (B_i, A_i) → (ΣB_i, max A_i), padded on the right with 0."""
    length = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([pad(tensor, (0, length - tensor.shape[1])) for tensor in tensors])

"""OpenRLHF's experience maker for K rewards per response: one estimator run each, one combined advantage per token.

The methods of ``MultiObjectiveExperienceMaker`` are in the order of a step: the two calls of the trainer, what they log
of the responses, the runs of the estimator (``_estimate``), which objectives are active, and the gradient probe. Below
it are functions of one micro-batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience as HostExperience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties
from openrlhf.utils.logging_utils import init_logger
from torch import Tensor

from pama_plugin.aggregation import Aggregation, get_rule
from pama_plugin.batch.behaviour import distance
from pama_plugin.batch.combine import active_flags, combine, estimated
from pama_plugin.batch.keys import AT_BEST, EXPLAINED, KL, REFERENCE_NLL, SAMPLED, SPREAD, UNIFORM
from pama_plugin.batch.metrics import (
    describe_gradients,
    describe_preferences,
    group_correlations,
    name_metrics,
    share_at_best,
)
from pama_plugin.batch.rollouts import Row, choose_responses, describe_responses
from pama_plugin.batch.shaping import fill_with_means, measure, shape_trained, spreads, varies_enough
from pama_plugin.batch.state import RunState
from pama_plugin.batch.table import RewardTable
from pama_plugin.host.actors.collector import RewardCollector
from pama_plugin.host.actors.estimators import Estimator
from pama_plugin.host.actors.gradients import gradient_products
from pama_plugin.host.actors.probe import check_sampler, probe_rollout
from pama_plugin.host.actors.prompts import plain, preference_of
from pama_plugin.host.actors.rollout_log import add_texts
from pama_plugin.host.actors.write_back import explain_variance, join, of_rows, weighted_sum, write_back
from pama_plugin.host.protocols import Experience
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.preferences import Weights
from pama_plugin.settings.run import PamaConfig

logger = init_logger(__name__)


class MultiObjectiveExperienceMaker(RemoteExperienceMaker):
    """Builds one table of all objectives' rewards and combines the advantages that OpenRLHF estimates from each.

    OpenRLHF does everything else (forwards, KL, length penalties, baselines, whitening). The trainer makes two calls
    per step: ``make_experience`` collects the rewards, applies the failure policy and updates the statistics;
    ``compute_advantages_and_returns`` shapes, estimates, combines and writes back.

    Args:
        vllm_engines: return the reasons of rewards that are missing from the rollout. All other arguments are
            OpenRLHF's.
    """

    table: RewardTable

    def __init__(self, *args: Any, vllm_engines: Sequence[Any] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config: PamaConfig = self.args.pama
        adapters = vars(self.args.pama_adapters)  # OpenRLHF makes a namespace of every dict
        self.state = RunState.start(self.config, self.args.train.agent_func_path, adapters)
        groups = {} if self.reward_model_group is None else self.reward_model_group.groups
        self.collector = RewardCollector(self.strategy, self.tokenizer, groups, vllm_engines)
        self.estimator = Estimator(self.advantage_estimator, self.args.reward.clip_range)
        self.steps_done = 0
        self.warned: set[str] = set()
        self.rows: list[Row] = []
        self.unprobed = set(self.config.names if self.config.probe != "off" else ())

    @torch.no_grad()
    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        """Score every response with every objective: all reward groups run beside OpenRLHF's forwards."""
        pending = self.collector.request(samples_list)
        for samples in samples_list:
            # With rewards set, OpenRLHF does not call its single reward group. These zeros are never read.
            samples.rewards = torch.zeros(len(samples.sequences))
        experiences: list[Experience] = super().make_experience(samples_list)
        if SAMPLED in experiences[0].info:
            check_sampler(experiences)
        self.table = self.collector.collect(pending, experiences)
        measure(self.config.objectives, self.table, self.state)
        if self.initial_model_group is not None:
            for experience in experiences:
                experience.info |= _distance_from_reference(experience)
        if self.unprobed:
            probe_rollout(self.collector, self.table, experiences, self.unprobed)
        return experiences

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """Run OpenRLHF's estimator on each objective's rewards and give the actor the combined advantages.

        ``rewards``, and ``reward`` and ``return`` in ``info``, which OpenRLHF shows and logs, become weighted sums over
        the objectives' estimator runs. With one objective of weight 1 and the rule ``linear`` every tensor equals the
        stock one, bit for bit.
        """
        config, state, table = self.config, self.state, self.table
        preferences = self._preferences(experiences)
        weights_KB = config.weights_with(preferences, self.steps_done)
        shaped_KB, present_KB = shape_trained(config.trained, table, state, by_group=self.estimator.by_group)
        runs = [
            self._estimate(rewards_B, present_B, experiences, _value_of(head))
            for head, (rewards_B, present_B) in enumerate(zip(shaped_KB, present_KB))
        ]
        advantages_KBA = torch.stack([join([experience.advantages for experience in run]) for run in runs])
        mask_BA = join([experience.action_mask for experience in experiences]).bool()
        varying = [self._varies_enough(objective) for objective in config.trained]
        told_apart = [self._tells_responses_apart(*each) for each in zip(runs, present_KB)]
        active = [all(flags) for flags in zip(varying, told_apart)]
        if get_rule(config.loss).combines == "rewards":
            # Missing rewards were replaced by a mean; a response without any reward is excluded below.
            one_B1, used_KB = mask_BA.new_ones(len(mask_BA), 1), torch.ones_like(present_KB)
            if not get_rule(config.loss).linear:
                # A mean would compete with rewards where an objective does not apply to a prompt.
                in_group = [table.grouped(present_B).any(1, keepdim=True) for present_B in present_KB]
                used_KB = torch.stack([table.ungrouped(any_G1.expand(-1, table.group_size)) for any_G1 in in_group])
            of_rewards = combine(
                config,
                state,
                table,
                shaped_KB.unsqueeze(-1),
                one_B1,
                used_KB,
                self.steps_done,
                active,
                preferences=preferences,
            )
            rewards_B, active_K = of_rewards.advantages.squeeze(-1), active_flags(of_rewards)
            self._warn_of_clipping(f"the combined reward of --loss {config.loss}", rewards_B)
            shown = [
                self._estimate(
                    rewards_B,
                    present_KB.any(0),
                    experiences,
                    lambda values, rows_b: weighted_sum(
                        values.unbind(-1), of_rows(weights_KB * active_K.unsqueeze(-1), rows_b)
                    ),
                )
            ]
            estimate_BA = join([experience.advantages for experience in shown[0]])
            result = estimated(of_rewards, estimate_BA, advantages_KBA, mask_BA, present_KB)
            weights_KB = torch.ones(1, 1)
        else:
            shown = runs
            for objective, rewards_B in zip(config.trained, shaped_KB):
                self._warn_of_clipping(f"objective {objective.name!r}", rewards_B)
            log_ratio_BA = None
            if config.options.get("reference_clip"):
                log_ratio_BA = join([_log_ratio(experience) for experience in experiences])
            result = combine(
                config,
                state,
                table,
                advantages_KBA,
                mask_BA,
                present_KB,
                self.steps_done,
                active,
                log_ratio_BA=log_ratio_BA,
                rewards_KB=shaped_KB,
                preferences=preferences,
            )

        metrics = name_metrics(config, result, self.steps_done)
        metrics |= describe_preferences(config, table, preferences)
        metrics |= self._probe_gradients(experiences, advantages_KBA, present_KB, result)
        metrics |= {f"{SPREAD}{name}": value for name, value in spreads(config.objectives, table, state).items()}
        at_best = {f"{AT_BEST}{name}": share_at_best(table.row(name)) for name in config.trained_names}
        metrics |= {key: share for key, share in at_best.items() if share == share}  # not NaN
        if table.group_size > 1:
            metrics[UNIFORM] = table.share_of_uniform_groups(_responses(experiences))
            metrics |= group_correlations(table, config.trained_names)
        self.rows = self._describe(experiences, result, mask_BA)
        if self.estimator.name == "gae":
            for objective, run, present_B in zip(config.trained, runs, present_KB):
                metrics[f"{EXPLAINED}{objective.name}"] = explain_variance(run, table.split(present_B))
        return write_back(experiences, runs, shown, weights_KB, table.split(result.advantages), metrics)

    def _preferences(self, experiences: list[Experience]) -> list[Weights]:
        """The preference of each response, if prompts have one."""
        if self.config.preferences is None:
            return []
        return [preference_of(prompt) for experience in experiences for prompt in experience.prompts]

    def _describe(self, experiences: list[Experience], result: Aggregation, mask_BA: Tensor) -> list[Row]:
        """The rows of this step for the log of rollouts."""
        if not self.config.log_rollouts:
            return []
        prompts = [plain(prompt) for experience in experiences for prompt in experience.prompts]
        chosen = choose_responses(prompts, self.table.order_B.tolist(), self.config.log_rollouts)
        distances = {
            word: torch.cat([experience.info[key] for experience in experiences])
            for word, key in (("nats", KL), ("reference_nll", REFERENCE_NLL))
            if key in experiences[0].info
        }
        preferences = self._preferences(experiences)
        rows = describe_responses(
            self.config, self.table, result, mask_BA, distances, chosen, self.steps_done, preferences
        )
        add_texts(rows, chosen, experiences, self.tokenizer)
        return rows

    def _estimate(
        self,
        rewards_B: Tensor,
        present_B: Tensor,
        experiences: list[Experience],
        pick: Callable[[Tensor, Tensor], Tensor],
    ) -> list[Experience]:
        """Run OpenRLHF's estimator on one reward per response, in copies that share everything else.

        ``pick`` selects the values (b, A) of this reward from those of all heads, (b, A, K), for the responses b.
        """
        copies = []
        rows = self.table.split(torch.arange(len(rewards_B)))
        for experience, rewards_b, rows_b in zip(experiences, self.table.split(rewards_B), rows):
            rewards_b = rewards_b.clone()  # OpenRLHF applies penalties in place
            values = experience.values
            changed = {
                "rewards": rewards_b,
                "info": experience.info | {"reward": rewards_b},
                "values": values if values is None or values.dim() == 2 else pick(values, rows_b),
            }
            copies.append(HostExperience(**vars(experience) | changed))
        if present_B.all():
            return super().compute_advantages_and_returns(copies)
        return self._estimate_present(present_B, experiences, copies)

    def _estimate_present(
        self, present_B: Tensor, experiences: list[Experience], copies: list[Experience]
    ) -> list[Experience]:
        """Run the estimator so that responses without a reward change nothing: baselines, whitening, value targets."""
        table, rows = self.table, self.table.split(present_B)
        apply_length_penalties(copies, self.strategy.args)  # before missing rewards become the mean of the others
        penalised_GN = table.grouped(torch.cat([copy.rewards for copy in copies]).float())
        present_GN = table.grouped(present_B)
        filled_GN = fill_with_means(penalised_GN.masked_fill(~present_GN, math.nan), by_group=self.estimator.by_group)
        fewer = self.estimator.for_fewer(filled_GN, present_GN), present_GN
        for copy, rewards_b, rows_b in zip(copies, table.split(table.ungrouped(fewer[0])), rows):
            copy.rewards = rewards_b.clone()
            # No penalty again.
            copy.response_length, copy.truncated = torch.zeros(len(rewards_b)), None
            if present_B.any():  # without any token OpenRLHF would divide by 0
                copy.action_mask = copy.action_mask * rows_b.unsqueeze(-1)
        estimates: list[Experience] = super().compute_advantages_and_returns(copies)
        excess = table.split(table.ungrouped(self.estimator.excess_of_fewer(*fewer)))
        shown = table.split(table.ungrouped(penalised_GN).masked_fill(~present_B, 0))  # of what there is
        for copy, experience, rows_b, excess_b, shown_b in zip(estimates, experiences, rows, excess, shown):
            copy.action_mask = experience.action_mask
            copy.response_length, copy.truncated = experience.response_length, experience.truncated
            copy.advantages = copy.advantages - excess_b.unsqueeze(-1) * copy.action_mask
            copy.rewards = copy.info["reward"] = shown_b
            if copy.values is not None:
                copy.returns = torch.where(rows_b.unsqueeze(-1), copy.returns, copy.values)
        return estimates

    def _tells_responses_apart(self, run: list[Experience], present_B: Tensor) -> bool:
        rewards_B = torch.cat([experience.rewards for experience in run]).float()
        return self.estimator.tells_responses_apart(self.table.grouped(rewards_B), self.table.grouped(present_B))

    def _varies_enough(self, objective: Objective) -> bool:
        rewards_GN = self.table.grouped(self.table.row(objective.name))
        share, by_group = self.config.inactive_below, self.estimator.by_group
        return varies_enough(objective, rewards_GN, self.state, share=share, by_group=by_group)

    def _warn_of_clipping(self, source: str, rewards_B: Tensor) -> None:
        clipped = self.estimator.count_clipped(self.table.grouped(rewards_B))
        if clipped and source not in self.warned:
            self.warned.add(source)
            low, high = self.estimator.clip_range
            logger.warning(
                f"{source}: {clipped} of {len(rewards_B)} rewards, minus the estimator's baseline, are outside "
                f"--reward.clip_range {low} {high}: OpenRLHF clips them; the logs show the raw rewards"
            )

    def _probe_gradients(
        self, experiences: list[Experience], advantages_KBA: Tensor, present_KB: Tensor, result: Aggregation
    ) -> dict[str, float]:
        every = self.config.probe_gradients
        if every is None or self.steps_done % every:
            return {}
        products = gradient_products(
            self.actor_model_group,
            experiences,
            advantages_KBA.masked_fill(~present_KB.unsqueeze(-1), 0),
            result.advantages,
            self.table.grouped(torch.arange(len(result.advantages))),
            self.args.train.micro_batch_size,
            mean_per_response=self.args.actor.loss_agg_mode == "seq-mean-token-mean"
            or self.args.actor.policy_loss_type == "gspo",
            all_ranks=self.args.ds.zero_stage == 3,
        )
        return describe_gradients(products, self.config.trained_names)


def _value_of(head: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda values, _: values[..., head]


def _distance_from_reference(experience: Experience) -> dict[str, Tensor]:
    """The columns of ``distance``; OpenRLHF keeps the reference's log-probabilities only for a KL loss."""
    reference_BA = experience.base_action_log_probs
    if reference_BA is None:  # of the same sums: the mean difference at every token
        reference_BA = experience.action_log_probs - experience.info["logprobs_diff"].unsqueeze(1)
    nats_B, nll_B = distance(experience.action_log_probs, reference_BA, experience.action_mask.bool())
    return {KL: nats_B, REFERENCE_NLL: nll_B}


def _log_ratio(experience: Experience) -> Tensor:
    """log π − log π_ref at every token, for ``--pama.option reference_clip``."""
    if experience.base_action_log_probs is None:
        return experience.kl  # by the estimator k1, as preflight checks
    return experience.action_log_probs - experience.base_action_log_probs


def _responses(experiences: list[Experience]) -> list[bytes]:
    """The tokens of each response, to be compared."""
    return [
        tokens_S[1:][mask_A.bool()].numpy().tobytes()
        for experience in experiences
        for tokens_S, mask_A in zip(experience.sequences, experience.action_mask)
    ]

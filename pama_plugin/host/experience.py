"""K rewards per response in, one advantage per token out: the host's experience maker, run once per objective."""

import itertools
import math
from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.utils.logging_utils import init_logger
from torch import Tensor
from torch.nn.functional import pad

from pama_plugin.aggregation import Aggregation, aggregate
from pama_plugin.config import PamaConfig
from pama_plugin.errors import RewardError
from pama_plugin.host.critic import flatten_objectives
from pama_plugin.state import RunState

logger = init_logger(__name__)

# Estimators of the host that subtract something of the prompt's own group of responses.
GROUP_ESTIMATORS = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")


class MultiObjectiveExperienceMaker(RemoteExperienceMaker):
    """Adds the columns ``info["reward/<name>"]``, then aggregates what the host's own estimator makes of each.

    Everything else (forwards, KL, length penalties, baselines, whitening) is the host's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config: PamaConfig = self.args.pama
        self.state = RunState.start(self.config)
        self.warned: set[str] = set()

    @torch.no_grad()
    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        """Score every response with every objective: all reward groups at once, beside the host's forwards."""
        refs = self._dispatch_rewards(samples_list)
        for samples in samples_list:
            # Rewards that are there already keep the host from asking its one reward group. Nothing reads these.
            samples.rewards = torch.zeros(len(samples.sequences))
        experiences: list[Experience] = super().make_experience(samples_list)
        self._collect_rewards(refs, experiences)
        self._warn_of_clipping(experiences)
        for name, own in self.state.objectives.items():
            own.rewards.update(self._column(name, experiences))
        return experiences

    @torch.no_grad()
    def score(self, samples: list[Experience]) -> dict[str, Tensor]:
        """The rewards (B,) of every objective for B single samples that are not trained on, in their order."""
        size = self.args.rollout.micro_batch_size
        micro_batches = [
            Experience.concat_experiences(samples[start : start + size], self.tokenizer.pad_token_id)
            for start in range(0, len(samples), size)
        ]
        self._collect_rewards(self._dispatch_rewards(micro_batches), micro_batches)
        return {name: self._column(name, micro_batches) for name in self.config.names}

    def _dispatch_rewards(self, samples_list: list[Experience]) -> dict[str, list[Any]]:
        # Models that share a GPU run one after the other and free the cache in between, as the host's own do.
        shared_with_critic = self.args.train.colocate_critic_reward and self.args.algo.advantage.estimator == "gae"
        refs = {}
        for objective in self.config.of_kind("rm"):
            group = self.reward_model_group.groups[objective.name]
            # Copies of the last micro-batch fill up: with ZeRO-3 all ranks must be asked equally often, or they hang.
            ranks = len(group._actor_handlers) // group.duplicate_actors
            filled = samples_list + samples_list[-1:] * (-len(samples_list) % ranks)
            refs[objective.name] = self._dispatch_forward(
                group,
                self.args.train.colocate_all or shared_with_critic,
                sequences=[samples.sequences for samples in filled],
                attention_mask=[samples.attention_mask for samples in filled],
                pad_sequence=[True] * len(filled),
            )
        return refs

    def _collect_rewards(self, refs: dict[str, list[Any]], experiences: list[Experience]) -> None:
        copies = self.args.ds.ring_attn_size * self.args.ds.tensor_parallel_size
        for name, group_refs in refs.items():
            rewards = self._flatten_results(group_refs, copies)[: len(experiences)]
            for experience, rewards_B in zip(experiences, rewards, strict=True):
                experience.info[f"reward/{name}"] = rewards_B.float()
        for name, experience in itertools.product(self.config.names, experiences):
            self._check_rewards(name, experience)

    def _column(self, name: str, experiences: list[Experience]) -> Tensor:
        return torch.cat([experience.info[f"reward/{name}"] for experience in experiences])

    def _check_rewards(self, name: str, experience: Experience) -> None:
        rewards_B = experience.info.get(f"reward/{name}")
        missing_B = torch.ones(len(experience.sequences)) if rewards_B is None else ~rewards_B.isfinite()
        if missing_B.any():
            row = int(missing_B.nonzero()[0])
            found = "nothing" if rewards_B is None else rewards_B[row].item()
            tokens = experience.sequences[row][experience.attention_mask[row].bool()]
            raise RewardError(name, f"returned {found}", self.tokenizer.decode(tokens))

    def _warn_of_clipping(self, experiences: list[Experience]) -> None:
        """The host clamps every reward before its estimator, without a word: say so, once per objective."""
        low, high = self.args.reward.clip_range
        for name in self.config.names:
            rewards_B = self._column(name, experiences)
            clipped = int(((rewards_B < low) | (rewards_B > high)).sum())
            if clipped and name not in self.warned:
                self.warned.add(name)
                logger.warning(
                    f"objective {name!r}: {clipped} of {len(rewards_B)} rewards lie outside --reward.clip_range "
                    f"{low} {high} and are clipped by OpenRLHF; reward/{name} in the logs is the raw one"
                )

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """Run the host's estimator with each objective's rewards, and give the actor the aggregate of the K results.

        ``reward`` and ``return`` of ``info``, and ``rewards``, become sums of the objectives' own, times their weights:
        the host shows and logs them. With one objective of weight 1 and the rule ``linear`` every tensor is the stock
        one, bit for bit.
        """
        runs = [self._estimate(index, experiences) for index in range(len(self.config.names))]
        result = aggregate(
            self.config.loss,
            torch.stack([_join([experience.advantages for experience in run]) for run in runs]),
            _join([experience.action_mask for experience in experiences]),
            level=self.config.level,
            noon=self.config.noon,
            weights=self.config.weights,
            active=[self._tells_responses_apart(run) for run in runs],
        )
        metrics = self._name_metrics(result)
        if self.advantage_estimator == "gae":
            metrics |= {
                f"explained_variance/{name}": _explained_variance(run) for name, run in zip(self.config.names, runs)
            }

        sizes = [len(experience.sequences) for experience in experiences]
        for stock, advantages_BA, own in zip(experiences, result.advantages.split(sizes), zip(*runs)):
            combined = own[0]  # the first run's copy goes on, with the columns of all
            if self.advantage_estimator == "gae":
                combined.values, combined.returns = (
                    flatten_objectives(torch.stack([getattr(experience, field) for experience in own], -1))
                    for field in ("values", "returns")
                )
            valid_BA = combined.action_mask.bool()
            advantages_BA = advantages_BA[:, : valid_BA.shape[1]]
            combined.advantages = torch.where(valid_BA, advantages_BA, combined.advantages)  # padding stays the host's
            combined.rewards = self._weighted([experience.rewards for experience in own])
            for key in [key for key, value in combined.info.items() if value is not stock.info.get(key)]:
                combined.info[key] = self._weighted([experience.info[key] for experience in own])
            if len(own) > 1:  # a sum of standard deviations is not one
                combined.info.pop("group_reward_std", None)
            # One value per rollout batch, as a column like any other of ``info``; the trainer takes them out again.
            combined.info |= {key: torch.full((len(valid_BA),), value) for key, value in metrics.items()}
        return runs[0]

    def _tells_responses_apart(self, run: list[Experience]) -> bool:
        """Whether the rewards that the estimator sees differ where it compares them: in the batch, or a prompt's group.

        Where they do not, the advantages are 0 up to rounding, which whitening blows up to a signal.
        """
        order = torch.tensor(list(itertools.chain.from_iterable(experience.index for experience in run)))
        rewards_B = torch.empty(len(order))
        rewards_B[order] = torch.cat([experience.rewards for experience in run]).float()
        rewards_B.clamp_(*self.args.reward.clip_range)
        size = self.args.rollout.n_samples_per_prompt if self.advantage_estimator in GROUP_ESTIMATORS else len(order)
        groups_GB = rewards_B.reshape(-1, size)
        return bool((groups_GB.amin(1) < groups_GB.amax(1)).any())

    def _estimate(self, index: int, experiences: list[Experience]) -> list[Experience]:
        """What the host's estimator makes of one objective's rewards and values, in copies that share all the rest."""
        name = self.config.names[index]
        copies = []
        for experience in experiences:
            rewards_B = experience.info[f"reward/{name}"].clone()  # the host applies penalties to it in place
            values = experience.values
            own = {
                "rewards": rewards_B,
                "info": experience.info | {"reward": rewards_B},
                "values": values if values is None or values.dim() == 2 else values[..., index],
            }
            copies.append(Experience(**vars(experience) | own))
        estimated: list[Experience] = super().compute_advantages_and_returns(copies)
        return estimated

    def _weighted(self, tensors: list[Tensor]) -> Tensor:
        return sum(tensor * weight for tensor, weight in zip(tensors, self.config.weights))

    def _name_metrics(self, result: Aggregation) -> dict[str, float]:
        """``gain/1`` → ``pama/gain/<name of objective 1>``."""
        named = {f"pama/coefficient/{name}": float(c) for name, c in zip(self.config.names, result.coefficients)}
        for key, value in result.metrics.items():
            stem, _, index = key.partition("/")
            named[f"pama/{stem}/{self.config.names[int(index)]}" if index else f"pama/{key}"] = value
        return named


def _explained_variance(run: list[Experience]) -> float:
    """``1 − Var(R − V) / Var(R)`` over the response tokens of the rollout batch; NaN where the returns do not vary."""
    mask = torch.cat([experience.action_mask.flatten() for experience in run]).bool()
    returns, values = (
        torch.cat([getattr(experience, field).flatten() for experience in run])[mask].double()
        for field in ("returns", "values")
    )
    if returns.std() <= 1e-6 * returns.abs().max():  # rounding
        return math.nan
    return float(1 - (returns - values).var() / returns.var())


def _join(tensors: list[Tensor]) -> Tensor:
    """Micro-batches (B_i, A_i) → (ΣB_i, max A_i), padded on the right with 0."""
    length = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([pad(tensor, (0, length - tensor.shape[1])) for tensor in tensors])

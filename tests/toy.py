"""A tabular policy: 12 prompts with 12 answers each, tabular rewards, and the update of OpenRLHF.

Hundreds of steps with many seeds take seconds, and the policy can drift off a Pareto front.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pama_plugin import Aggregation, aggregate
from pama_plugin.aggregation import get_rule

PROMPTS, ANSWERS = 12, 12
GROUPS, SAMPLES = 16, 4  # per step: 16 prompts with four responses each
BETAS, EPS, MAX_NORM = (0.9, 0.95), 1e-8, 1.0  # OpenRLHF's defaults: --actor.adam.betas, .eps, --actor.max_norm

Rewards = Callable[[int, torch.Generator], Tensor]  # (objectives, generator) → (K, PROMPTS, ANSWERS)
Combine = Callable[[Tensor, Tensor, torch.Generator], Tensor]  # advantages (K, B), groups (B,) → (B,)


def independent(objectives: int, generator: torch.Generator) -> Tensor:
    """Independent rewards, of which all can rise."""
    return torch.randn(objectives, PROMPTS, ANSWERS, generator=generator, dtype=torch.float64)


def on_the_front(objectives: int, generator: torch.Generator) -> Tensor:
    """The rewards of every answer sum to 0, so no policy is better for all objectives. Two objectives are opposed."""
    tables = independent(objectives, generator)
    return tables - tables.mean(0)


@dataclass(frozen=True)
class Optimizer:
    """``adam`` or ``sgd`` as in OpenRLHF, and the coefficient of the KL loss (k2, to the initial policy)."""

    kind: str
    lr: float
    kl: float = 0.0


@dataclass(frozen=True)
class Walk:
    """A training run: mean rewards (steps + 1, S, K) of S seeds, and the rms (steps, S) of the combined advantages."""

    means: Tensor
    rms: Tensor

    @property
    def drifts_K(self) -> Tensor:
        """(K,) change of the mean reward since the first step, as root mean square over seeds."""
        return (self.means[-1] - self.means[0]).square().mean(0).sqrt()

    @property
    def drift(self) -> float:
        """Root mean square of ``drifts_K`` over the objectives."""
        return float(self.drifts_K.square().mean().sqrt())

    @property
    def rise(self) -> float:
        """Rise of the objective that rose least, as mean over seeds."""
        return float((self.means[-1] - self.means[0]).amin(-1).mean())


def train(
    rewards: Rewards, combine: Combine, optimizer: Optimizer, *, objectives: int, noise: float, steps: int, seeds: int
) -> Walk:
    """Train ``seeds`` policies from the uniform one; rewards have noise with the standard deviation ``noise``."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    tables_SKPV = torch.stack([rewards(objectives, generator) for generator in generators])
    shape = seeds, PROMPTS, ANSWERS
    logits_SPV, first_SPV, second_SPV = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    groups_B, rows = torch.arange(GROUPS).repeat_interleave(SAMPLES), torch.arange(seeds).unsqueeze(-1)
    means, sizes = [], []
    for step in range(steps + 1):
        policy_SPV = logits_SPV.softmax(-1)
        means.append((policy_SPV.unsqueeze(1) * tables_SKPV).sum(-1).mean(-1))
        if step == steps:
            break
        prompts, answers, combined = [], [], []
        for policy_PV, tables_KPV, generator in zip(policy_SPV, tables_SKPV, generators):
            prompts_B = torch.randint(PROMPTS, (GROUPS,), generator=generator).repeat_interleave(SAMPLES)
            answers_B = torch.multinomial(policy_PV[prompts_B], 1, generator=generator).squeeze(-1)
            rewards_KB = tables_KPV[:, prompts_B, answers_B]
            rewards_KB = rewards_KB + noise * torch.randn(rewards_KB.shape, generator=generator, dtype=torch.float64)
            prompts.append(prompts_B)
            answers.append(answers_B)
            combined.append(combine(whitened(rewards_KB), groups_B, generator))
        prompts_SB, answers_SB, combined_SB = torch.stack(prompts), torch.stack(answers), torch.stack(combined)
        sizes.append(combined_SB.square().mean(-1).sqrt())

        # ∇ of −mean(A · ratio) and of the KL loss ½ mean(log ratio to the initial policy)², at ratio 1. Both are a
        # number times ∇ log π = onehot − π.
        log_ratio_SB = policy_SPV[rows, prompts_SB, answers_SB].log() + torch.tensor(ANSWERS).log()
        weights_SB = (optimizer.kl * log_ratio_SB - combined_SB) / len(groups_B)
        onehot_SBV = torch.nn.functional.one_hot(answers_SB, ANSWERS)
        pieces_SBV = weights_SB.unsqueeze(-1) * (onehot_SBV - policy_SPV[rows, prompts_SB])
        gradient_SPV = torch.zeros(shape, dtype=torch.float64).index_put_(
            (rows, prompts_SB), pieces_SBV, accumulate=True
        )
        norms_S11 = gradient_SPV.flatten(1).norm(dim=1)[:, None, None]
        gradient_SPV *= (MAX_NORM / norms_S11.clamp(min=1e-12)).clamp(max=1)
        if optimizer.kind == "adam":
            first_SPV = torch.lerp(gradient_SPV, first_SPV, BETAS[0])
            second_SPV = torch.lerp(gradient_SPV.square(), second_SPV, BETAS[1])
            corrected = (second_SPV / (1 - BETAS[1] ** (step + 1))).sqrt() + EPS
            gradient_SPV = first_SPV / (1 - BETAS[0] ** (step + 1)) / corrected
        logits_SPV = logits_SPV - optimizer.lr * gradient_SPV
    return Walk(torch.stack(means), torch.stack(sizes))


def whitened(rewards_KB: Tensor) -> Tensor:
    """As ``reinforce_baseline`` of OpenRLHF: minus the mean of the group, then whitened over the batch."""
    centred_KGN = rewards_KB.unflatten(1, (GROUPS, SAMPLES))
    advantages_KB = (centred_KGN - centred_KGN.mean(-1, keepdim=True)).flatten(1)
    return advantages_KB / advantages_KB.std(1, keepdim=True).clamp(min=1e-8)


def by(rule: str, **options) -> Combine:
    """``aggregate``, once per response."""

    def combine(advantages_KB: Tensor, groups_B: Tensor, _: torch.Generator) -> Tensor:
        column = advantages_KB.unsqueeze(-1)
        named = {"rewards_KB": advantages_KB + 3} if "rewards_KB" in get_rule(rule).parameters else {}
        same = dict(groups_B=groups_B, **named, **options)
        result: Aggregation = aggregate(rule, column, torch.ones(len(groups_B), 1), **same)
        return result.advantages.squeeze(-1)

    return combine


def by_reward(rule: str, **options) -> Combine:
    """A rule that combines rewards, followed by the estimator."""

    def combine(advantages_KB: Tensor, groups_B: Tensor, _: torch.Generator) -> Tensor:
        result = aggregate(rule, advantages_KB.unsqueeze(-1), torch.ones(len(groups_B), 1), **options)
        return whitened(result.advantages.T).squeeze(0)

    return combine


def noise_like(combine: Combine) -> Combine:
    """Noise of the same size: the result with random signs."""

    def drawn(advantages_KB: Tensor, groups_B: Tensor, generator: torch.Generator) -> Tensor:
        signs_B = torch.randint(2, groups_B.shape, generator=generator) * 2 - 1
        return combine(advantages_KB, groups_B, generator) * signs_B

    return drawn


def to_unit_rms(combine: Combine) -> Combine:
    """Divide the result by its root mean square: a former default of ``pama``."""

    def rescaled(advantages_KB: Tensor, groups_B: Tensor, generator: torch.Generator) -> Tensor:
        combined_B = combine(advantages_KB, groups_B, generator)
        return combined_B / combined_B.square().mean().sqrt().clamp(min=1e-6)

    return rescaled

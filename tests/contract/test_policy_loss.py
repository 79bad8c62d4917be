"""The effect of OpenRLHF's policy-loss flags on our combined advantages, in OpenRLHF's own training step.

The policy's log-probabilities are free numbers here, so that the loss and its gradient can be read per token. Each flag
is compared with the same step without it.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hosttools import host_args, make_rollout
from torch import Tensor

from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract

OBJECTIVES = ("a=builtin:length,weight=2", "b=builtin:length")
BETA = 0.1  # of the KL loss
LOW, HIGH = 0.5, 5.0  # the host's default band of the importance weight


class Step(NamedTuple):
    """Inputs and results of one training step; every tensor is (B, A)."""

    log_probs: Tensor
    old: Tensor
    rollout: Tensor
    reference: Tensor
    advantages: Tensor
    mask: Tensor
    gradient: Tensor
    metrics: dict[str, float]

    @property
    def ratio(self) -> Tensor:
        return (self.log_probs - self.old).exp()

    @property
    def weight(self) -> Tensor:
        """Importance weight of the policy relative to the policy that vLLM sampled from."""
        return (self.old - self.rollout).exp()


@pytest.fixture
def step(groups, monkeypatch):
    """``step(flags)``: one step of OpenRLHF's trainer on the same rollout, with our combined advantages."""
    from openrlhf.trainer.ray import ppo_actor

    from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker

    # Waits for the other ranks; there are none.
    monkeypatch.setattr(ppo_actor, "torch_dist_barrier_and_cuda_sync", lambda: None)

    def make(*flags: str) -> Step:
        common = "--algo.advantage.estimator reinforce_baseline --rollout.n_samples_per_prompt 4"
        common += f" --rollout.micro_batch_size 8 --algo.kl.init_coef {BETA} --actor.eps_clip_low_high 0.2 0.2"
        args = host_args(*common.split(), *flags)
        args.pama = load_config("pama", OBJECTIVES, None, None, None, default_level="token")
        strategy = SimpleNamespace(args=args, ring_attn_group=None, get_grad_norm=lambda model: 0.0)
        draw = torch.Generator().manual_seed(0)
        rollout = make_rollout(8, names=("a", "b"))
        for sample in rollout:
            sample.rollout_log_probs = torch.randn(sample.action_mask.shape, generator=draw)
        (experience,) = MultiObjectiveExperienceMaker(
            groups["actor"],
            None,
            SimpleNamespace(groups={}),
            groups["reference"] if args.algo.kl.init_coef > 0 else None,
            SimpleNamespace(value=args.algo.kl.init_coef),
            strategy,
            SimpleNamespace(pad_token_id=0, decode=lambda tokens, **_: str(tokens)),
        ).make_experience_batch(rollout)

        old = experience.action_log_probs
        log_probs = (old + 1.5 * torch.randn(old.shape, generator=draw)).requires_grad_()
        strategy.backward = lambda loss, *_: loss.backward()
        strategy.optimizer_step = lambda *_, **__: None
        scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
        trainer = ppo_actor.ActorPPOTrainer(strategy, Policy(log_probs), None, None, scheduler)
        metrics = trainer.training_step(experience, BETA, 0)["metrics"]
        return Step(
            log_probs.detach(),
            old,
            experience.rollout_log_probs,
            experience.base_action_log_probs,
            experience.advantages,
            experience.action_mask.bool(),
            log_probs.grad,
            {key: float(value.float().mean()) for key, value in metrics.items() if isinstance(value, Tensor)},
        )

    return make


class Policy:
    """A policy with fixed log-probabilities."""

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs

    def train(self) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return self.log_probs, None


def mean(values: Tensor, mask: Tensor) -> float:
    """Over the tokens of all responses, as the host's ``token-mean``."""
    return float((values * mask).sum() / mask.sum())


def test_dual_clip_bounds_the_loss_and_stops_the_gradient(step) -> None:
    """For tokens with a negative advantage whose probability has risen to more than 3 times."""
    plain, clipped = step(), step("--actor.dual_clip", "3")
    bounded = (plain.advantages < 0) & (plain.ratio > 3) & plain.mask
    others = (plain.advantages >= 0) & (plain.ratio > 3) & plain.mask
    assert bounded.sum() > 2 and others.sum() > 2, "the rollout has none of what the flag is for"

    excess = (plain.ratio - 3) * plain.advantages.abs() * bounded
    assert plain.metrics["policy_loss"] - clipped.metrics["policy_loss"] == pytest.approx(mean(excess, plain.mask))
    assert (plain.gradient[bounded] > 0).all() and (clipped.gradient[bounded] == 0).all()
    assert torch.equal(plain.gradient[~bounded], clipped.gradient[~bounded])


@pytest.mark.parametrize(("level", "mode"), [("token", "clip"), ("token", "mask"), ("seq", "mask")])
def test_importance_sampling_correction_weighs_every_token(level, mode, step) -> None:
    flags = ("--algo.advantage.is_correction_level", level, "--algo.advantage.is_correction_mode", mode)
    plain, corrected = step(), step(*flags)
    mask, weight = plain.mask, plain.weight
    assert "vllm_kl" not in plain.metrics
    assert corrected.metrics["vllm_kl"] == pytest.approx(mean(plain.rollout - plain.old, mask), rel=1e-4)

    judged = weight
    if level == "seq":  # the geometric mean of a response decides for all its tokens
        judged = ((weight.log() * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)).exp()
    outside = (judged < LOW) | (judged > HIGH)
    share = outside.float().mean().item() if level == "seq" else mean(outside.float(), mask)
    assert 0 < share < 1 and corrected.metrics["is_filter_ratio"] == pytest.approx(share)
    expected = weight.clamp(LOW, HIGH) if mode == "clip" else weight * ~outside
    assert (plain.gradient[mask] != 0).any()
    torch.testing.assert_close(corrected.gradient[mask], (plain.gradient * expected)[mask])


def test_gspo_has_one_ratio_for_a_response_and_weighs_responses_alike(step) -> None:
    found = step("--actor.policy_loss_type", "gspo")
    mask, lengths = found.mask, found.mask.sum(-1, keepdim=True)
    ratio_B1 = (((found.log_probs - found.old) * mask).sum(-1, keepdim=True) / lengths).exp()
    clipped = ratio_B1.clamp(0.8, 1.2)
    losses = -torch.min(ratio_B1 * found.advantages, clipped * found.advantages) * mask / lengths
    assert found.metrics["policy_loss"] == pytest.approx(float(losses.sum() / len(mask)), rel=1e-4)
    assert found.metrics["policy_loss"] != pytest.approx(step().metrics["policy_loss"], rel=0.01)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_kl_loss_is_added_to_the_policy_loss(kind, step) -> None:
    """So is its gradient, the derivative of the estimator with respect to the log-probability."""
    flags = ("--algo.kl.use_loss", "--algo.kl.estimator", kind)
    plain, found = step(*flags, "--algo.kl.init_coef", "0"), step(*flags)
    mask, behind = found.mask, found.log_probs - found.reference
    value, derivative = {
        "k1": (behind, torch.ones_like(behind)),
        "k2": (behind.square() / 2, behind),
        "k3": ((-behind).exp() - 1 + behind, 1 - (-behind).exp()),
    }[kind]
    within = value.abs() < 10  # beyond, the host cuts off the value and with it the gradient
    assert torch.equal(plain.advantages, found.advantages), "the KL is no part of the reward then"
    assert found.metrics["kl"] == pytest.approx(mean(value.clamp(-10, 10), mask), rel=1e-4)
    added = (found.gradient - plain.gradient)[mask]
    torch.testing.assert_close(added, (BETA * derivative * within / mask.sum())[mask], rtol=1e-3, atol=1e-6)

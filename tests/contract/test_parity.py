"""With one objective of weight 1 and the rule ``linear``, every tensor is the stock experience maker's, bit for bit.

Both makers run whole, ``make_experience_batch``, on real Ray with the host's own ``RayActorGroup`` and
``execute_batch``; only the models' ``forward`` is replaced, by a fixed function of the tokens.
"""

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hosttools import host_args, make_rollout

from pama_plugin.config import load_config

pytestmark = [pytest.mark.parity, pytest.mark.contract]

ESTIMATORS = ["gae", "reinforce", "flash_reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo"]
NEEDS_GROUPS = {"rloo", "reinforce_baseline", "group_norm", "dr_grpo"}
SETTINGS = {
    "plain": ["--algo.kl.init_coef", "0"],
    "KL in the reward": ["--algo.kl.init_coef", "0.1"],
    "KL as a loss": ["--algo.kl.init_coef", "0.1", "--algo.kl.use_loss", "--algo.kl.estimator", "k3"],
    "length penalties": ["--algo.kl.init_coef", "0.1", "--rollout.max_new_tokens", "8"]
    + ["--reward.overlong_buffer_len", "4", "--reward.stop_properly_penalty_coef", "0.5"],
    "discount": ["--algo.advantage.gamma", "0.9", "--algo.advantage.lambd", "0.8", "--algo.advantage.no_std_norm"],
}


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[str, Any]]:
    """Actor, critic, reference and reward group of the host, whose models are functions of the tokens."""
    import ray
    from openrlhf.trainer.ray.launcher import BaseModelActor, RayActorGroup

    class Fixed(BaseModelActor):
        strategy = SimpleNamespace(is_rank_0=lambda: False)

    def noise(sequences: torch.Tensor, seed: int) -> torch.Tensor:
        return torch.sin(sequences.double() * (seed + 1.7)).float()

    def model(seed: int) -> Any:
        class PerToken(Fixed):
            def forward(self, sequences, action_mask, attention_mask, mm_train_inputs_list=None):
                return noise(sequences, seed)[:, 1:] * action_mask

        return ray.remote(PerToken)

    class Reward(Fixed):
        def forward(self, sequences, attention_mask, pad_sequence):
            return noise(sequences * attention_mask, 9).sum(-1)

    ray.init(num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=tempfile.mkdtemp(prefix="r"))
    try:
        # one GPU a group is what the host asks for; here it is a number that Ray counts
        kinds = {"actor": model(0), "critic": model(1), "reference": model(2), "reward": ray.remote(Reward)}
        yield {name: RayActorGroup(1, 1, kind, num_gpus_per_actor=0.5) for name, kind in kinds.items()}
    finally:
        ray.shutdown()


def build(maker: type, args: SimpleNamespace, groups: dict[str, Any], reward_group: Any) -> Any:
    return maker(
        groups["actor"],
        groups["critic"] if args.algo.advantage.estimator == "gae" else None,
        reward_group,
        groups["reference"] if args.algo.kl.init_coef > 0 else None,
        SimpleNamespace(value=args.algo.kl.init_coef),
        SimpleNamespace(args=args),
        SimpleNamespace(pad_token_id=0),
    )


@pytest.mark.parametrize("n_samples", [1, 4])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_objective_is_the_stock_run(estimator, setting, n_samples, groups) -> None:
    if n_samples == 1 and estimator in NEEDS_GROUPS:
        return  # the host refuses it
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    from pama_plugin.host.experience import MultiObjectiveExperienceMaker

    flags = ["--algo.advantage.estimator", estimator, "--rollout.n_samples_per_prompt", str(n_samples)]
    args = host_args(*flags, *SETTINGS[setting], "--rollout.micro_batch_size", "3")
    stock = build(RemoteExperienceMaker, copy.deepcopy(args), groups, groups["reward"])
    args.pama = load_config("linear", ["helpful=rm:org/model"], None, None, None, default_level="token")
    ours = build(MultiObjectiveExperienceMaker, args, groups, SimpleNamespace(groups={"helpful": groups["reward"]}))

    expected = stock.make_experience_batch(make_rollout(8))
    found = ours.make_experience_batch(make_rollout(8))

    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected):
        for field in fields(one):
            compare(getattr(one, field.name), getattr(other, field.name), field.name)


def compare(found: Any, expected: Any, name: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), f"{name}: {found} is not {expected}"
    elif isinstance(expected, dict):
        for key, value in expected.items():
            compare(found[key], value, f"{name}[{key}]")
        assert all(key.startswith(("pama/", "reward/")) for key in set(found) - set(expected))
    else:
        assert found == expected, name

"""With one objective of weight 1 and the rule ``linear``, every tensor is the stock experience maker's, bit for bit.

Both makers run whole, ``make_experience_batch``, on real Ray with the host's own ``RayActorGroup`` and
``execute_batch``; only the models' ``forward`` is replaced, by a fixed function of the tokens.
"""

import copy
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hosttools import as_reward_groups, host_args, make_rollout

from pama_plugin.settings.load import load_config

pytestmark = [pytest.mark.parity, pytest.mark.contract]

# The host refuses the last four with one sample per prompt: their baseline is the prompt's group.
CASES = [(estimator, n) for estimator in ("gae", "reinforce", "flash_reinforce") for n in (1, 4)]
CASES += [(estimator, 4) for estimator in ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")]
SETTINGS = {
    "plain": ["--algo.kl.init_coef", "0"],
    "KL in the reward": ["--algo.kl.init_coef", "0.1"],
    **{
        f"KL as a loss, {kind}": ["--algo.kl.init_coef", "0.1", "--algo.kl.use_loss", "--algo.kl.estimator", kind]
        for kind in ("k1", "k2", "k3")
    },
    "length penalties": ["--algo.kl.init_coef", "0.1", "--rollout.max_new_tokens", "8"]
    + ["--reward.overlong_buffer_len", "4", "--reward.stop_properly_penalty_coef", "0.5"],
    "discount": ["--algo.advantage.gamma", "0.9", "--algo.advantage.lambd", "0.8", "--algo.advantage.no_std_norm"],
}


def build(maker: type, args: SimpleNamespace, groups: dict[str, Any], reward_group: Any) -> Any:
    return maker(
        groups["actor"],
        groups["critic"] if args.algo.advantage.estimator == "gae" else None,
        reward_group,
        groups["reference"] if args.algo.kl.init_coef > 0 else None,
        SimpleNamespace(value=args.algo.kl.init_coef),
        SimpleNamespace(args=args),
        SimpleNamespace(pad_token_id=0, decode=lambda tokens, **_: str(tokens)),
    )


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("estimator", "n_samples"), CASES)
def test_one_objective_is_the_stock_run(estimator, n_samples, setting, groups) -> None:
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker

    flags = ["--algo.advantage.estimator", estimator, "--rollout.n_samples_per_prompt", str(n_samples)]
    args = host_args(*flags, *SETTINGS[setting], "--rollout.micro_batch_size", "3")
    stock = build(RemoteExperienceMaker, copy.deepcopy(args), groups, groups["helpful"])
    args.pama = load_config("linear", ["helpful=rm:org/model"], None, None, None, default_level="token")
    ours = build(MultiObjectiveExperienceMaker, args, groups, as_reward_groups(args.pama, groups))

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
        assert all(
            key.startswith(("pama/", "reward/", "explained_variance/", "seconds/"))
            for key in set(found) - set(expected)
        )
    else:
        assert found == expected, name

"""K objectives through the whole experience maker: what reaches the actor, what is logged, and what stops the run."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hosttools import as_reward_groups, give_value_heads, host_args, make_rollout

from pama_plugin import aggregate, available_rules
from pama_plugin.batch.keys import SAMPLED
from pama_plugin.batch.state import RunState
from pama_plugin.errors import PamaError, RewardError
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract

MODELS = ("helpful", "harmless")
OBJECTIVES = ("helpful=rm:org/a,weight=2", "harmless=rm:org/b", "length=builtin:length")
WEIGHTS = {"helpful": 2.0, "harmless": 1.0, "length": 1.0}
COLUMNS = ("length",)


def build(groups: dict[str, Any], *flags: str, objectives=OBJECTIVES, loss="pama", level=None, models=MODELS) -> Any:
    from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker

    args = host_args("--algo.advantage.estimator", "reinforce_baseline", "--rollout.n_samples_per_prompt", "4", *flags)
    args.pama = load_config(loss, objectives, None, level, None, default_level="token")
    return MultiObjectiveExperienceMaker(
        groups["actor"],
        None,
        as_reward_groups(args.pama, groups),
        groups["reference"] if args.algo.kl.init_coef > 0 else None,
        SimpleNamespace(value=args.algo.kl.init_coef),
        SimpleNamespace(args=args),
        SimpleNamespace(pad_token_id=0, decode=lambda tokens, **_: f"tokens {list(map(int, tokens))}"),
    )


@pytest.mark.parametrize("loss", ["pama", "linear"])
def test_the_aggregate_of_k_stock_runs_reaches_the_actor(loss, groups) -> None:
    flags = ["--rollout.micro_batch_size", "3", "--reward.overlong_buffer_len", "4", "--rollout.max_new_tokens", "8"]
    found = build(groups, *flags, loss=loss).make_experience_batch(make_rollout(8, names=COLUMNS))

    # By hand: each objective alone, with weight 1, is the stock run, as the parity tests show.
    alone = {}
    for objective in OBJECTIVES:
        name, _, spec = objective.partition("=")
        alone_only = [f"{name}={spec.partition(',')[0]}"]
        single = build(groups, *flags, objectives=alone_only, loss="linear", models=[m for m in MODELS if m == name])
        alone[name] = single.make_experience_batch(make_rollout(8, names=COLUMNS))
    for index, experience in enumerate(found):
        own = {name: run[index].info for name, run in alone.items()}
        for name in alone:
            assert torch.equal(experience.info[f"reward/{name}"], own[name][f"reward/{name}"])
        for key in ("reward", "return"):
            torch.testing.assert_close(experience.info[key], sum(WEIGHTS[name] * own[name][key] for name in own))
        assert experience.kl is None and experience.advantages.shape == experience.action_mask.shape

    lengths = [experience.action_mask.shape[1] for experience in found]
    width = max(lengths)

    def whole(experiences: list[Any], field: str) -> torch.Tensor:
        rows = [getattr(experience, field) for experience in experiences]
        return torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows])

    stacked = torch.stack([whole(run, "advantages") for run in alone.values()])
    mask = whole(found, "action_mask").bool()
    expected = aggregate(loss, stacked, mask, weights=list(WEIGHTS.values()))
    torch.testing.assert_close(whole(found, "advantages")[mask], expected.advantages[mask])
    for name, share in zip(WEIGHTS, expected.coefficients):
        for experience in found:
            column = experience.info[f"pama/coefficient/{name}"]
            torch.testing.assert_close(column, share.expand(len(experience.sequences)))


def test_a_rule_of_rewards_gets_what_it_asks_for(groups, monkeypatch) -> None:
    """The groups in training as in the rehearsal at start."""
    from pama_plugin import Combination, register_rule
    from pama_plugin.aggregation import registry
    from pama_plugin.aggregation.weights import shares

    monkeypatch.setattr(registry.RULES, "entries", dict(registry.RULES.entries))
    seen = []

    @register_rule("grouped", of="rewards")
    def grouped(rewards_KB1, mask_B1, weights_KB, active_K, present_KB, *, groups_B):
        seen.append(groups_B.tolist())
        return Combination(rewards_KB1.sum(0), shares(weights_KB))

    build(groups, loss="grouped").make_experience_batch(make_rollout(8, names=COLUMNS))
    *at_start, in_training = seen
    assert in_training == [0, 0, 0, 0, 1, 1, 1, 1] and all(groups_B == [0, 0] for groups_B in at_start)


PAIRS = ("helpful/harmless", "helpful/length", "harmless/length")


def test_the_metric_keys_are_frozen(groups) -> None:
    (experience,) = build(groups, "--rollout.micro_batch_size", "8").make_experience_batch(
        make_rollout(8, names=COLUMNS)
    )
    ours = {key for key in experience.info if "/" in key}
    per_objective = {
        f"{stem}/{n}"
        for n in ("helpful", "harmless", "length")
        for stem in (
            "reward",
            "pama/coefficient",
            "pama/failures",
            "pama/gain",
            "pama/inactive",
            "pama/spread",
            "pama/at_best",
        )
    }
    of_models = {f"seconds/{name}" for name in MODELS}  # the rollout sends those of the others
    assert ours == per_objective | of_models | {
        *("pama/active_fraction", "pama/conflict_rate", "pama/rms", "pama/effective_objectives", "pama/scale"),
        *("pama/kl_response", "pama/reference_nll", "pama/uniform_prompts"),
        *(f"pama/group_correlation/{pair}" for pair in PAIRS),
    }
    assert all(len(experience.info[key]) == 8 for key in ours)


@pytest.mark.parametrize("level", ["token", "sequence", "batch"])
def test_the_split_into_micro_batches_does_not_matter(level, groups) -> None:
    runs = {}
    for size in ("1", "3", "8"):
        maker = build(groups, "--rollout.micro_batch_size", size, level=level)
        rows = []
        for experience in maker.make_experience_batch(make_rollout(8, names=COLUMNS)):
            rows += [row[mask.bool()] for row, mask in zip(experience.advantages, experience.action_mask)]
        runs[size] = torch.cat(rows)
    torch.testing.assert_close(runs["1"], runs["8"])
    torch.testing.assert_close(runs["3"], runs["8"])


@pytest.mark.parametrize("n_samples", ["4", "5", "8"])
@pytest.mark.parametrize("estimator", ["reinforce_baseline", "group_norm", "rloo", "dr_grpo"])
def test_a_reward_that_compares_no_responses_does_not_veto(estimator, n_samples, groups) -> None:
    """The mean of eight 0.7s is not 0.7: the host's whitening makes a signal of the rounding error.

    So it does where the reward depends on the prompt alone.
    """
    flags = ("--algo.advantage.estimator", estimator, "--rollout.n_samples_per_prompt", n_samples)
    flags += ("--rollout.micro_batch_size", "100", "--algo.kl.init_coef", "0.1")
    size = 4 * int(n_samples)
    without = build(groups, *flags, objectives=OBJECTIVES[:2]).make_experience_batch(make_rollout(size, names=COLUMNS))
    for rewards in (torch.full((size,), 0.7), torch.tensor([0.1, 0.7, 0.3, 1.1]).repeat_interleave(int(n_samples))):
        rollout = make_rollout(size, names=COLUMNS)
        for sample, reward in zip(rollout, rewards):
            sample.info["reward/length"] = reward.reshape(1)
        (found,) = build(groups, *flags).make_experience_batch(rollout)
        assert found.info["pama/inactive/length"].unique() == 1
        torch.testing.assert_close(found.advantages, without[0].advantages)
        assert (found.advantages != 0).any()


@pytest.mark.parametrize("loss", ["pama", "linear"])
def test_the_critic_learns_the_value_of_the_reward_whatever_its_weight(loss, groups) -> None:
    """Returns times a weight would teach the critic another reward than the one its values are subtracted from."""
    flags = (
        "--algo.advantage.estimator",
        "gae",
        "--rollout.n_samples_per_prompt",
        "1",
        "--rollout.micro_batch_size",
        "8",
    )
    runs = {}
    for weight in ("1", "2"):
        objectives = [f"helpful=rm:org/a,weight={weight}"]
        maker = build(groups, *flags, objectives=objectives, loss=loss, models=("helpful",))
        maker.critic_model_group = groups["critic"]
        (runs[weight],) = maker.make_experience_batch(make_rollout(8))
    assert torch.equal(runs["1"].returns, runs["2"].returns) and (runs["1"].returns != 0).any()


@pytest.mark.property
def test_with_whitening_the_scale_of_a_reward_does_not_matter(groups) -> None:
    flags = ("--rollout.micro_batch_size", "8", "--algo.kl.init_coef", "0")
    (plain,) = build(groups, *flags).make_experience_batch(make_rollout(8, names=COLUMNS))
    scaled = make_rollout(8, names=COLUMNS)
    for sample in scaled:
        sample.info["reward/length"] = 3 * sample.info["reward/length"] - 1.5
    (other,) = build(groups, *flags).make_experience_batch(scaled)
    torch.testing.assert_close(plain.advantages, other.advantages, atol=1e-4, rtol=1e-4)


RANKS = {
    "two data-parallel ranks": (1, ()),
    "one ring of two ranks": (2, ("--ds.ring_attn_size", "2")),
    "one tensor-parallel group of two ranks": (2, ("--ds.tensor_parallel_size", "2")),
}


@pytest.mark.e2e  # four more processes that import the host: most of a minute
@pytest.mark.parametrize("level", ["token", "sequence", "batch"])
@pytest.mark.parametrize("ranks", RANKS)
def test_several_ranks_give_what_one_gives(ranks, level, groups, pairs) -> None:
    """Rewards come back in order from two ranks, and once from two ranks that hold the same sequences."""
    copies, own = RANKS[ranks]
    flags = ("--rollout.micro_batch_size", "2", "--algo.kl.init_coef", "0")
    settings = dict(objectives=(OBJECTIVES[0], OBJECTIVES[2]), models=("helpful",), level=level)
    single = build(groups, *flags, **settings).make_experience_batch(make_rollout(8, names=COLUMNS))
    for group in pairs.values():
        group.duplicate_actors = copies
    several = build(pairs, *flags, *own, **settings)
    for one, other in zip(single, several.make_experience_batch(make_rollout(8, names=COLUMNS)), strict=True):
        assert torch.equal(one.advantages, other.advantages)
        assert torch.equal(one.info["reward/helpful"], other.info["reward/helpful"])


@pytest.mark.parametrize("level", ["token", "sequence", "batch"])
def test_dynamic_batches_give_what_fixed_ones_give(level, groups) -> None:
    """Responses are regrouped by length for the forwards, and again for the ranks of the actor."""
    from openrlhf.trainer.ppo_utils.experience import balance_experiences, split_experience_batch

    flags = ("--rollout.micro_batch_size", "2", "--algo.kl.init_coef", "0.1", "--actor.num_gpus_per_node", "2")
    dynamic = ("--train.dynamic_batch_enable", "--rollout.max_tokens_per_gpu", "24")
    found = {}
    for name, own in {"fixed": (), "dynamic": dynamic}.items():
        maker = build(groups, *flags, *own, level=level)
        experiences = maker.make_experience_batch(make_rollout(8, names=COLUMNS))
        if own:
            assert [index for experience in experiences for index in experience.index] != list(range(8))
            experiences = balance_experiences(experiences, maker.args)
        rows = [row for experience in experiences for row in split_experience_batch(experience)]
        found[name] = {row.prompts[0]: row.advantages[row.action_mask.bool()] for row in rows}
    assert found["fixed"].keys() == found["dynamic"].keys() and len(found["fixed"]) == 8
    for prompt, advantages in found["fixed"].items():
        torch.testing.assert_close(found["dynamic"][prompt], advantages)


@pytest.mark.parametrize("reference_clip", [None, 0.2])
def test_the_recipe_of_the_papers_code_base(reference_clip, groups) -> None:
    """KL in every reward, GAE, advantages whitened over the batch before Noon, the smallest of them: by loops."""
    gamma, lambd, coefficient = 1.0, 0.95, 0.2
    flags = ("--algo.advantage.estimator", "gae", "--algo.advantage.gamma", "1", "--algo.advantage.lambd", "0.95")
    flags += ("--algo.kl.init_coef", "0.2", "--algo.kl.target", "3", "--algo.kl.estimator", "k1")
    flags += ("--rollout.n_samples_per_prompt", "1", "--rollout.micro_batch_size", "8")
    maker = build(groups, *flags, objectives=("helpful=rm:org/a", "harmless=rm:org/b"), models=MODELS)
    options = {} if reference_clip is None else {"reference_clip": reference_clip}
    settings = {"level": "token", "noon": True, "rescale": "none", "options": options}
    maker.config = maker.config.model_copy(update=settings)
    give_value_heads(maker, groups["critic"], MODELS)
    assert maker.kl_ctl.value == coefficient
    (found,) = maker.make_experience_batch(make_rollout(8))

    heads = found.values.unflatten(1, (found.action_mask.shape[1], 2))
    whitened = []
    for head, name in enumerate(MODELS):
        raw = {}
        for row, mask in enumerate(found.action_mask.tolist()):
            tokens = [token for token, ours in enumerate(mask) if ours]
            kl = (found.action_log_probs - base_log_probs(groups, found))[row]
            advantage, following = 0.0, 0.0
            for token in reversed(tokens):
                reward = -coefficient * float(kl[token])
                if token == tokens[-1]:
                    reward += min(max(float(found.info[f"reward/{name}"][row]), -10.0), 10.0)
                value = float(heads[row, token, head])
                advantage = reward + gamma * following - value + gamma * lambd * advantage
                raw[row, token], following = advantage, value
        mean = sum(raw.values()) / len(raw)
        std = math.sqrt(sum((each - mean) ** 2 for each in raw.values()) / len(raw))
        whitened.append({place: (each - mean) / std for place, each in raw.items()})
    ratios = (found.action_log_probs - base_log_probs(groups, found)).exp()
    muted = 0
    for row, token in whitened[0]:
        expected = min(max(own[row, token], 0.0) for own in whitened)
        if reference_clip is not None and float(ratios[row, token]) > 1 + reference_clip:
            muted += expected > 0
            expected = 0.0
        assert float(found.advantages[row, token]) == pytest.approx(expected, abs=1e-4), (row, token)
    assert (muted > 0) == (reference_clip is not None)


def base_log_probs(groups: dict[str, Any], experience: Any) -> torch.Tensor:
    """What the reference gives for the tokens of the experience."""
    import ray

    columns = (experience.sequences, experience.action_mask, experience.attention_mask)
    return ray.get(groups["reference"]._actor_handlers[0].forward.remote(*columns))


def test_with_value_heads_each_objective_is_the_stock_run_with_its_own_values(groups) -> None:
    """values (B, A, 2) in, advantages (B, A) and returns (B, A·2) out; each column what the objective alone gets."""
    flags = ("--algo.advantage.estimator", "gae", "--rollout.n_samples_per_prompt", "1")
    flags += ("--rollout.micro_batch_size", "3", "--algo.kl.init_coef", "0.1")

    def make(objectives, models, loss="pama"):
        maker = build(groups, *flags, objectives=objectives, models=models, loss=loss)
        give_value_heads(maker, groups["critic"], models)
        return maker.make_experience_batch(make_rollout(8))

    both = make(OBJECTIVES[:2], MODELS)
    alone = [make([text.partition(",")[0]], [name], "linear") for text, name in zip(OBJECTIVES, MODELS)]
    for together, *own in zip(both, *alone):
        A = together.action_mask.shape[1]
        assert together.advantages.shape == together.action_mask.shape
        for field in ("values", "returns"):
            expected = torch.stack([getattr(experience, field) for experience in own], -1)
            assert torch.equal(getattr(together, field).unflatten(1, (A, 2)), expected)
        for name, experience in zip(MODELS, own):
            key = f"explained_variance/{name}"
            torch.testing.assert_close(together.info[key], experience.info[key])


def test_rewards_that_the_host_clips_are_pointed_out_once(groups) -> None:
    rollout = make_rollout(8, names=COLUMNS)
    rollout[3].info["reward/length"] = torch.tensor([22.0])
    maker = build(groups, "--rollout.micro_batch_size", "8")
    maker.make_experience_batch(rollout)
    assert maker.warned == {"objective 'length'"}


ESTIMATORS = ("reinforce", "reinforce_baseline", "rloo", "group_norm", "dr_grpo", "flash_reinforce")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_clip_range_is_of_what_the_host_clips(estimator, groups) -> None:
    """Rewards that differ only outside of it are a constant to an estimator without a baseline, and to no other one."""
    if estimator not in host_estimators():
        pytest.skip("a later release has it")
    flags = ("--rollout.micro_batch_size", "8", "--algo.advantage.estimator", estimator, "--algo.kl.init_coef", "0")
    found = []
    for offset in (0.0, 11.0):
        rollout = make_rollout(8, names=COLUMNS)
        for index, sample in enumerate(rollout):
            sample.info["reward/length"] = torch.tensor([offset + index])
        maker = build(groups, *flags, objectives=("length=builtin:length", "helpful=rm:org/a"), models=MODELS[:1])
        (experience,) = maker.make_experience_batch(rollout)
        found.append((experience, maker))
    (inside, _), (outside, maker) = found
    clips = estimator == "reinforce"
    assert outside.info["pama/inactive/length"].unique() == clips
    assert maker.warned == ({"objective 'length'"} if clips else set())
    if not clips:
        torch.testing.assert_close(inside.advantages, outside.advantages, rtol=1e-4, atol=1e-4)


def host_estimators() -> str:
    from importlib.util import find_spec
    from pathlib import Path

    return (Path(find_spec("openrlhf").origin).parent / "trainer/ppo_utils/experience_maker.py").read_text()


def test_a_combined_reward_that_the_host_clips_is_pointed_out(groups) -> None:
    flags = ("--algo.advantage.estimator", "reinforce", "--rollout.micro_batch_size", "8")
    rollout = make_rollout(8, names=("a", "b"))
    for sample in rollout:
        sample.info |= {name: sample.info[name] + 8 for name in ("reward/a", "reward/b")}
    objectives = ("a=builtin:length", "b=builtin:length")
    maker = build(groups, *flags, objectives=objectives, loss="morlhf", models=())
    maker.make_experience_batch(rollout)
    assert maker.warned == {"the combined reward of --loss morlhf"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_reward_that_is_missing_or_not_finite_stops_the_run(bad, groups) -> None:
    rollout = make_rollout(8, names=COLUMNS)
    if bad is None:
        for sample in rollout:
            del sample.info["reward/length"]
    else:
        rollout[5].info["reward/length"] = torch.tensor([bad])
    with pytest.raises(RewardError, match="objective 'length': returned") as error:
        build(groups, "--rollout.micro_batch_size", "8").make_experience_batch(rollout)
    row = rollout[0 if bad is None else 5]
    assert error.value.response == f"tokens {row.sequences[0].tolist()}"
    assert "objective 'length' at step 4: returned" in str(error.value.at_step(4))


BUILTINS = ("a", "b", "c")
BUILTIN_OBJECTIVES = tuple(f"{name}=builtin:length" for name in BUILTINS)
CONSTRAINT = "c=builtin:length,role=constraint,threshold=0.5"


def rows(experiences: list[Any]) -> torch.Tensor:
    """The advantages of all response tokens, in order."""
    return torch.cat([own.advantages[own.action_mask.bool()] for own in experiences])


def objectives_for(loss: str) -> tuple[str, ...]:
    return (*BUILTIN_OBJECTIVES[:2], CONSTRAINT if loss == "lagrangian" else BUILTIN_OBJECTIVES[2])


@pytest.mark.parametrize("loss", available_rules())
def test_every_rule_makes_the_same_of_a_rollout_however_it_is_split(loss, groups) -> None:
    """Bit for bit, with an estimator that is so itself; others of the host whiten padded micro-batches."""
    flags = ("--algo.advantage.estimator", "rloo", "--algo.kl.init_coef", "0")
    found = {}
    for size in ("3", "16"):
        maker = build(
            groups, *flags, "--rollout.micro_batch_size", size, objectives=objectives_for(loss), loss=loss, models=()
        )
        experiences = maker.make_experience_batch(make_rollout(16, names=BUILTINS))
        found[size] = rows(experiences)
        shares = [experiences[0].info[f"pama/coefficient/{name}"][0].item() for name in BUILTINS]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert found["16"].isfinite().all() and (found["16"] != 0).any()
    assert torch.equal(found["3"], found["16"])


@pytest.mark.parametrize("estimator", ["reinforce_baseline", "group_norm", "reinforce", "rloo"])
def test_morlhf_is_the_stock_run_on_the_weighted_sum_of_rewards(estimator, groups) -> None:
    flags = ("--algo.advantage.estimator", estimator, "--rollout.micro_batch_size", "3", "--algo.kl.init_coef", "0.1")
    flags += ("--reward.overlong_buffer_len", "4", "--rollout.max_new_tokens", "8")
    objectives = ("a=builtin:length,weight=2", "b=builtin:length,weight=0.5")
    summed = make_rollout(8, names=("a", "b"))
    for sample in summed:
        sample.info["reward/a"] = 2 * sample.info["reward/a"] + 0.5 * sample.info.pop("reward/b")
    alone = build(groups, *flags, objectives=("a=builtin:length",), loss="linear", models=())
    both = build(groups, *flags, objectives=objectives, loss="morlhf", models=())
    stock, found = alone.make_experience_batch(summed), both.make_experience_batch(make_rollout(8, names=("a", "b")))
    for one, other in zip(stock, found, strict=True):
        valid = one.action_mask.bool()
        assert torch.equal(one.advantages[valid], other.advantages[valid])
        assert torch.equal(one.rewards, other.rewards)
        for key in ("reward", "return"):
            assert torch.equal(one.info[key], other.info[key])


def test_a_constraint_that_is_violated_gains_weight_and_its_multiplier_is_resumed(groups) -> None:
    flags = ("--rollout.micro_batch_size", "8")
    settings = dict(objectives=objectives_for("lagrangian"), loss="lagrangian", models=())
    maker = build(groups, *flags, **settings)
    rewards = torch.cat([sample.info["reward/c"] for sample in make_rollout(8, names=BUILTINS)])
    integral = 1.0
    for step in range(2):
        (found,) = maker.make_experience_batch(make_rollout(8, names=BUILTINS))
        so_far = torch.cat([rewards] * (step + 1))
        violation = (0.5 - rewards.mean().item()) / so_far.std().item()
        integral += 0.1 * violation
        expected = integral + 2 * violation
        assert found.info["pama/multiplier/c"].unique().item() == pytest.approx(expected, rel=1e-5)
    assert expected > 1 and "pama/multiplier/a" not in found.info

    resumed = build(groups, *flags, **settings)
    resumed.state.resume(RunState.model_validate_json(maker.state.model_dump_json()))
    (after,) = resumed.make_experience_batch(make_rollout(8, names=BUILTINS))
    (going_on,) = maker.make_experience_batch(make_rollout(8, names=BUILTINS))
    assert torch.equal(after.advantages, going_on.advantages)


@pytest.mark.parametrize(("share", "inactive"), [("0.05", 1), ("0", 0)])
def test_an_objective_whose_rewards_hardly_spread_any_more_leaves_the_combination(share, inactive, groups) -> None:
    """Whitening would give it full advantages, with which it would veto the others."""
    maker = build(groups, "--rollout.micro_batch_size", "8", objectives=BUILTIN_OBJECTIVES[:2], models=())
    maker.config = maker.config.model_copy(update={"inactive_below": float(share)})
    (first,) = maker.make_experience_batch(make_rollout(8, names=BUILTINS[:2]))
    assert first.info["pama/inactive/b"].unique() == 0
    rollout = make_rollout(8, names=BUILTINS[:2])
    for sample in rollout:
        sample.info["reward/b"] = 3.0 + 1e-3 * sample.info["reward/b"]
    (quiet,) = maker.make_experience_batch(rollout)
    assert quiet.info["pama/inactive/b"].unique() == inactive
    alone = quiet.info["pama/active_fraction"].unique() == 1  # a single objective agrees with itself
    assert bool(alone) == bool(inactive)


def test_a_constraint_without_any_reward_keeps_its_multiplier(groups) -> None:
    objectives = (*BUILTIN_OBJECTIVES[:2], f"{CONSTRAINT},on_failure=mask")
    rollout = make_rollout(8, names=BUILTINS)
    for sample in rollout:
        sample.info["reward/c"] = torch.tensor([math.nan])
    maker = build(groups, "--rollout.micro_batch_size", "8", objectives=objectives, loss="lagrangian", models=())
    (found,) = maker.make_experience_batch(rollout)
    assert found.info["pama/multiplier/c"].unique() == 1 and found.advantages.isfinite().all()


WRITES = ("helpful=rm:org/a", "length=builtin:length,on_failure=mask,range=0:99")


def test_what_is_logged_of_a_rollout(groups) -> None:
    """By hand from the tensors; the distance is the same whether OpenRLHF keeps the reference's numbers or not."""
    logged = {}
    for way, flags in {"in the reward": (), "as a loss": ("--algo.kl.use_loss",)}.items():
        maker = build(groups, "--rollout.micro_batch_size", "3", *flags, objectives=WRITES, models=MODELS[:1])
        maker.tokenizer.decode = lambda tokens, **_: " ".join(str(int(token)) for token in tokens)
        samples = make_rollout(8, names=COLUMNS)
        samples[5].info["reward/length"] = torch.tensor([math.nan])
        samples[5].info["pama/problem/length"] = torch.tensor([7.0])
        responses = [sample.sequences[0, 1:][sample.action_mask[0].bool()].tolist() for sample in samples]
        experiences = maker.make_experience_batch(samples)
        logged[way] = maker.rows
        for key in ("pama/kl_response", "pama/reference_nll"):
            column = torch.cat([experience.info[key] for experience in experiences])
            assert column.shape == (8,) and column.isfinite().all()
    for one, other in zip(*logged.values()):
        assert one["nats"] == pytest.approx(other["nats"], abs=1e-4)
        assert one["reference_nll"] == pytest.approx(other["reference_nll"], abs=1e-4)

    rows = {row["sample"]: row for row in logged["as a loss"]}
    assert sorted(rows) == list(range(8)) and all(row["step"] == 1 for row in rows.values())
    for sample, row in rows.items():
        assert row["prompt"] == f"prompt {sample}" and row["response"].split() == list(map(str, responses[sample]))
        assert row["tokens"] == len(responses[sample])
    assert rows[5]["rewards"]["length"] is None and rows[5]["problems"] == {"length": "no reward"}


def test_how_many_responses_are_logged(groups) -> None:
    for wanted, count in (("0", 0), ("3", 3), ("all", 8)):
        maker = build(groups)
        maker.config = maker.config.model_copy(update={"log_rollouts": wanted if wanted == "all" else int(wanted)})
        maker.tokenizer.decode = lambda tokens, **_: ""
        maker.make_experience_batch(make_rollout(8, names=COLUMNS))
        assert len(maker.rows) == count


def test_an_agents_turns_are_logged_apart() -> None:
    from pama_plugin.host.actors.rollout_log import split_turns

    tokens, attention = torch.tensor([0, 9, 9, 1, 2, 7, 8, 3, 0]), torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 0])
    actions = torch.tensor([0, 0, 1, 1, 0, 0, 1, 0])
    assert split_turns(tokens, attention, actions) == [
        ("policy", [1, 2]),
        ("environment", [7, 8]),
        ("policy", [3]),
    ]
    assert split_turns(tokens, attention, torch.zeros(8)) == []


def test_prompts_whose_responses_are_all_the_same_are_counted(groups) -> None:
    samples = make_rollout(8, names=COLUMNS)
    for index in range(1, 4):
        samples[index] = samples[index].__class__(**vars(samples[0]) | {"info": dict(samples[index].info)})
    for experience in build(groups).make_experience_batch(samples):
        assert (experience.info["pama/uniform_prompts"] == 0.5).all()


def test_the_spread_is_relative_to_the_first_step(groups) -> None:
    maker = build(groups)
    found = []
    for factor in (1.0, 0.5):
        samples = make_rollout(8, names=COLUMNS)
        for sample in samples:
            sample.info["reward/length"] = factor * sample.info["reward/length"]
        found.append(maker.make_experience_batch(samples)[0].info["pama/spread/length"][0].item())
    assert found == pytest.approx([1.0, 0.5])


def test_the_log_goes_on_after_a_cut_off_line_and_ends_with_one_warning(tmp_path, caplog) -> None:
    from pama_plugin.host.actors.rollout_log import RolloutLog
    from pama_plugin.runs.rollouts import read_rollouts

    row = {"step": 1, "sample": 0, "prompt": "p\ud800", "response": "<b>\x1b[2J", "rewards": {"a": 1.0}, "label": "l"}
    row |= {"advantage": 0.5}
    (tmp_path / "rollouts.jsonl").write_text('{"step": 1, "sam')
    texts, tables = [], []
    tensorboard = SimpleNamespace(writer=SimpleNamespace(add_text=lambda *call: texts.append(call)))
    wandb = SimpleNamespace(Table=lambda columns, data: (columns, data), log=tables.append)
    log = RolloutLog(tmp_path / "rollouts.jsonl", "pama/rollouts", SimpleNamespace(handle=wandb), tensorboard)
    log.write([row | {"prompt": "p"}])
    log.write([row | {"prompt": "p", "step": 2}])
    assert [each.step for each in read_rollouts(tmp_path)] == [1, 2]
    assert [(key, step) for key, _, step in texts] == [("pama/rollouts", 1), ("pama/rollouts", 2)]
    assert "\x1b" not in texts[0][1]
    columns, data = tables[0]["pama/rollouts"]
    assert dict(zip(columns, data[0]))["a"] == 1.0

    (tmp_path / "file").write_text("")
    log = RolloutLog(tmp_path / "file" / "below" / "rollouts.jsonl", "pama/rollouts", None, None)
    for _ in range(3):
        log.write([row])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "rollouts are no longer logged" in warning and "Not a directory" in warning


def test_a_rollout_of_another_model_than_the_policy_is_refused_in_the_first_step(groups) -> None:
    flags = ("--rollout.micro_batch_size", "8")
    (plain,) = build(groups, *flags).make_experience_batch(make_rollout(8, names=COLUMNS))
    tokens = plain.action_mask.sum()

    def rollout(divergence: float):
        samples = make_rollout(8, names=COLUMNS)
        for row, sample in enumerate(samples):
            log_prob = (plain.action_log_probs[row] * plain.action_mask[row]).sum()
            # All of it at the first response, and another that is not known.
            sample.info[SAMPLED] = (log_prob + (divergence * tokens if row == 0 else 0)).reshape(1)
        return samples

    maker = build(groups, *flags)
    (found,) = maker.make_experience_batch(rollout(0.09))
    assert SAMPLED not in found.info
    torch.testing.assert_close(found.advantages, plain.advantages)
    with pytest.raises(PamaError, match="divergence of 0.11 nats per token between them, more than 0.1"):
        build(groups, *flags).make_experience_batch(rollout(0.11))

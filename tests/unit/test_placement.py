"""GPUs of a run, checked by hand for every way to share them, and errors for plans that cannot work."""

import argparse

import hypothesis
import pytest
from hypothesis import strategies as st

from pama_plugin.errors import ConfigError
from pama_plugin.host.preflight.placement import (
    GPU_STEPS,
    Node,
    check_cluster,
    format_plan,
    make_plan,
    parse_cluster,
    place,
)
from pama_plugin.settings.load import load_config

# Two ranks per model. The keys are OpenRLHF's flags, which tests/contract/test_placement.py checks.
FLAGS = {
    **{f"{group}.num_nodes": 1 for group in ("actor", "ref", "critic", "reward")},
    **{f"{group}.num_gpus_per_node": 2 for group in ("actor", "ref", "critic", "reward")},
    **{f"train.{flag}": False for flag in ("colocate_all", "colocate_actor_ref", "colocate_critic_reward")},
    **{"train.async_enable": False, "train.dynamic_batch_enable": False},
    **{"vllm.num_engines": 2, "vllm.tensor_parallel_size": 1},
    **{"ds.ring_attn_size": 1, "ds.tensor_parallel_size": 1, "ds.zero_stage": 2},
    **{"train.batch_size": 128, "train.micro_batch_size": 1},
    **{"rollout.batch_size": 128, "rollout.n_samples_per_prompt": 1, "rollout.micro_batch_size": 1},
    **{"algo.kl.init_coef": 0.01, "ds.lora.rank": 0, "algo.advantage.estimator": "reinforce"},
}
ALL = {"train.colocate_all": True}
ASYNC = ALL | {"train.async_enable": True}
GAE = {"algo.advantage.estimator": "gae"}
CRITIC_REWARD = GAE | {"train.colocate_critic_reward": True}


def plan(*options: str, **flags):
    """The plan for reward models ``a``, ``b``, … with these options, or for one reward in the rollout."""
    objectives = [f"{name}=rm:org/{name}{option}" for name, option in zip("abcdefgh", options)]
    config = load_config("pama", objectives or ["l=builtin:length"], None, None, None, default_level="token")
    return make_plan(argparse.Namespace(**FLAGS | flags), config)


def blocks(*options: str, **flags) -> list:
    return [
        (block.gpus, {role.name: (role.ranks, role.share) for role in block.roles})
        for block in plan(*options, **flags).blocks
    ]


OWN = [(2, {"rollout": (2, 1)}), (2, {"policy": (2, 1)}), (2, {"reference": (2, 1)})]
A, B = "reward/a", "reward/b"


@pytest.mark.parametrize(
    ("options", "flags", "expected"),
    [
        ((), {}, OWN),
        ((), {"algo.kl.init_coef": 0}, OWN[:2]),
        ((), {"vllm.num_engines": None}, OWN[1:]),
        ((), {"vllm.num_engines": 0}, OWN[1:]),
        ((), GAE, [*OWN, (2, {"critic": (2, 1)})]),
        (("", ""), {}, [*OWN, (2, {A: (2, 1)}), (2, {B: (2, 1)})]),
        ((",gpus=1", ",nodes=2"), {}, [*OWN, (1, {A: (1, 1)}), (4, {B: (4, 1)})]),
        # Fractions fill GPUs one after the other.
        (
            (",gpus=0.5", ",gpus=0.7", ",gpus=0.5"),
            {},
            [*OWN, (1, {A: (1, 0.5), "reward/c": (1, 0.5)}), (1, {B: (1, 0.7)})],
        ),
        (("", ",gpus=0.5"), {}, [*OWN, (2, {A: (2, 1)}), (1, {B: (1, 0.5)})]),
        (
            (),
            {"train.colocate_actor_ref": True},
            [(2, {"policy": (2, 0.2), "reference": (2, 0.2)}), (2, {"rollout": (2, 1)})],
        ),
        # Two reward models share 0.2, three get 0.0666 each: 0.0667 would not fit.
        (
            ("", ",gpus=1"),
            ALL,
            [(2, {"rollout": (2, 0.2), "policy": (2, 0.2), "reference": (2, 0.2), A: (2, 0.1), B: (1, 0.1)})],
        ),
        (
            ("", "", ""),
            ALL | GAE | {"vllm.num_engines": 1, "vllm.tensor_parallel_size": 2},
            [
                (
                    2,
                    dict.fromkeys(("rollout", "policy", "reference", "critic"), (2, 0.2))
                    | dict.fromkeys((A, B, "reward/c"), (2, 0.0666)),
                )
            ],
        ),
        (
            ("",),
            ASYNC | {"vllm.num_engines": 3},
            [(2, {"policy": (2, 0.2), "reference": (2, 0.2), A: (2, 0.2)}), (3, {"rollout": (3, 1)})],
        ),
        (("",), CRITIC_REWARD, [*OWN, (2, {"critic": (2, 0.2), A: (2, 0.2)})]),
        (
            ("", ""),
            ALL | CRITIC_REWARD,
            [
                (2, {"rollout": (2, 0.2), "policy": (2, 0.2), "reference": (2, 0.2)}),
                (2, {"critic": (2, 0.2), A: (2, 0.1), B: (2, 0.1)}),
            ],
        ),
        # Without a critic OpenRLHF ignores the flag.
        (("",), CRITIC_REWARD | {"algo.advantage.estimator": "reinforce"}, [*OWN, (2, {A: (2, 1)})]),
    ],
)
def test_blocks_by_hand(options, flags, expected) -> None:
    assert blocks(*options, **flags) == expected


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ((), {"train.micro_batch_size": 0}, "--train.micro_batch_size .*at least 1.*found 0"),
        ((), {"actor.num_gpus_per_node": 0}, "policy: ranks .*multiple of .*= 1.*found 0"),
        ((",gpus=3",), {"ds.ring_attn_size": 2}, "reward/a: ranks .*multiple of .*= 2.*found 3"),
        ((",gpus=3",), {}, "reward/a: --train.batch_size .*multiple of .*= 1 × 3.*found 128"),
        (
            (",gpus=3",),
            {"train.dynamic_batch_enable": True},
            "reward/a: --train.batch_size .*multiple of .*= 1 × 3.*found 128",
        ),
        (
            (",gpus=8",),
            {"rollout.batch_size": 28, "rollout.micro_batch_size": 4},
            "reward/a: --rollout.batch_size .*at least .*8 data-parallel ranks.*found 7",
        ),
        (
            (),
            ALL | {"ref.num_gpus_per_node": 4},
            "colocate_actor_ref.*same size.*found policy 1 × 2, reference 1 × 4",
        ),
        (
            (),
            ALL | {"vllm.num_engines": 1},
            "--train.async_enable.*same size.*found policy 1 × 2, rollout 1 × 1",
        ),
        (
            (),
            CRITIC_REWARD | {"reward.num_gpus_per_node": 1},
            "colocate_critic_reward.*same size.*found critic 1 × 2, reward 1 × 1",
        ),
        (("", ",gpus=4"), ALL, "reward/b: .*one rank per shared GPU.* 2 .*found 4"),
        (("",), ALL | GAE | {"critic.num_gpus_per_node": 4}, "critic: .*one rank per shared GPU.* 2 .*found 4"),
        (("", ",gpus=4"), CRITIC_REWARD, "reward/b: .*one rank per shared GPU.* 2 .*found 4"),
        ((",gpus=0.5",), ALL, "'a': gpus .*whole number.*colocated.*found 0.5"),
        ((",offload=true",), {}, "'a': offload=true .*--ds.zero_stage 3.*found 2"),
    ],
)
def test_a_plan_that_cannot_work(options, flags, message) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*options, **flags)


def test_dynamic_batches_are_not_checked() -> None:
    flags = {"train.dynamic_batch_enable": True, "actor.num_gpus_per_node": 3, "rollout.batch_size": 1}
    assert blocks(**flags)[1] == (3, {"policy": (3, 1)})


def test_parameters_may_be_offloaded_with_stage_3() -> None:
    assert blocks(",offload=true", ",offload=false", **{"ds.zero_stage": 3})
    assert blocks(",offload=false")


def test_the_table() -> None:
    table = format_plan(plan("", "", "", **ALL), parse_cluster("1x8"))
    assert table.splitlines() == [
        "PAMA plan: 2 of 8 GPUs, one CPU beside each",
        "role       ranks  GPUs each  block  node",
        "rollout        2        0.2      1  1",
        "policy         2        0.2      1  1",
        "reference      2        0.2      1  1",
        "reward/a       2     0.0666      1  1",
        "reward/b       2     0.0666      1  1",
        "reward/c       2     0.0666      1  1",
    ]


def test_nodes_fill_up_and_ranks_without_a_node_are_shown() -> None:
    """Ray uses the emptiest node first; a GPU without a CPU on its machine cannot be reserved."""
    cluster = [Node("small", 3, 8), Node("large", 8, 5)]
    run = plan(",gpus=4", **{"algo.kl.init_coef": 0})
    assert place(run, cluster) == [["large"] * 2, ["small"] * 2, ["large"] * 3 + ["small"]]
    assert format_plan(run, cluster).splitlines()[-1].endswith("large, small")
    assert format_plan(run, cluster[:1]).splitlines()[-1].endswith("none")


@pytest.mark.parametrize("cluster", [(Node("1", 6),), (Node("1", 3, 3), Node("2", 4, 3), Node("head", 0, 4))])
def test_just_enough(cluster) -> None:
    check_cluster(plan(), cluster)


@pytest.mark.parametrize(
    ("cluster", "available"),
    [
        ((Node("1", 5),), "found 5 GPUs:"),
        ((Node("1", 6, 5),), "found 6 GPUs with 5 CPUs:"),
        ((Node("1", 3, 2), Node("2", 3, 30)), r"found 3 \+ 3 GPUs with 2 \+ 30 CPUs:"),
    ],
)
def test_too_few(cluster, available) -> None:
    needed = "6 GPUs .*CPU.*2 for rollout, 2 for policy, 2 for reference"
    with pytest.raises(ConfigError, match=f"{needed}.*{available}"):
        check_cluster(plan(), cluster)


@pytest.mark.parametrize(("text", "gpus"), [("8", [8]), ("1x8", [8]), ("2x4", [4, 4])])
def test_a_stated_cluster(text, gpus) -> None:
    assert [node.gpus for node in parse_cluster(text)] == gpus


@pytest.mark.parametrize("text", ["", "x", "0", "0x8", "8x0", "2x", "x8", "-1x8", "1x8x8", "2×8", "1.5"])
def test_an_invalid_cluster(text) -> None:
    with pytest.raises(ConfigError, match=f"--pama.plan .*NODESxGPUS.*found {text!r}"):
        parse_cluster(text)


@pytest.mark.property
@hypothesis.given(st.data())
def test_no_gpu_is_reserved_twice(data) -> None:
    """Every rank has a GPU of its block, and the shares of a GPU never exceed 1 in Ray's steps."""
    draw = data.draw
    flags = {key: draw(st.booleans()) for key, value in FLAGS.items() if value is False}
    flags |= {key: draw(st.integers(1, 2)) for key in FLAGS if key.endswith("num_nodes")}
    flags |= {key: draw(st.sampled_from([1, 2, 4])) for key in FLAGS if key.endswith("gpus_per_node")}
    flags |= {"algo.kl.init_coef": draw(st.sampled_from([0, 0.1])), "vllm.num_engines": draw(st.integers(0, 4))}
    flags |= {"algo.advantage.estimator": draw(st.sampled_from(["gae", "rloo"]))}
    option = st.sampled_from(["", ",gpus=1", ",gpus=2", ",gpus=0.3", ",gpus=0.35", ",gpus=0.0001"])
    options = draw(st.lists(option, max_size=8))
    try:
        run = plan(*options, **flags)
    except ConfigError:
        hypothesis.reject()

    names = [role.name for block in run.blocks for role in block.roles]
    always = ["policy", *(f"reward/{name}" for _, name in zip(options, "abcdefgh"))]
    sometimes = {"reference": flags["algo.kl.init_coef"], "rollout": flags["vllm.num_engines"]}
    sometimes["critic"] = flags["algo.advantage.estimator"] == "gae"
    assert sorted(names) == sorted([*always, *(name for name, there in sometimes.items() if there)])
    for block in run.blocks:
        for gpu in range(block.gpus):
            steps = sum(round(role.share * GPU_STEPS) for role in block.roles if gpu < role.ranks)
            assert 0 < steps <= GPU_STEPS
        assert all(0 < role.ranks <= block.gpus for role in block.roles)
    assert run.gpus == sum(max(role.ranks for role in block.roles) for block in run.blocks)
    cluster = (Node("1", run.gpus),)
    check_cluster(run, cluster)
    assert [len(nodes) for nodes in place(run, cluster)] == [block.gpus for block in run.blocks]

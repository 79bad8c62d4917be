"""The plan against the host's own ``train`` and against a real Ray: the same blocks, ranks and shares, or a refusal."""

import itertools
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hosttools import parse_host_flags

from pama_plugin.errors import ConfigError
from pama_plugin.host.hook import HOST_COMMAND
from pama_plugin.host.preflight.placement import Plan, make_plan
from pama_plugin.settings.load import load_config
from pama_plugin.settings.run import PamaConfig

pytestmark = pytest.mark.contract

OBJECTIVES = ("a=rm:org/a", "b=rm:org/b", "c=rm:org/c")
Blocks = list[tuple[int, dict[str, tuple[int, float]]]]


class _Placed(Exception):
    """The host has reserved everything and would build its trainer."""


class Ledger:
    """Stands in for Ray where the host and the plugin reserve: writes down whole GPUs, and whose ranks are on them."""

    def __init__(self, rewards: tuple[str, ...]) -> None:
        self.blocks: Blocks = []
        self.rewards = iter(rewards)

    def placement_group(self, bundles: list[dict[str, int]], strategy: str = "PACK") -> Any:
        assert all(bundle == {"GPU": 1, "CPU": 1} for bundle in bundles) and strategy == "PACK"
        self.blocks.append((len(bundles), {}))
        return SimpleNamespace(ready=lambda: None, block=self.blocks[-1])

    def actor(self, role: str) -> Any:
        """An actor class that counts its ranks; a reward model's first rank belongs to the next objective."""
        name = role

        def options(*, num_cpus, num_gpus, scheduling_strategy=None, resources=None) -> Any:
            def remote(world_size=None, rank=None, *_, **engine) -> Any:
                nonlocal name
                if role == "reward" and rank == 0:
                    name = next(self.rewards)
                if engine:  # vLLM: one actor for all ranks of an engine
                    self.put(name, scheduling_strategy, engine["tensor_parallel_size"], engine["num_gpus"])
                else:
                    assert num_cpus == num_gpus
                    self.put(name, scheduling_strategy, 1, num_gpus)
                return mock.Mock()

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(options=options)

    def put(self, name: str, strategy: Any, ranks: int, share: float) -> None:
        if strategy is None:
            if not self.blocks or name not in self.blocks[-1][1]:
                self.blocks.append((0, {}))
            self.blocks[-1] = (self.blocks[-1][0] + 1, self.blocks[-1][1])
            ledger = self.blocks[-1][1]
        else:
            ledger = strategy.placement_group.block[1]
            assert strategy.placement_group_bundle_index == ledger.get(name, (0,))[0]
        ledger[name] = (ledger.get(name, (0,))[0] + ranks, share)


def run_host(flags: list[str], config: PamaConfig | None = None, plan: Plan | None = None) -> Blocks:
    """Run the host's ``train`` up to its trainer, with the plugin's reward groups if there is a plan for them."""
    import openrlhf.cli.train_ppo_ray as command
    from openrlhf.trainer import ppo_trainer, ppo_trainer_async
    from openrlhf.trainer.ray import launcher, vllm_engine
    from openrlhf.utils.config import hierarchize

    from pama_plugin.host.actors import reward_groups

    names = tuple(f"reward/{objective.name}" for objective in config.scored_in("ranks")) if config else ("reward/only",)
    ledger = Ledger(names)
    args = hierarchize(parse_host_flags(*flags))
    # As the host's validation, which comes before ``train``.
    args.critic.model_name_or_path = "critic" if args.algo.advantage.estimator == "gae" else None

    roles = dict(PolicyModelActor="policy", ReferenceModelActor="reference", CriticModelActor="critic")
    actors = {name: ledger.actor(role) for name, role in (roles | {"RewardModelActor": "reward"}).items()}
    ray = mock.Mock(get=mock.Mock(return_value=("master", 1)))
    shared = dict(ray=ray, placement_group=ledger.placement_group)
    trainer = SimpleNamespace(remote=mock.Mock(side_effect=_Placed))
    build = command.RayActorGroup
    if plan is not None:
        inside = actors["ReferenceModelActor"] if args.ds.lora.rank else None
        of_rewards, of_policy = actors["RewardModelActor"], actors["PolicyModelActor"]
        build = reward_groups.group_builder(config, plan, build, of_rewards, of_policy, reference_in_policy=inside)
    indices = mock.Mock(side_effect=lambda pg, index, size: list(range(index * size, index * size + size)))
    with (
        mock.patch.multiple(command, get_strategy=mock.Mock(), RayActorGroup=build, **actors, **shared),
        mock.patch.multiple(launcher, **shared),
        mock.patch.multiple(reward_groups, **shared),
        mock.patch.multiple(vllm_engine, RolloutRayActor=ledger.actor("rollout"), get_bundle_indices=indices, **shared),
        mock.patch.object(ppo_trainer, "PPOTrainer", trainer),
        mock.patch.object(ppo_trainer_async, "PPOTrainerAsync", trainer),
        pytest.raises(_Placed),
    ):
        command.train(args)
    return ledger.blocks


def planned(flags: list[str], config: PamaConfig) -> tuple[Plan, Blocks]:
    plan = make_plan(parse_host_flags(*flags), config)
    return plan, [(block.gpus, {role.name: (role.ranks, role.share) for role in block.roles}) for block in plan.blocks]


def load(*objectives: str) -> PamaConfig:
    return load_config("pama", objectives, None, None, None, default_level="token")


def by_name(blocks: Blocks) -> Blocks:
    return sorted(blocks, key=str)


def sizes(**gpus: int) -> list[str]:
    groups = ("actor", "ref", "critic", "reward")
    return [word for group in groups for word in (f"--{group}.num_gpus_per_node", str(gpus.get(group, 2)))]


ESTIMATORS = [["--algo.advantage.estimator", name] for name in ("gae", "reinforce")]
COLOCATIONS = ["all", "actor_ref", "critic_reward"]
WAYS = [
    [f"--train.colocate_{name}" for name, on in zip(COLOCATIONS, on) if on]
    for on in itertools.product([False, True], repeat=3)
]
ENGINES = [["--vllm.num_engines", "2"], ["--vllm.num_engines", "1", "--vllm.tensor_parallel_size", "2"]]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(word.rpartition("colocate_")[2] for word in way))
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda words: words[1])
def test_the_plan_is_what_the_host_reserves(way, estimator) -> None:
    """Every way to share GPUs: with the stock reward model, with three groups in its place, and without any."""
    variants = itertools.product(ENGINES, ([], ["--train.async_enable"]), ([], ["--algo.kl.init_coef", "0"]))
    for engines, mode, kl in variants:
        flags = [*sizes(), *way, *estimator, *engines, *mode, *kl]
        _, expected = planned(flags, load("only=rm:org/a"))
        assert by_name(run_host(flags)) == by_name(expected), flags
        plan, expected = planned(flags, load(*OBJECTIVES))
        assert by_name(run_host(flags, load(*OBJECTIVES), plan)) == by_name(expected), flags
        _, expected = planned(flags, load("l=builtin:length"))
        assert by_name(run_host([*flags, "--reward.remote_url", "x"])) == by_name(expected), flags


@pytest.mark.parametrize("way", [[], ["--train.colocate_all"], ["--train.colocate_actor_ref"]])
def test_with_adapters_the_reference_needs_no_gpu(way) -> None:
    flags = [
        *sizes(),
        *way,
        "--algo.advantage.estimator",
        "reinforce",
        "--vllm.num_engines",
        "2",
        "--ds.lora.rank",
        "8",
    ]
    plan, expected = planned(flags, load(*OBJECTIVES))
    assert not any("reference" in roles for _, roles in expected)
    assert by_name(run_host(flags, load(*OBJECTIVES), plan)) == by_name(expected)


def test_with_adapters_the_sizes_of_a_reference_apart_do_not_matter() -> None:
    few = ["--train.batch_size", "16", "--train.micro_batch_size", "4", "--algo.advantage.estimator", "reinforce"]
    flags = [*sizes(actor=1, ref=8, reward=1), *few]
    with pytest.raises(ConfigError, match="reference: --train.batch_size must be a multiple"):
        planned(flags, load("l=builtin:length"))
    planned([*flags, "--ds.lora.rank", "8"], load("l=builtin:length"))


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], (",gpus=1", ",nodes=2,gpus=1", "")),
        ([], (",gpus=0.5", ",gpus=0.7", ",gpus=0.5")),
        (["--train.colocate_all"], (",gpus=1", "", ",gpus=2")),
        (["--algo.advantage.estimator", "gae", "--train.colocate_critic_reward"], (",gpus=1", "", "")),
    ],
)
def test_objectives_get_what_they_ask_for(flags, options) -> None:
    flags = [*sizes(), "--vllm.num_engines", "2", "--algo.advantage.estimator", "reinforce", *flags]
    config = load(*(objective + option for objective, option in zip(OBJECTIVES, options)))
    plan, expected = planned(flags, config)
    assert by_name(run_host(flags, config, plan)) == by_name(expected)


@pytest.mark.parametrize(
    "flags",
    [
        ["--train.colocate_all", *sizes(ref=1)],
        ["--train.colocate_actor_ref", *sizes(ref=1)],
        ["--train.colocate_all", *sizes(actor=4, ref=4)],
        ["--train.colocate_critic_reward", *sizes(critic=1)],
    ],
)
def test_what_the_host_asserts_after_ray_has_started_is_refused_before(flags) -> None:
    flags = ["--vllm.num_engines", "2", *flags]
    with pytest.raises(AssertionError, match="must be"):
        run_host(flags)
    with pytest.raises(ConfigError, match="--train.colocate_.*same size, found"):
        planned(flags, load(*OBJECTIVES))


def free_gpus() -> float:
    """What Ray says is free once it says so five times: it reports now and then."""
    import ray

    readings = [-1.0]
    while readings[-5:] != readings[-1:] * 5:
        time.sleep(0.2)
        readings.append(ray.available_resources().get("GPU", 0.0))
    return readings[-1]


@pytest.mark.parametrize(
    ("options", "gpus"), [((",gpus=2", ",gpus=1", ",gpus=1"), 4), ((",gpus=0.5", ",gpus=0.7", ",gpus=0.5"), 2)]
)
def test_ray_reserves_what_the_plan_says(options, gpus, local_ray, monkeypatch) -> None:
    """The reward groups on a real Ray: as many GPUs as planned, and shared by those that the plan puts together."""
    import ray
    from openrlhf.trainer.ray import launcher
    from ray.util.placement_group import placement_group, remove_placement_group

    from pama_plugin.host.actors import reward_groups

    @ray.remote
    class Rank:
        def __init__(self, *_: Any) -> None:
            pass

        def get_master_addr_port(self) -> tuple[str, int]:
            return "", 0

        def gpus(self) -> list[int]:
            return ray.get_gpu_ids()

    reserved = []

    def reserve(*args: Any, **kwargs: Any) -> Any:
        reserved.append(placement_group(*args, **kwargs))
        return reserved[-1]

    for module in (launcher, reward_groups):
        monkeypatch.setattr(module, "placement_group", reserve)
    config = load(*(objective + option for objective, option in zip(OBJECTIVES, options)))
    plan = make_plan(parse_host_flags(*sizes()), config)
    blocks = [block for block in plan.blocks if block.roles[0].name.startswith("reward/")]
    assert sum(block.gpus for block in blocks) == gpus

    before = free_gpus()
    build = reward_groups.group_builder(config, plan, launcher.RayActorGroup, Rank, None)
    groups = build(1, 2, Rank, pg=None, num_gpus_per_actor=1, duplicate_actors=1).groups
    used = {name: sum(ray.get(group.actors.async_run_method("gpus"), timeout=60), []) for name, group in groups.items()}
    assert free_gpus() == pytest.approx(before - gpus)  # others hold shares of one
    for block in blocks:
        names = [role.name.removeprefix("reward/") for role in block.roles]
        assert len({tuple(used[name]) for name in names}) == 1
    assert len({gpu for ids in used.values() for gpu in ids}) == gpus
    groups.clear()
    for pg in reserved:
        remove_placement_group(pg)


@pytest.mark.e2e  # whole commands, each of which imports the host: seconds apiece
def test_a_run_that_does_not_fit_ends_at_once(local_ray) -> None:
    """The stock OpenRLHF command on a Ray of 16 GPUs: without the plugin it would wait for ever."""
    import ray

    command = [sys.executable, "-W", "ignore", "-m", HOST_COMMAND, "--loss", "pama", "--pama.objective", OBJECTIVES[0]]
    command += [*sizes(), "--vllm.num_engines", "11", "--algo.advantage.estimator", "reinforce"]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "PAMA plan: 17 of 16 GPUs" in run.stdout
    assert re.search(r"\nerror: .*needs 17 GPUs .*\(11 for rollout, 2 for policy, 2 for.*found 16 GPUs", run.stderr)


@pytest.mark.parametrize("allow_waiting", [False, True])
def test_waiting_can_be_allowed(allow_waiting, monkeypatch, capsys) -> None:
    import ray

    from pama_plugin.host import seam

    nodes = [{"NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 8.0, "GPU": 4.0}, "Alive": True}]
    nodes += [{"NodeManagerAddress": "10.0.0.2", "Resources": {"CPU": 8.0}, "Alive": True}]
    nodes += [{"NodeManagerAddress": "10.0.0.3", "Resources": {}, "Alive": False}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    config = load(OBJECTIVES[0])
    plan, _ = planned([*sizes(), "--vllm.num_engines", "0"], config)
    monkeypatch.setattr(seam, "ask_nodes", lambda *_: [])
    monkeypatch.setattr(seam, "end_on_sigterm", lambda _: None)
    get_strategy = seam._ready(lambda _: "strategy", config, plan, None, allow_waiting=allow_waiting)
    args = SimpleNamespace(reward=SimpleNamespace(remote_url="pama"))
    if allow_waiting:
        assert get_strategy(args) == "strategy"
        assert "[Warning] the run needs 8 GPUs" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="2"):
            get_strategy(args)
        assert "policy         2          1      1  10.0.0.1" in capsys.readouterr().out

"""K reward groups where the host expects one: placement, loading, and every rank its own settings."""

from types import SimpleNamespace

import pytest
import torch
from hosttools import parse_host_flags

from pama_plugin.host.preflight.placement import make_plan
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract

THREE = ["a=rm:org/a", "b=rm:org/b,value_head_prefix=head", "c=rm:org/c,offload=false"]


@pytest.fixture
def config():
    return load_config("pama", THREE, None, None, None, default_level="token")


def plan_of(config, *flags):
    sizes = [word for group in ("actor", "ref", "reward") for word in (f"--{group}.num_gpus_per_node", "1")]
    sizes += ["--vllm.num_engines", "1", "--algo.advantage.estimator", "reinforce"]
    return make_plan(parse_host_flags(*sizes, *flags), config)


def test_three_groups_fit_the_share_of_one(local_ray, config) -> None:
    """With --train.colocate_all a GPU is full: 5 × 0.2. Three groups rounded up to 0.0667 would wait for ever."""
    import ray
    from openrlhf.trainer.ray.launcher import RayActorGroup
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from pama_plugin.host.actors.reward_groups import group_builder

    @ray.remote
    class Rank:
        def __init__(self, *_):
            pass

        def init_model_from_pretrained(self, strategy, pretrain):
            self.model = SimpleNamespace(module=SimpleNamespace(mean=torch.empty(1), std=torch.empty(1), config=None))
            return strategy.args.ds.value_head_prefix, pretrain, strategy.args.reward.offload

    bundle = placement_group([{"GPU": 1, "CPU": 1}])
    ray.get(bundle.ready(), timeout=60)
    strategy = PlacementGroupSchedulingStrategy(placement_group=bundle, placement_group_bundle_index=0)
    others = Rank.options(num_gpus=0.8, num_cpus=0.8, scheduling_strategy=strategy).remote()
    plan = plan_of(config, "--train.colocate_all")
    build = group_builder(config, plan, RayActorGroup, reward_actor=Rank, policy_actor=None)
    groups = build(1, 1, Rank, pg=bundle, num_gpus_per_actor=0.2, duplicate_actors=1)

    settings = dict(ds=SimpleNamespace(value_head_prefix="score"), reward=SimpleNamespace(offload=True))
    strategy = SimpleNamespace(args=SimpleNamespace(**settings))
    loaded = ray.get(groups.async_init_model_from_pretrained(strategy, "org/a"), timeout=120)
    assert loaded[::2] == [("score", "org/a", True), ("head", "org/b", True), ("score", "org/c", False)]
    assert list(groups.groups) == ["a", "b", "c"]
    assert strategy.args.ds.value_head_prefix == "score" and strategy.args.reward.offload
    del others, groups
    remove_placement_group(bundle)


def test_any_other_group_is_the_hosts_own(config) -> None:
    from pama_plugin.host.actors.reward_groups import group_builder

    def stock(*positional, **placement):
        return positional, placement

    build = group_builder(config, plan_of(config), stock, reward_actor=object(), policy_actor=None)
    other = object()
    assert build(2, 4, other, pg=None, num_gpus_per_actor=1) == ((2, 4, other), {"pg": None, "num_gpus_per_actor": 1})

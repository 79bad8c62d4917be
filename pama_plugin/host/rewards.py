"""K groups of stock ``RewardModelActor`` where the host's driver and trainer expect one."""

import copy
import math
from collections.abc import Callable
from typing import Any

from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ray.launcher import RayActorGroup

from pama_plugin.config import Objective, PamaConfig
from pama_plugin.host.critic import restore_normalization

# Ray counts GPUs in steps of 0.0001: rounding a share up would make K of them overflow their bundle, for ever pending.
GPU_STEPS = 10_000


class RewardGroups:
    """One ``RayActorGroup`` per ``rm`` objective, keyed by name; stands in for the host's single reward group.

    Each is a world of its own, with the ranks that ``--reward.num_nodes`` and ``--reward.num_gpus_per_node`` ask for.
    Where the host shares GPUs (``num_gpus_per_actor`` below 1), the groups share the one reward model's share.
    """

    def __init__(
        self,
        objectives: tuple[Objective, ...],
        make_group: Callable[..., RayActorGroup],
        num_gpus_per_actor: float,
        **placement: Any,
    ) -> None:
        if num_gpus_per_actor < 1:
            num_gpus_per_actor = math.floor(num_gpus_per_actor / len(objectives) * GPU_STEPS) / GPU_STEPS
        self.objectives = objectives
        self.groups = {
            objective.name: make_group(num_gpus_per_actor=num_gpus_per_actor, **placement) for objective in objectives
        }

    def async_init_model_from_pretrained(self, strategy: Any, pretrain: str) -> list[Any]:
        """Load every objective's own model; ``pretrain`` is the first one's location, which the host passes."""
        refs = []
        for objective in self.objectives:
            own = _strategy_of(objective, strategy)
            group = self.groups[objective.name]
            refs += group.async_init_model_from_pretrained(own, objective.location)
            refs += group.async_run_method("__ray_call__", lambda rank: restore_normalization(rank.model.module))
        return refs


def _strategy_of(objective: Objective, strategy: Any) -> Any:
    """The strategy with this objective's value-head prefix. Copies are shallow: no rank sees another's setting."""
    if "value_head_prefix" not in objective.options:
        return strategy
    own = copy.copy(strategy)
    own.args = copy.copy(strategy.args)
    own.args.ds = copy.copy(strategy.args.ds)
    own.args.ds.value_head_prefix = objective.options["value_head_prefix"]
    return own


class PolicyGroup(RayActorGroup):
    """The host's, which sends no values and returns along with the rollouts: only the critic reads them."""

    def async_run_method_batch(self, method_name: str, **kwargs: Any) -> list[Any]:
        if method_name == "append":
            lean = [Experience(**vars(full) | {"values": None, "returns": None}) for full in kwargs["experience"]]
            kwargs["experience"] = lean
        return super().async_run_method_batch(method_name, **kwargs)


def group_builder(
    config: PamaConfig, stock: type[RayActorGroup], reward_actor: Any, policy_actor: Any
) -> Callable[..., Any]:
    """What the host's driver calls instead of ``RayActorGroup``."""

    def build(num_nodes: int, num_gpus_per_node: int, ray_actor_type: Any, **placement: Any) -> Any:
        if ray_actor_type is policy_actor:
            return PolicyGroup(num_nodes, num_gpus_per_node, ray_actor_type, **placement)
        if ray_actor_type is not reward_actor:
            return stock(num_nodes, num_gpus_per_node, ray_actor_type, **placement)

        def make_group(**shared: Any) -> RayActorGroup:
            return stock(num_nodes, num_gpus_per_node, ray_actor_type, **shared)

        return RewardGroups(config.of_kind("rm"), make_group, **placement)

    return build

"""K groups of reward models where the host's driver and trainer expect one."""

import copy
from collections.abc import Callable
from typing import Any

import ray
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ray.launcher import RayActorGroup
from ray.util.placement_group import PlacementGroup, placement_group

from pama_plugin.host.actors.critic import restore_normalization
from pama_plugin.host.preflight.placement import Plan, Role, reward_role
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig


class RewardGroups:
    """A group per ``rm`` and ``hf`` objective, keyed by name; stands in for the host's single reward group.

    Those of ``rm`` are groups of stock ``RewardModelActor``, each a world of its own; those of ``hf`` are replicas.
    Each has the size and the share of a GPU that the plan says: in the placement group that the host gives (``pg``),
    else on whole GPUs of its own, or, with a fraction, on one that several objectives share.
    """

    def __init__(
        self,
        objectives: tuple[Objective, ...],
        plan: Plan,
        make_group: Callable[[Objective, Role, PlacementGroup | None], Any],
        pg: PlacementGroup | None,
    ) -> None:
        homes = {role.name: (role, block) for block in plan.blocks for role in block.roles}
        gpus: dict[Any, PlacementGroup] = {}
        self.objectives = objectives
        self.groups = {}
        for objective in objectives:
            role, block = homes[reward_role(objective)]
            if pg is None and 0 < role.share < 1 and block not in gpus:
                gpus[block] = placement_group([{"GPU": 1, "CPU": 1}])
                ray.get(gpus[block].ready())
            self.groups[objective.name] = make_group(objective, role, gpus.get(block, pg))

    def async_init_model_from_pretrained(self, strategy: Any, pretrain: str) -> list[Any]:
        """Load every objective's own model; ``pretrain`` is the first one's location, which the host passes."""
        refs = []
        for objective in self.objectives:
            group = self.groups[objective.name]
            if objective.kind == "hf":
                refs += group.async_ready()
                continue
            own = _strategy_of(objective, strategy)
            refs += group.async_init_model_from_pretrained(own, objective.location)
            refs += group.async_run_method("__ray_call__", lambda rank: restore_normalization(rank.model.module))
        return refs


def _strategy_of(objective: Objective, strategy: Any) -> Any:
    """The strategy with this objective's own settings. Copies are shallow: no rank sees another objective's."""
    own = copy.copy(strategy)
    own.args = copy.copy(strategy.args)
    settings = objective.settings
    if settings.value_head_prefix is not None:
        own.args.ds = copy.copy(strategy.args.ds)
        own.args.ds.value_head_prefix = settings.value_head_prefix
    if settings.offload is not None:
        own.args.reward = copy.copy(strategy.args.reward)
        own.args.reward.offload = settings.offload
    return own


class PolicyGroup(RayActorGroup):
    """The host's, which sends no values and returns along with the rollouts: only the critic reads them."""

    def async_run_method_batch(self, method_name: str, **kwargs: Any) -> list[Any]:
        if method_name == "append":
            lean = [Experience(**vars(full) | {"values": None, "returns": None}) for full in kwargs["experience"]]
            kwargs["experience"] = lean
        return super().async_run_method_batch(method_name, **kwargs)


def group_builder(
    config: PamaConfig, plan: Plan, stock: type[RayActorGroup], reward_actor: Any, policy_actor: Any
) -> Callable[..., Any]:
    """What the host's driver calls instead of ``RayActorGroup``."""

    def build(num_nodes: int, num_gpus_per_node: int, ray_actor_type: Any, **placement: Any) -> Any:
        if ray_actor_type is policy_actor:
            return PolicyGroup(num_nodes, num_gpus_per_node, ray_actor_type, **placement)
        if ray_actor_type is not reward_actor:
            return stock(num_nodes, num_gpus_per_node, ray_actor_type, **placement)

        def make_group(objective: Objective, role: Role, pg: PlacementGroup | None) -> Any:
            if objective.kind == "hf":
                from pama_plugin.host.actors.replicas import HfGroup

                return HfGroup(objective, role, pg)
            own = placement | {"pg": pg, "num_gpus_per_actor": role.share}
            return stock(role.nodes, role.gpus_per_node, ray_actor_type, **own)

        return RewardGroups(config.of_kind("rm", "hf"), plan, make_group, placement["pg"])

    return build

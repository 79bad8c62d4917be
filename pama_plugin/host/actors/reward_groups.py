"""K groups of reward models where OpenRLHF's driver and trainer expect one, and the groups of policy and reference.

``RankGroup`` and ``ReplicaGroup`` (in ``replicas``) are the two kinds of group. Both load their models, request rewards
and collect them; only replicas read text.
"""

import copy
import itertools
import time
from collections.abc import Callable
from typing import Any

import ray
from openrlhf.trainer.ppo_utils.experience import Experience as HostExperience
from openrlhf.trainer.ray.launcher import RayActorGroup
from ray.util.placement_group import PlacementGroup, placement_group
from torch import Tensor

from pama_plugin.errors import PamaError
from pama_plugin.host.actors.critic import restore_normalization
from pama_plugin.host.actors.pending import PendingRewards
from pama_plugin.host.preflight.placement import Plan, Role, reward_role
from pama_plugin.host.protocols import ActorGroup, Experience, Strategy
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig
from pama_plugin.settings.source import Source


class RankGroup:
    """OpenRLHF's group of reward-model actors with one objective's model, as a separate data-parallel world.

    Args:
        objective: an objective scored in ranks.
        actors: a group of OpenRLHF's ``RewardModelActor``.
    """

    def __init__(self, objective: Objective, actors: ActorGroup) -> None:
        self.objective, self.actors = objective, actors

    def load(self, strategy: Strategy) -> list[Any]:
        """Load the model on every rank; return references to wait for."""
        refs = self.actors.async_init_model_from_pretrained(
            _strategy_of(self.objective, strategy), self.objective.location
        )
        return refs + self.actors.async_run_method(
            "__ray_call__", lambda rank: restore_normalization(rank.model.module)
        )

    def run(self, call: Callable[[Any], Any]) -> list[Any]:
        """Call a function with every rank's actor; return references to the results."""
        return self.actors.async_run_method("__ray_call__", call)

    def request(self, samples_list: list[Experience], *, one_by_one: bool) -> PendingRewards:
        """Start scoring the micro-batches; with ``one_by_one``, wait and free the GPU cache for the next model."""
        start = time.perf_counter()
        # Pad with copies of the last micro-batch: with ZeRO-3 all ranks must run equally often, or they hang.
        ranks = len(self.actors._actor_handlers) // self.actors.duplicate_actors
        padded = samples_list + samples_list[-1:] * (-len(samples_list) % ranks)
        refs = self.actors.async_run_method_batch(
            method_name="forward",
            sequences=[samples.sequences for samples in padded],
            attention_mask=[samples.attention_mask for samples in padded],
            pad_sequence=[True] * len(padded),
        )
        if one_by_one:
            ray.get(refs)
            ray.get(self.actors.async_run_method(method_name="empty_cache"))
        return PendingRewards(start, refs)

    def collect(self, pending: PendingRewards, sizes: list[int]) -> list[Tensor]:
        """Return the rewards (b,) of each micro-batch; ranks of one ring or tensor-parallel group return copies."""
        parts = ray.get(pending.refs)[:: self.actors.duplicate_actors]
        return list(itertools.chain.from_iterable(parts))[: len(sizes)]


class RewardGroups:
    """One group per model, by the names of its objectives, in place of OpenRLHF's single reward group.

    Each group has the size and GPU share that the plan says. It runs in the placement group that OpenRLHF passes
    (``pg``), else on separate whole GPUs or, with a fraction, on one GPU that several objectives share.
    """

    def __init__(
        self,
        sources: tuple[Source, ...],
        plan: Plan,
        make_group: Callable[[Source, Role, PlacementGroup | None], Any],
        pg: PlacementGroup | None,
    ) -> None:
        homes = {role.name: (role, block) for block in plan.blocks for role in block.roles}
        gpus: dict[Any, PlacementGroup] = {}
        self.groups: dict[str, Any] = {}
        for source in sources:
            role, block = homes[reward_role(source)]
            if pg is None and 0 < role.share < 1 and block not in gpus:
                gpus[block] = placement_group([{"GPU": 1, "CPU": 1}])
                ray.get(gpus[block].ready())
            group = make_group(source, role, gpus.get(block, pg))
            self.groups |= {objective.name: group for objective in source.objectives}

    def async_init_model_from_pretrained(self, strategy: Strategy, pretrain: str) -> list[Any]:
        """Load every model. ``pretrain``, the first model's location, is not used."""
        different = {id(group): group for group in self.groups.values()}.values()
        return list(itertools.chain.from_iterable(group.load(strategy) for group in different))


def _strategy_of(objective: Objective, strategy: Strategy) -> Strategy:
    """Copy the strategy, with this objective's options. Copies are shallow; no rank sees another's options."""
    changed = copy.copy(strategy)
    changed.args = copy.copy(strategy.args)
    options = objective.settings
    changed.args.ds = copy.copy(strategy.args.ds)
    changed.args.ds.load_in_4bit = False  # of the policy only: other rewards would come out
    if options.value_head_prefix is not None:
        changed.args.ds.value_head_prefix = options.value_head_prefix
    if options.offload is not None:
        changed.args.reward = copy.copy(strategy.args.reward)
        changed.args.reward.offload = options.offload
    return changed


class PolicyGroup(RayActorGroup):
    """OpenRLHF's group of policy actors; does not send them values and returns, which only the critic reads.

    If ``saves`` is false, the run trains nothing, and OpenRLHF's request to save the model at its end is ignored.
    """

    saves = True

    def async_save_model(self) -> list[Any]:
        return super().async_save_model() if self.saves else []

    def async_run_method_batch(self, method_name: str, **kwargs: Any) -> list[Any]:
        if method_name == "append":
            lean = [HostExperience(**vars(full) | {"values": None, "returns": None}) for full in kwargs["experience"]]
            kwargs["experience"] = lean
        return super().async_run_method_batch(method_name, **kwargs)


class ReferenceInPolicy:
    """In place of the group of reference models: the ranks of a policy with LoRA, asked without their adapters."""

    def __init__(self, policy: ActorGroup) -> None:
        self.policy = policy
        self.duplicate_actors = policy.duplicate_actors

    def async_init_model_from_pretrained(self, strategy: Strategy, pretrain: str) -> list[Any]:
        return []  # the policy's group loads it

    def async_run_method(self, method_name: str, *args: Any) -> list[Any]:
        return self.policy.async_run_method(method_name, *args)

    def async_run_method_batch(self, method_name: str, **batches: Any) -> list[Any]:
        if method_name != "forward":
            raise PamaError(f"the reference model is asked for its log-probabilities only, found {method_name}")
        return self.policy.async_run_method_batch("forward_without_adapters", **batches)


def group_builder(
    config: PamaConfig,
    plan: Plan,
    stock: type[RayActorGroup],
    reward_actor: Any,
    policy_actor: Any,
    *,
    reference_in_policy: Any = None,
    saves: bool = True,
) -> Callable[..., Any]:
    """Return the function that OpenRLHF's driver calls in place of ``RayActorGroup``.

    Args:
        reference_in_policy: OpenRLHF's reference actor, if the policy has LoRA adapters: it is not started.
        saves: whether the policy is saved at the end.
    """
    policies: list[PolicyGroup] = []  # OpenRLHF builds it before the reference

    def build(num_nodes: int, num_gpus_per_node: int, ray_actor_type: Any, **placement: Any) -> Any:
        if ray_actor_type is policy_actor:
            policies.append(PolicyGroup(num_nodes, num_gpus_per_node, ray_actor_type, **placement))
            policies[-1].saves = saves
            return policies[-1]
        if ray_actor_type is reference_in_policy:
            return ReferenceInPolicy(policies[-1])
        if ray_actor_type is not reward_actor:
            return stock(num_nodes, num_gpus_per_node, ray_actor_type, **placement)

        def make_group(source: Source, role: Role, pg: PlacementGroup | None) -> Any:
            (first, *_) = source.objectives
            if first.reward_kind.scored_in == "replicas":
                from pama_plugin.host.actors.replicas import ReplicaGroup  # only replicas need its imports

                return ReplicaGroup(source, role, pg)
            where = placement | {"pg": pg, "num_gpus_per_actor": role.share}
            return RankGroup(first, stock(role.nodes, role.gpus_per_node, ray_actor_type, **where))

        return RewardGroups(config.sources("ranks", "replicas"), plan, make_group, placement["pg"])

    return build

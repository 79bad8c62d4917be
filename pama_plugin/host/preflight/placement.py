"""Computes which GPUs a run reserves, to print the plan before it starts and to refuse what Ray would wait for.

OpenRLHF reserves whole GPUs in *blocks* (a placement group, or single ranks), with one CPU beside each GPU. Models that
it colocates share one block: rank r of each is on GPU r of the block. ``tests/contract/test_placement.py`` compares
this with OpenRLHF's ``train``; the reward groups take their sizes and shares from the plan.
"""

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pama_plugin.errors import ConfigError
from pama_plugin.settings.run import PamaConfig
from pama_plugin.settings.source import Source

# Ray counts GPUs in steps of 0.0001: with a share rounded up, K of them would not fit their GPU and wait for ever.
GPU_STEPS = 10_000
HOST_SHARE = 0.2  # OpenRLHF's share for each rank on a shared GPU

# These are divisors below, and DeepSpeed and vLLM need them too.
AT_LEAST_ONE = (
    "train.batch_size",
    "train.micro_batch_size",
    "rollout.micro_batch_size",
    "ds.ring_attn_size",
    "ds.tensor_parallel_size",
    "vllm.tensor_parallel_size",
)


class Role(NamedTuple):
    """The ranks of one model, each with the same share of a GPU."""

    name: str
    nodes: int
    gpus_per_node: int
    share: float = 1.0

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


class Block(NamedTuple):
    """A number of whole GPUs, and the roles that run on them."""

    gpus: int
    roles: tuple[Role, ...]


class Node(NamedTuple):
    """A machine of the cluster. Its CPUs are not limited if --pama.plan states the cluster."""

    name: str
    gpus: int
    cpus: float = math.inf

    @property
    def pairs(self) -> int:
        """GPUs that can be reserved here: each needs a CPU of the same machine."""
        return int(min(self.gpus, self.cpus))


class Plan(NamedTuple):
    """Every block, in the order in which OpenRLHF reserves them."""

    blocks: tuple[Block, ...]

    @property
    def gpus(self) -> int:
        """GPUs that the run reserves, with a CPU beside each; actors without a GPU, such as the trainer, take none."""
        return sum(block.gpus for block in self.blocks)


def make_plan(args: argparse.Namespace, config: PamaConfig) -> Plan:
    """Compute what OpenRLHF's ``train`` will reserve.

    Args:
        args: OpenRLHF's flags, flat: ``getattr(args, "actor.num_nodes")``.
        config: each model that scores objectives in ranks or replicas becomes a role.

    Raises:
        ConfigError: no cluster can serve the flags; OpenRLHF would fail, or wait for ever, after Ray has started.
    """
    for flag in AT_LEAST_ONE:
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag} must be at least 1, found {getattr(args, flag)}")
    colocate_all = getattr(args, "train.colocate_all")
    rollout_is_inside = colocate_all and not getattr(args, "train.async_enable")
    policy_shares = colocate_all or getattr(args, "train.colocate_actor_ref")

    policy = _role(args, "policy", "actor")
    references = [_role(args, "reference", "ref")] if getattr(args, "algo.kl.init_coef") > 0 else []
    critics = [_role(args, "critic", "critic")] if getattr(args, "algo.advantage.estimator") == "gae" else []
    critic_shares = bool(critics) and getattr(args, "train.colocate_critic_reward")
    rewards = _reward_roles(args, config.sources("ranks", "replicas"), colocated=colocate_all or critic_shares)
    engines = getattr(args, "vllm.num_engines") or 0
    rollouts = [Role("rollout", engines, getattr(args, "vllm.tensor_parallel_size"))] if engines > 0 else []

    # Replicas accept unequal shares of a batch.
    independent = {reward_role(source) for source in config.sources("replicas")}
    # With LoRA the reference is the policy with its adapters off.
    apart = [] if getattr(args, "ds.lora.rank") else references
    for role in (policy, *apart, *critics, *rewards):
        if role.name not in independent:
            _check_batches(args, role)
    if policy_shares and references and policy[1:] != references[0][1:]:
        _refuse_sizes("--train.colocate_all and --train.colocate_actor_ref", policy, references[0])
    if rollout_is_inside and rollouts and policy.ranks != rollouts[0].ranks:
        _refuse_sizes("--train.colocate_all without --train.async_enable", policy, rollouts[0])
    if critic_shares and critics[0][1:] != (default := _role(args, "reward", "reward"))[1:]:
        _refuse_sizes("--train.colocate_critic_reward", critics[0], default)

    first = [*rollouts, policy, *apart] if rollout_is_inside else [policy, *apart]
    on_cpus = [role for role in rewards if not role.share]
    second = [*critics, *(role for role in rewards if role.share)]
    if colocate_all and not critic_shares:
        first, second = [*first, *second], []
    blocks = [_share(policy.ranks, first)] if policy_shares else []
    if not rollout_is_inside:
        blocks += _stand_alone(rollouts)
    if not policy_shares:
        blocks += _stand_alone(first)
    blocks += [_share(critics[0].ranks, second)] if critic_shares else _stand_alone(second)
    return Plan((*blocks, *(Block(0, (role,)) for role in on_cpus)))


def reward_role(source: Source) -> str:
    """Return the name of the role of a reward model."""
    return f"reward/{source.name}"


def _role(args: argparse.Namespace, name: str, flag: str) -> Role:
    return Role(name, getattr(args, f"{flag}.num_nodes"), getattr(args, f"{flag}.num_gpus_per_node"))


def _reward_roles(args: argparse.Namespace, sources: Sequence[Source], *, colocated: bool) -> list[Role]:
    """Return one role per model. Where OpenRLHF colocates its one reward model, those on GPUs split its share."""
    on_gpus = [source for source in sources if source.objectives[0].settings.gpus != 0]
    share = math.floor(HOST_SHARE / max(1, len(on_gpus)) * GPU_STEPS) / GPU_STEPS if colocated else 1.0
    roles = []
    for source in sources:
        objective = source.objectives[0]
        options, in_ranks = objective.settings, objective.reward_kind.scored_in == "ranks"
        if in_ranks and options.offload and getattr(args, "ds.zero_stage") != 3:
            raise ConfigError(
                f"objective {objective.name!r}: offload=true needs --ds.zero_stage 3, without which DeepSpeed keeps "
                f"parameters on the GPU, found {getattr(args, 'ds.zero_stage')}"
            )
        if colocated and options.gpus is not None and 0 < options.gpus < 1:
            raise ConfigError(
                f"objective {objective.name!r}: gpus must be a whole number where reward models are colocated "
                f"(they split one share of a GPU anyway), found {options.gpus}"
            )
        default = _role(args, reward_role(source), "reward")
        if not in_ranks:
            if 0 < options.gpus < 1 < options.gpus * options.replicas:
                raise ConfigError(
                    f"objective {objective.name!r}: replicas with a fraction of a GPU share one, so replicas × gpus "
                    f"must be at most 1, found {options.replicas} × {options.gpus}"
                )
            roles.append(Role(default.name, 1, options.replicas, min(options.gpus, share)))
        elif options.gpus is not None and options.gpus < 1:
            roles.append(Role(default.name, 1, 1, options.gpus))
        else:
            gpus_per_node = int(options.gpus or default.gpus_per_node)
            roles.append(Role(default.name, options.nodes or default.nodes, gpus_per_node, share))
    return roles


def _check_batches(args: argparse.Namespace, role: Role) -> None:
    """Refuse splits of a batch over ranks at which OpenRLHF or DeepSpeed would fail minutes after the start."""
    copies = getattr(args, "ds.ring_attn_size") * getattr(args, "ds.tensor_parallel_size")
    if role.ranks < 1 or role.ranks % copies:
        raise ConfigError(
            f"{role.name}: ranks (nodes × GPUs per node) must be a positive multiple of --ds.ring_attn_size × "
            f"--ds.tensor_parallel_size = {copies}, found {role.ranks}"
        )
    parallel = role.ranks // copies
    dynamic = getattr(args, "train.dynamic_batch_enable")
    batch, micro_batch = getattr(args, "train.batch_size"), getattr(args, "train.micro_batch_size")
    # DeepSpeed checks this even for models that it never trains. Only trained models have dynamic batches.
    if batch % (micro_batch * parallel) and not (dynamic and role.name in ("policy", "critic")):
        raise ConfigError(
            f"{role.name}: --train.batch_size must be a multiple of --train.micro_batch_size × data-parallel ranks = "
            f"{micro_batch} × {parallel}, found {batch}"
        )
    responses = getattr(args, "rollout.batch_size") * getattr(args, "rollout.n_samples_per_prompt")
    micro_batches = responses // getattr(args, "rollout.micro_batch_size")
    if micro_batches < parallel and not dynamic:  # the number of dynamic ones depends on the responses
        raise ConfigError(
            f"{role.name}: --rollout.batch_size × --rollout.n_samples_per_prompt // --rollout.micro_batch_size must be "
            f"at least the {parallel} data-parallel ranks, found {micro_batches}"
        )


def _refuse_sizes(cause: str, one: Role, other: Role) -> None:
    sizes = ", ".join(f"{role.name} {role.nodes} × {role.gpus_per_node}" for role in (one, other))
    raise ConfigError(f"{cause}: {one.name} and {other.name} must be of the same size, found {sizes}")


def _share(gpus: int, roles: Iterable[Role]) -> Block:
    block = Block(gpus, tuple(role._replace(share=min(role.share, HOST_SHARE)) for role in roles))
    for role in block.roles:
        if role.ranks > gpus:
            raise ConfigError(
                f"{role.name}: at most one rank per shared GPU, which are {gpus} here, found {role.ranks} ranks"
            )
    return block


def _stand_alone(roles: Iterable[Role]) -> list[Block]:
    """One block per role with whole GPUs; fractions fill a GPU, in order, until the next one would not fit."""
    blocks: list[Block] = []
    for role in roles:
        for index, block in enumerate(blocks):
            steps = sum(round(other.share * GPU_STEPS) * other.ranks for other in (*block.roles, role))
            if role.share < 1 and steps <= GPU_STEPS:
                blocks[index] = Block(1, (*block.roles, role))
                break
        else:
            blocks.append(Block(role.ranks if role.share == 1 else 1, (role,)))
    return blocks


def parse_cluster(text: str) -> tuple[Node, ...]:
    """Return the machines of ``NODESxGPUS``, or of ``GPUS`` on one node; anything else raises ``ConfigError``.

    >>> [(node.name, node.gpus) for node in parse_cluster("2x8")]
    [('1', 8), ('2', 8)]
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", text)
    if not match:
        raise ConfigError(f"--pama.plan must be NODESxGPUS, such as 1x8, found {text!r}")
    return tuple(Node(str(index + 1), int(match[2])) for index in range(int(match[1] or 1)))


def place(plan: Plan, cluster: Sequence[Node]) -> list[list[str]]:
    """Return, for every block, the node of each of its GPUs; fewer nodes if the cluster is too small.

    Packs as Ray packs a placement group: onto the emptiest node first, as many GPUs as it has free.
    """
    free = [node.pairs for node in cluster]
    placed = []
    for block in plan.blocks:
        nodes: list[str] = []
        while len(nodes) < block.gpus and any(free):
            emptiest = free.index(max(free))
            taken = min(free[emptiest], block.gpus - len(nodes))
            free[emptiest] -= taken
            nodes += [cluster[emptiest].name] * taken
        placed.append(nodes)
    return placed


def format_plan(plan: Plan, cluster: Sequence[Node], memory: Mapping[str, float] | None = None) -> str:
    """Format the plan as a table: one line per role, with the nodes on which it is expected.

    Args:
        memory: role → GiB of each rank; without it the table has no such column.
    """
    rows = [("role", "ranks", "GPUs each", *(["GiB each"] if memory else []), "block", "node")]
    for index, (block, nodes) in enumerate(zip(plan.blocks, place(plan, cluster)), start=1):
        for role in block.roles:
            where = list(dict.fromkeys(nodes[: role.ranks])) + ["none"] * (len(nodes) < min(role.ranks, block.gpus))
            size = [f"{memory[role.name]:.1f}" if role.name in memory else "–"] if memory else []
            rows.append((role.name, str(role.ranks), f"{role.share:g}", *size, str(index), ", ".join(where) or "any"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:-1])), node])
        for name, *cells, node in rows
    ]
    total = f"PAMA plan: {plan.gpus} of {sum(node.gpus for node in cluster)} GPUs, one CPU beside each"
    return "\n".join([total, *lines])


def check_cluster(plan: Plan, cluster: Sequence[Node]) -> None:
    """Raise ``ConfigError`` if the cluster has too few GPUs, or too few CPUs beside them: Ray would wait for ever."""
    if sum(node.pairs for node in cluster) >= plan.gpus:
        return
    needed = ", ".join(f"{block.gpus} for {' + '.join(role.name for role in block.roles)}" for block in plan.blocks)
    available = " + ".join(str(node.gpus) for node in cluster) + " GPUs"
    if any(node.cpus < node.gpus for node in cluster):
        available += f" with {' + '.join(f'{node.cpus:g}' for node in cluster)} CPUs"
    raise ConfigError(
        f"the run needs {plan.gpus} GPUs and a CPU beside each ({needed}), found {available}: take smaller groups "
        "(--*.num_gpus_per_node, gpus= of an objective), share GPUs (--train.colocate_all, gpus=0.5), or give "
        "--pama.allow_waiting if the cluster will grow"
    )

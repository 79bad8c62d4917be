"""Models that read text with their own tokenizer: one Ray actor per replica."""

import math
import os
import time
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pama_plugin.errors import printable
from pama_plugin.host.actors.pending import PendingRewards
from pama_plugin.host.preflight.placement import Role
from pama_plugin.host.protocols import Strategy
from pama_plugin.rewards import Conversation, Inspection, TextModel
from pama_plugin.settings.objective import Objective


class Replica:
    """One copy of the model. If the actor dies, Ray restarts it and loads the model again."""

    def __init__(self, objective: Objective) -> None:
        options, device = objective.settings, "cpu"
        if options.gpus > 0 and torch.cuda.is_available():
            from openrlhf.trainer.ray.utils import ray_noset_visible_devices  # late: imports vLLM and DeepSpeed

            device = f"cuda:{ray.get_gpu_ids()[0]}" if ray_noset_visible_devices() else "cuda"
        if options.gpus == 0:  # Ray gives one thread to an actor that reserves no CPU
            torch.set_num_threads(max((os.cpu_count() or 1) // options.replicas, 1))
        self.model: TextModel = objective.reward_kind.resolve("load")(objective.location, options, device)

    def ready(self) -> None:
        """Return once the model is loaded."""

    def score(self, conversations: list[Conversation], free_memory: bool) -> list[float | str]:
        """Return one reward per conversation, or the reason why it has none."""
        rewards = self.model.score_each(conversations)
        if free_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return rewards

    def inspect(self, conversation: Conversation) -> Inspection:
        return self.model.inspect(conversation)


class ReplicaGroup:
    """The replicas of one objective; each scores a part of every batch."""

    def __init__(self, objective: Objective, role: Role, pg: PlacementGroup | None) -> None:
        self.on_gpus, self.timeout = role.share > 0, objective.settings.timeout
        self.replicas = []
        for rank in range(role.ranks):
            # OpenRLHF's placement group has one bundle per rank; replicas that share one GPU share its only bundle.
            bundle = PlacementGroupSchedulingStrategy(pg, rank % pg.bundle_count) if pg else "DEFAULT"
            actor = ray.remote(
                num_gpus=role.share,
                num_cpus=role.share,
                scheduling_strategy=bundle if self.on_gpus else "DEFAULT",
                max_restarts=3,
                max_task_retries=3,
            )(Replica)
            self.replicas.append(actor.remote(objective))

    def load(self, strategy: Strategy) -> list[Any]:
        """Return references to wait for until every model is loaded."""
        return [replica.ready.remote() for replica in self.replicas]

    def request(self, conversations: list[Conversation], *, one_by_one: bool) -> PendingRewards:
        """Start scoring; with ``one_by_one``, wait for the rewards, because another model needs the GPU next."""
        start = time.perf_counter()
        share = -(-len(conversations) // len(self.replicas))
        parts = [conversations[first : first + share] for first in range(0, len(conversations), share)]
        alone = one_by_one and self.on_gpus
        refs = [replica.score.remote(part, alone) for replica, part in zip(self.replicas, parts)]
        pending = PendingRewards(start, refs, [len(part) for part in parts])
        if alone:
            ray.wait(pending.refs, num_returns=len(pending.refs), timeout=self.timeout)
        return pending

    def collect(self, pending: PendingRewards, sizes: list[int]) -> list[torch.Tensor]:
        """Return the rewards (b,) of each micro-batch; NaN for one that is missing, with the reason in ``pending``."""
        left = max(pending.start + self.timeout - time.perf_counter(), 0)
        _, late = ray.wait(pending.refs, num_returns=len(pending.refs), timeout=left)
        answers: list[float | str] = []
        for replica, ref, size in zip(self.replicas, pending.refs, pending.sizes):
            if ref in late:
                ray.cancel(ref)  # or the actor would score the same texts again after its restart
                ray.kill(replica, no_restart=False)
                answers += [f"no answer within timeout={self.timeout:g} s"] * size
                continue
            try:
                answers += ray.get(ref)
            except ray.exceptions.RayError as error:
                answers += [f"its replica returned no rewards: {error}"] * size
        pending.reasons = {index: printable(answer) for index, answer in enumerate(answers) if isinstance(answer, str)}
        rewards = [math.nan if isinstance(answer, str) else answer for answer in answers]
        return list(torch.split(torch.tensor(rewards), sizes))

    def inspect(self, conversation: Conversation) -> Inspection | None:
        """Return the text that the model reads; None if it cannot read it, which the missing reward reports too."""
        try:
            inspection: Inspection = ray.get(self.replicas[0].inspect.remote(conversation), timeout=self.timeout)
        except ray.exceptions.RayError:
            return None
        return inspection

"""Models that read text with their own tokenizer: one Ray actor per replica."""

import faulthandler
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pama_plugin.errors import printable, problem_of
from pama_plugin.host.actors.pending import PendingRewards
from pama_plugin.host.preflight.placement import Role
from pama_plugin.host.protocols import Strategy
from pama_plugin.rewards import Conversation, Inspection, TextModel
from pama_plugin.settings.source import Source

BATCHES = 16  # of the model, in one call; ``timeout`` is for one call
RESTARTS = 20  # of a replica, in a run


class Replica:
    """One copy of the model. If the actor dies, Ray restarts it and loads the model again."""

    def __init__(self, source: Source) -> None:
        options, device = source.objectives[0].settings, "cpu"
        self.timeout = options.timeout
        if options.gpus > 0 and torch.cuda.is_available():
            from openrlhf.trainer.ray.utils import ray_noset_visible_devices  # late: imports vLLM and DeepSpeed

            device = f"cuda:{ray.get_gpu_ids()[0]}" if ray_noset_visible_devices() else "cuda"
        if options.gpus == 0:  # Ray gives one thread to an actor that reserves no CPU
            torch.set_num_threads(max((os.cpu_count() or 1) // options.replicas, 1))
        self.model: TextModel = source.load(device)

    def ready(self) -> None:
        """Return once the model is loaded."""

    def score(self, conversations: list[Conversation], free_memory: bool) -> list[Any]:
        """Return the rewards of each conversation, or the reason why it has none."""
        with self._time_limit():
            rewards = self.model.score_each(conversations)
        if free_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return rewards

    def inspect(self, conversation: Conversation) -> Inspection:
        with self._time_limit():
            return self.model.inspect(conversation)

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        """End this process, with the stacks of its threads in its log, if the body takes longer than ``timeout``.

        The timer of faulthandler runs without the interpreter, which a template or a kernel may hold.
        """
        faulthandler.dump_traceback_later(self.timeout, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


class ReplicaGroup:
    """The replicas of one source; each scores a part of every batch."""

    def __init__(self, source: Source, role: Role, pg: PlacementGroup | None) -> None:
        options = source.objectives[0].settings
        self.on_gpus, self.timeout, self.count = role.share > 0, options.timeout, len(source.objectives)
        self.chunk = BATCHES * options.batch_size
        self.replicas = []
        for rank in range(role.ranks):
            # OpenRLHF's placement group has one bundle per rank; replicas that share one GPU share its only bundle.
            bundle = PlacementGroupSchedulingStrategy(pg, rank % pg.bundle_count) if pg else "DEFAULT"
            actor = ray.remote(
                num_gpus=role.share,
                num_cpus=role.share,
                scheduling_strategy=bundle if self.on_gpus else "DEFAULT",
                max_restarts=RESTARTS,
                max_task_retries=0,  # a retry would take the calls that wait behind it down with it; see ``_answer``
            )(Replica)
            self.replicas.append(actor.remote(source))

    def load(self, strategy: Strategy) -> list[Any]:
        """Return references to wait for until every model is loaded."""
        return [replica.ready.remote() for replica in self.replicas]

    def request(self, conversations: list[Conversation], *, one_by_one: bool) -> PendingRewards:
        """Start scoring; with ``one_by_one``, wait for the rewards, because another model needs the GPU next."""
        start = time.perf_counter()
        share = -(-len(conversations) // len(self.replicas))
        parts = [conversations[first : first + share] for first in range(0, len(conversations), share)]
        alone = one_by_one and self.on_gpus
        chunks = [
            (replica, part[first : first + self.chunk])
            for replica, part in zip(self.replicas, parts)
            for first in range(0, len(part), self.chunk)
        ]
        refs = [replica.score.remote(chunk, alone) for replica, chunk in chunks]
        pending = PendingRewards(start, refs, chunks)
        if alone:
            ray.wait(pending.refs, num_returns=len(pending.refs))
        return pending

    def collect(self, pending: PendingRewards, sizes: list[int]) -> list[torch.Tensor]:
        """Return the rewards of each micro-batch: (b,), or (b, K) of K objectives.

        A missing one is NaN, with the reason in ``pending``.
        """
        answers: list[Any] = []
        for ref, (replica, chunk) in zip(pending.refs, pending.calls):
            answers += self._answer(ref, replica, chunk)
        pending.reasons = {index: printable(answer) for index, answer in enumerate(answers) if isinstance(answer, str)}
        missing = math.nan if self.count == 1 else [math.nan] * self.count
        rewards = [missing if isinstance(answer, str) else answer for answer in answers]
        return list(torch.split(torch.tensor(rewards), sizes))

    def _answer(self, ref: Any, replica: Any, chunk: list[Conversation]) -> list[Any]:
        """The result of a call. If its process ended, perhaps in a call before it, the call is made once more."""
        try:
            try:
                answers: list[Any] = ray.get(ref)
            except (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError):
                _wait_until_restarted(replica)
                answers = ray.get(replica.score.remote(chunk, self.on_gpus))
        except ray.exceptions.RayTaskError as error:
            answers = [problem_of(error.cause)] * len(chunk)
        except ray.exceptions.RayError as error:
            reason = f"its replica died, or took longer than timeout={self.timeout:g} s: {error}"
            answers = [reason] * len(chunk)
        return answers

    def inspect(self, conversation: Conversation) -> Inspection | None:
        """Return the text that the model reads; None if it cannot read it, which the missing reward reports too."""
        try:
            inspection: Inspection = ray.get(self.replicas[0].inspect.remote(conversation))
        except ray.exceptions.RayError:
            return None
        return inspection


def _wait_until_restarted(replica: Any) -> None:
    """Return once the model is loaded again.

    Raises:
        ActorDiedError: it has been restarted too often.
    """
    while True:
        try:
            ray.get(replica.ready.remote())
        except ray.exceptions.ActorUnavailableError:  # it is starting
            time.sleep(1)
        else:
            return

"""Rewards that were requested from a group of actors, and not received yet."""

import threading
import time
from collections.abc import Sequence
from typing import Any


class PendingRewards:
    """Ray references to requested rewards, and how long they took to arrive.

    Args:
        start: when they were asked for, by ``time.perf_counter``.
        refs: of the parts that they come in.
        sizes: rewards in each part, where whoever collects them needs to know.
    """

    def __init__(self, start: float, refs: list[Any], sizes: Sequence[int] = ()) -> None:
        self.start, self.refs, self.sizes = start, refs, sizes
        self.pending, self.lock = len(refs), threading.Lock()
        self.arrived = threading.Event()
        for ref in refs:
            ref.future().add_done_callback(self._arrive)

    def _arrive(self, _: Any) -> None:
        """Called by a thread of Ray's."""
        with self.lock:
            self.pending -= 1
            self.end = time.perf_counter()
            if not self.pending:
                self.arrived.set()

    def seconds(self) -> float:
        """From ``start`` to the last reward, which is waited for."""
        self.arrived.wait()
        return self.end - self.start

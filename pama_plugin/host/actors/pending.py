"""Rewards that were requested from a group of actors but not received yet."""

import threading
import time
from collections.abc import Sequence
from typing import Any


class PendingRewards:
    """Ray references to requested rewards, and the time that they took to arrive.

    Args:
        start: time of the request, from ``time.perf_counter``.
        refs: one reference per part of the rewards.
        calls: what each part was requested with, if the group needs it to collect them.

    Attributes:
        reasons: position of a reward that is missing → the reason, where the group knows it once it has collected.
    """

    def __init__(self, start: float, refs: list[Any], calls: Sequence[Any] = ()) -> None:
        self.start, self.refs, self.calls = start, refs, calls
        self.reasons: dict[int, str] = {}
        self.pending, self.lock = len(refs), threading.Lock()
        self.arrived = threading.Event()
        for ref in refs:
            ref.future().add_done_callback(self._arrive)

    def _arrive(self, _: Any) -> None:
        """Runs in one of Ray's threads."""
        with self.lock:
            self.pending -= 1
            self.end = time.perf_counter()
            if not self.pending:
                self.arrived.set()

    def seconds(self) -> float:
        """Wait for the last reward; return the seconds since ``start``."""
        self.arrived.wait()
        return self.end - self.start

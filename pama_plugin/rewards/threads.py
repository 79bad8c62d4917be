"""Calls of user functions in threads, because a call may never return."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pama_plugin.errors import PamaError
from pama_plugin.rewards.user_code import describe


class Threads:
    """Run functions in threads next to the event loop, with a limit on parallel calls and on the time of each call.

    A thread cannot be killed, so a call that exceeds its time is abandoned, and counts as lost until it returns. The
    threads are daemons, because an abandoned call would otherwise prevent the process from exiting.

    Args:
        limit: maximum number of parallel calls, and of lost calls, after which calls are refused.
        timeout: seconds per call.
    """

    def __init__(self, limit: int, timeout: float) -> None:
        self.limit, self.timeout = limit, timeout
        self.slots = asyncio.Semaphore(limit)
        self.lost = 0
        self.lock = threading.Lock()

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return ``function(*arguments)``; raise ``PamaError`` if it raises, exits or takes too long."""
        async with self.slots:
            if self.lost >= self.limit:
                raise PamaError(f"not called, because {self.lost} earlier calls have not returned")
            done: Future[Any] = Future()
            done.set_running_or_notify_cancel()  # else a cancelled waiter cancels it, and the thread cannot set it
            threading.Thread(target=_run, args=(done, function, arguments), daemon=True).start()
            try:
                return await asyncio.wait_for(asyncio.wrap_future(done), self.timeout)
            except asyncio.TimeoutError:
                self._lose(done)
                raise PamaError(f"no answer within {self.timeout:g} s") from None

    def _lose(self, done: Future[Any]) -> None:
        with self.lock:
            self.lost += 1
        done.add_done_callback(self._find)

    def _find(self, _: Future[Any]) -> None:
        with self.lock:
            self.lost -= 1


def _run(done: "Future[Any]", function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        done.set_result(function(*arguments))
    except BaseException as error:  # SystemExit would end the event loop; a future cannot carry StopIteration
        done.set_exception(describe(error))

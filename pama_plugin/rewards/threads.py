"""Calls of other people's functions: each in a thread that may never come back."""

import asyncio
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pama_plugin.errors import PamaError


class Threads:
    """Runs functions beside the event loop, a limited number at once, each for a limited time.

    A thread cannot be killed: a call that outlasts its time is given up and counted until it returns after all. The
    threads are daemons, or one such call would keep the process from ending.

    Args:
        limit: calls at once, and calls that may be given up before no more are made.
        timeout: seconds for one call.
    """

    def __init__(self, limit: int, timeout: float) -> None:
        self.limit, self.timeout = limit, timeout
        self.slots = asyncio.Semaphore(limit)
        self.lost = 0
        self.lock = threading.Lock()

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function(*arguments)`` returns; ``PamaError`` if it raises, exits or takes too long."""
        async with self.slots:
            if self.lost >= self.limit:
                raise PamaError(f"{self.lost} earlier calls never returned, so no more are made")
            done: Future[Any] = Future()
            done.set_running_or_notify_cancel()  # or a cancelled waiter would cancel it, and the thread fail to set it
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
    except BaseException as error:  # SystemExit would end the event loop, and StopIteration cannot cross into it
        try:
            problem = PamaError(f"{type(error).__name__}: {error}{_where(error)}")
        except Exception:  # from somebody else's __str__: whoever waits must still be told, or waits for the time-out
            problem = PamaError(type(error).__name__)
        problem.__cause__ = error
        done.set_exception(problem)


def _where(error: BaseException) -> str:
    """The last line of the function's own file on the way to the error; the first frame is that of the call."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""

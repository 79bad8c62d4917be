"""Calls of user functions in processes, because a function may hold the interpreter, crash or never return."""

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import weakref
from typing import Any

from pama_plugin.errors import PamaError
from pama_plugin.rewards.worker import LENGTH, pack, read

logger = logging.getLogger(__name__)

LOAD_SECONDS = 600.0  # limit of an import
MUCH_MEMORY = 1024  # MB per process, above which a warning says how to need less


class Processes:
    """Run the function of a file in processes of its own, one call at a time in each.

    The first process starts at once. Others start, one for each call that waits, once no call has found an idle process
    for as long as a start takes. A process whose call takes too long is killed, and with it what the call has started;
    no other call is affected.

    Args:
        path: the file.
        name: the function.
        keys: what it is asked for, as ``user_code.load`` takes them.
        limit: maximum number of processes, and of parallel calls.
        timeout: seconds per call.

    Raises:
        PamaError: the file cannot be imported.
    """

    def __init__(self, path: str, name: str, keys: tuple[str | None, ...], limit: int, timeout: float) -> None:
        self.path, self.function, self.limit, self.timeout = path, (path, name, keys), limit, timeout
        self.slots = asyncio.Semaphore(limit)
        self.idle: asyncio.LifoQueue[_Process | PamaError] = asyncio.LifoQueue()
        self.count, self.waiting = 1, 0  # processes, with those that are starting; calls that find none idle
        self.queue_since: float | None = None  # no call has found an idle process since
        self.starts: set[asyncio.Task[None]] = set()
        start = time.perf_counter()
        first = _Process(*self.function)
        self.patience = time.perf_counter() - start
        self.idle.put_nowait(first)
        if first.megabytes > MUCH_MEMORY and limit > 1:
            logger.warning(
                "%s takes %d MB in each of up to %d processes per rollout engine; concurrency= limits their number, "
                "isolate=false imports the file once, in the engine",
                *(path, first.megabytes, limit),
            )

    async def call(self, *arguments: Any) -> Any:
        """Return ``function(*arguments)``; raise ``PamaError`` if it raises, crashes or takes too long."""
        async with self.slots:
            process = await self._take()
            try:
                answer, value = await asyncio.wait_for(process.ask(arguments), self.timeout)
            except asyncio.TimeoutError:
                raise PamaError(f"no answer within {self.timeout:g} s") from None
            except (EOFError, ConnectionError):
                raise PamaError(f"its process {process.ending()}") from None
            finally:
                if process.busy:
                    self._drop(process)
                else:
                    self.idle.put_nowait(process)
        if answer == "problem":
            raise PamaError(value)
        return value

    async def _take(self) -> "_Process":
        while True:
            if self.count == 0:
                self._start_another()
            self.waiting += 1
            try:
                found = await self._wait()
            finally:
                self.waiting -= 1
            if isinstance(found, PamaError):
                raise found
            if found.process.poll() is None:
                return found
            self._drop(found)  # it died while it was idle, which is no failure of this call

    async def _wait(self) -> "_Process | PamaError":
        if not self.idle.empty():
            self.queue_since = None
            return self.idle.get_nowait()
        self.queue_since = self.queue_since or time.monotonic()
        left = self.patience - (time.monotonic() - self.queue_since)
        try:
            return await asyncio.wait_for(self.idle.get(), max(left, 0.0))
        except asyncio.TimeoutError:
            self.queue_since = time.monotonic()
            while self.idle.empty() and self.count < self.limit and len(self.starts) < self.waiting:
                self._start_another()
            return await self.idle.get()

    def _drop(self, process: "_Process") -> None:
        process.kill()
        self.count -= 1
        if self.waiting:
            self._start_another()

    def _start_another(self) -> None:
        self.count += 1
        task = asyncio.create_task(self._start())
        self.starts.add(task)  # the event loop keeps no strong reference
        task.add_done_callback(self.starts.discard)

    async def _start(self) -> None:
        try:
            self.idle.put_nowait(await asyncio.to_thread(_Process, *self.function))
        except (PamaError, OSError) as error:
            self.count -= 1
            if self.count:  # those that run go on, and no more are tried
                self.limit = self.count
                logger.warning("another process for %s cannot start, %d are running: %s", self.path, self.count, error)
                return
            for _ in range(self.waiting):
                self.idle.put_nowait(PamaError(f"its process cannot start: {error}"))


class _Process:
    """One process, which is loaded when the constructor returns."""

    def __init__(self, path: str, name: str, keys: tuple[str | None, ...]) -> None:
        self.busy = False
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c"),
                    f"import sys; sys.path[:] = {sys.path!r}; from pama_plugin.rewards.worker import serve; "
                    f"serve({theirs.fileno()}, {path!r}, {name!r}, {keys!r})",
                ],
                stdin=subprocess.PIPE,  # closes with this process, which ends the other
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.kill = weakref.finalize(self, _kill, self.process, self.socket)
        self.socket.settimeout(LOAD_SECONDS)
        try:
            with self.socket.makefile("rb") as stream:
                answer, value = pickle.loads(read(stream.read))
        except TimeoutError:
            answer, value = "problem", f"{path} was not imported within {LOAD_SECONDS:g} s"
        except (EOFError, ConnectionError):
            answer, value = "problem", f"the import of {path} {self.ending()}"
        if answer == "problem":
            self.kill()
            raise PamaError(value)
        self.megabytes: int = value
        self.socket.setblocking(False)

    async def ask(self, arguments: tuple[Any, ...]) -> tuple[str, Any]:
        """The answer to one call. Raises ``EOFError`` or ``ConnectionError`` if the process ends."""
        self.busy = True
        await asyncio.get_running_loop().sock_sendall(self.socket, pack(arguments))
        length = int.from_bytes(await self._receive(LENGTH), "big")
        answer: tuple[str, Any] = pickle.loads(await self._receive(length))
        self.busy = False
        return answer

    async def _receive(self, length: int) -> bytes:
        received = bytearray()
        while len(received) < length:
            part = await asyncio.get_running_loop().sock_recv(self.socket, length - len(received))
            if not part:
                raise EOFError
            received += part
        return bytes(received)

    def ending(self) -> str:
        """How the process ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.process.wait(timeout=1)
            return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        return "closed its connection"


def _kill(process: "subprocess.Popen[bytes]", connection: socket.socket) -> None:
    """Kill the process and what it has started. Python also calls this at its exit."""
    connection.close()
    process.stdin.close()  # type: ignore[union-attr]  # a pipe
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=1)

"""The process of a ``py`` function. ``processes.py`` starts it and calls the function over a socket.

Each message is a pickle after its length. The process first sends ``("loaded", MB of memory)``, then one answer to
each call: ``("reward", number or list)`` or ``("problem", text)``.
"""

import fcntl
import os
import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pama_plugin.rewards.user_code import describe, load

LENGTH = 8  # bytes
LONGEST_PROBLEM = 10_000  # characters


def pack(message: Any) -> bytes:
    """The bytes of a message."""
    body = pickle.dumps(message)
    return len(body).to_bytes(LENGTH, "big") + body


def read(read_bytes: Callable[[int], bytes]) -> bytes:
    """The pickle of the next message. Raises ``EOFError`` if the other side is gone."""
    body = read_bytes(int.from_bytes(read_bytes(LENGTH), "big"))
    if not body:
        raise EOFError
    return body


def serve(descriptor: int, path: str, name: str, keys: tuple[str | None, ...]) -> None:
    """Load the function and answer calls until the socket is closed.

    Calls run in the main thread, where a function may set signal handlers, as libraries with a time limit of their own
    do.
    """
    _end_with_the_parent()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # else a killed process loses its output
    os.set_inheritable(descriptor, False)
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as stream:
        answer: tuple[str, Any]
        try:
            function = load(path, name, keys, alone=True)
            answer = "loaded", _memory()
        except BaseException as error:
            answer = "problem", _text(error)
        while True:
            stream.write(pack(answer))
            stream.flush()
            try:
                message = read(stream.read)
            except EOFError:
                return
            answer = _call(function, message)


def _call(function: Callable[..., Any], message: bytes) -> tuple[str, Any]:
    try:
        return "reward", function(*pickle.loads(message))
    except BaseException as error:  # SystemExit is a failure of one reward, too
        return "problem", _text(error)


def _text(error: BaseException) -> str:
    return str(describe(error))[:LONGEST_PROBLEM]


def _end_with_the_parent() -> None:
    """Have the kernel end this process when the parent's end of standard input closes, whatever holds the GIL."""
    lifeline = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())  # the group, with what the function has started
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)  # SIGIO, fatal by default


def _memory() -> int:
    """MB of memory in use; 0 where the system does not say."""
    statistics = Path("/proc/self/statm")
    pages = int(statistics.read_text().split()[1]) if statistics.exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20

"""A reward server that fails on demand, on a real socket, so that a client meets what it would meet in a run.

with FaultServer("flaky", count=2) as server:
    ...  # ask server.url
    server.mode = "hang"
"""

import functools
import gzip
import json
import math
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any


def reward_of(query: str) -> float:
    """What the server gives a query."""
    return len(query) / 10


class FaultServer:
    """A server on 127.0.0.1 whose ``mode``, a key of ``MODES``, can be set at any time.

    Args:
        mode: "refuse" closes the port; setting any other mode opens the same port again.
        count: how many requests "flaky" fails, and "dying" answers before it closes the port.
        delay: seconds before every reply.
        retry_after: the header of status 429 and 503.
        answer: what "ok" answers to the document of a request, instead of a reward.

    Attributes:
        bodies: every request's document, in the order of arrival.
        authorization: the last request's header.
        cookies, paths: every request's header and target.
        most_in_flight: the largest number of requests that were waiting out their ``delay`` at once.
    """

    def __init__(
        self,
        mode: str = "ok",
        *,
        count: int = 0,
        delay: float = 0.0,
        retry_after: str = "0",
        answer: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.count, self.delay, self.retry_after, self.answer = count, delay, retry_after, answer
        self.bodies: list[dict[str, Any]] = []
        self.authorization: str | None = None
        self.cookies: list[str | None] = []
        self.paths: list[str] = []
        self.in_flight = self.most_in_flight = self.port = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.connections: set[socket.socket] = set()
        self._mode = mode
        self._listener: _Listener | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/get_reward"

    @property
    def requests(self) -> int:
        return len(self.bodies)

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        assert mode in MODES, f"unknown mode {mode!r}"
        self._mode = mode
        if mode == "refuse":
            self.stop()
        else:
            self.start()

    def __enter__(self) -> "FaultServer":
        # Bound for as long as the server lives, without listening: nobody else is given the port while it is closed.
        self._port_holder = socket.socket()
        self._port_holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port_holder.bind(("127.0.0.1", 0))
        self.port = self._port_holder.getsockname()[1]
        self.mode = self._mode
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._port_holder.close()

    def start(self) -> None:
        """Open the port, the same one every time."""
        if self._listener is None:
            self.stopping = threading.Event()
            self._listener = _Listener(("127.0.0.1", self.port), _Handler)
            self._listener.faults = self
            threading.Thread(target=self._listener.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self, spared: socket.socket | None = None) -> None:
        """Close the port and every connection but the spared one."""
        with self.lock:
            listener, self._listener = self._listener, None
        if listener is None:
            return
        self.stopping.set()
        listener.shutdown()
        listener.server_close()
        with self.lock:
            cut = self.connections - {spared}
        for connection in cut:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True  # or the port could not be opened again at once
    daemon_threads = True
    request_queue_size = 128  # the default, 5, makes many clients at once wait a second
    faults: FaultServer

    def handle_error(self, *address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # clients that give up are what this is for
            super().handle_error(*address)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"  # connections are kept, as by the host's server
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.faults = self.server.faults
        with self.faults.lock:
            self.faults.connections.add(self.connection)

    def finish(self) -> None:
        with self.faults.lock:
            self.faults.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        faults = self.faults
        with faults.lock:
            faults.bodies.append(body)
            faults.authorization = self.headers.get("Authorization")
            faults.cookies.append(self.headers.get("Cookie"))
            faults.paths.append(self.path)
            faults.in_flight += 1
            faults.most_in_flight = max(faults.most_in_flight, faults.in_flight)
            self.number = len(faults.bodies)
        self.body, self.query = body, body.get("query", [""])[0]
        faults.stopping.wait(faults.delay)
        with faults.lock:
            faults.in_flight -= 1  # before the reply, after which the client may send the next
        MODES[faults.mode](self)

    def reply(self, text: str, status: int = 200, headers: str = "", length: int | None = None) -> None:
        """Send a reply in one piece; a ``length`` promises more than is sent."""
        body = text.encode()
        head = f"HTTP/1.1 {status} {status}\r\n{headers}Content-Length: {length or len(body)}\r\n\r\n"
        self.wfile.write(head.encode() + body)


def judgement(content: str, **choice: Any) -> dict[str, Any]:
    """The reply of a server with OpenAI's protocol, whose model answered ``content``."""
    return {"id": "1", "choices": [{"index": 0, "message": {"role": "assistant", "content": content}} | choice]}


def _ok(handler: _Handler) -> None:
    rewards = [reward_of(handler.query)]
    document = {"rewards": rewards, "scores": rewards, "extra_logs": {"dummy_scores": rewards}}
    answer = handler.faults.answer
    handler.reply(json.dumps(document if answer is None else answer(handler.body)))


def _double(delay: float) -> Callable[[_Handler], None]:
    """The reply twice, on a connection that stays open whatever the client asks for."""

    def handle(handler: _Handler) -> None:
        _ok(handler)
        handler.faults.stopping.wait(delay)
        handler.close_connection = False
        with suppress(OSError):
            _ok(handler)

    return handle


def _cookie(handler: _Handler) -> None:
    handler.reply(json.dumps({"rewards": [0.5]}), headers=f"Set-Cookie: c{handler.number}={'v' * 100}\r\n")


def _drop(handler: _Handler) -> None:
    handler.close_connection = True


def _reset(handler: _Handler) -> None:
    handler.reply('{"rewards": [', length=1000)
    # Closing a socket that does not linger sends RST instead of FIN; only the last reference to it closes it.
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()
    handler.connection.close()
    handler.close_connection = True


def _hang(handler: _Handler) -> None:
    handler.faults.stopping.wait()
    handler.close_connection = True


def _drip(handler: _Handler) -> None:
    handler.reply(" ", length=10**9)
    while not handler.faults.stopping.wait(0.02):
        handler.wfile.write(b" ")
    handler.close_connection = True


def _compressed(layers: int, status: int = 200) -> Callable[[_Handler], None]:
    """A megabyte of spaces before the reward, packed again and again."""

    def handle(handler: _Handler) -> None:
        body = b" " * 2**20 + b'{"rewards": [0.5]}'
        for _ in range(layers):
            body = gzip.compress(body)
        encoding = ", ".join(["gzip"] * layers)
        head = f"HTTP/1.1 {status} {status}\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(body)}\r\n\r\n"
        handler.wfile.write(head.encode() + body)

    return handle


def _flaky(handler: _Handler) -> None:
    (_status(500) if handler.number <= handler.faults.count else _ok)(handler)


def _dying(handler: _Handler) -> None:
    if handler.number == handler.faults.count:
        handler.faults.stop(spared=handler.connection)  # first, so that who has the reply finds the port closed
    (_drop if handler.number > handler.faults.count else _ok)(handler)
    handler.close_connection = handler.number >= handler.faults.count


def _status(status: int) -> Callable[[_Handler], None]:
    def answer(handler: _Handler) -> None:
        headers = f"Retry-After: {handler.faults.retry_after}\r\n" if status in (429, 503) else ""
        handler.reply(f"status {status}", status, headers)

    return answer


def _long(handler: _Handler) -> None:
    """As many bytes as are taken."""
    handler.send_response(200)
    handler.end_headers()
    with suppress(OSError):
        while not handler.faults.stopping.is_set():
            handler.wfile.write(b"0" * 2**16)
    handler.close_connection = True


def _echo(handler: _Handler) -> None:
    handler.reply(f"what is {handler.headers.get('Authorization')}?", 422)


def _echo_path(handler: _Handler) -> None:
    handler.reply(f"no access to {handler.path}", 403)


def _body(text: str) -> Callable[[_Handler], None]:
    return functools.partial(_Handler.reply, text=text)


def _rewards(*rewards: Any) -> Callable[[_Handler], None]:
    return _body(json.dumps({"rewards": rewards}))


MODES: dict[str, Callable[[_Handler], None]] = {
    "ok": _ok,
    "refuse": _drop,  # who got in before the port was closed
    "reset": _reset,
    "hang": _hang,
    "drip": _drip,
    "long": _long,
    "flaky": _flaky,
    "dying": _dying,
    **{str(status): _status(status) for status in (307, 400, 401, 403, 404, 422, 429, 500, 502, 503)},
    "echo": _echo,
    "echo_path": _echo_path,
    "empty": _body(""),
    "html": _body("<html><body>Welcome to the proxy</body></html>"),
    "truncated": _body('{"rewards": [0.5'),
    "not_an_object": _body("[0.5]"),
    "no_rewards": _body('{"scores": [0.5]}'),
    "scalar": _body('{"rewards": 0.5}'),
    "no_reward": _rewards(),
    "wrong_length": _rewards(0.5, 0.5),
    "null": _rewards(None),
    "nan": _rewards(math.nan),
    "inf": _rewards(math.inf),
    "-inf": _rewards(-math.inf),
    "overflow": _rewards(10**400),
    "string": _rewards("0.5"),
    "bool": _rewards(True),
    "twice": _body('{"rewards": [0.5], "rewards": [0.9]}'),
    "twice_inside": _body('{"rewards": [0.5], "extra_logs": {"a": 1, "a": 2}}'),
    "gzip": _compressed(1),
    "gzip_in_gzip": _compressed(2),
    "502_gzip": _compressed(1, status=502),
    "double": _double(0.0),
    "double_late": _double(0.02),
    "cookie": _cookie,
    "huge": _rewards(1e300),
    "integer": _rewards(2),
}

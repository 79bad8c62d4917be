"""Kind ``http``: a reward server that speaks the host's protocol, asked by the rollout, one response per request.

POST ``{"query": [q], "prompts": [p], "labels": [l]}`` is answered by ``{"rewards": [r]}``; other keys are not used.

    what goes wrong                                          asked again   counts against the replica
    no connection, time-out, status 5xx, body is not JSON    yes           yes
    status 429                                               yes           no
    any other status, reward is not one finite number        no            no

From top to bottom: what others call, what goes wrong, a replica with its breaker, and the scorer, in the order in which
a request meets its methods (``__call__``, ``_attempt``, ``_next``, ``_post``, ``_reward``); then what these need.

This module needs the extra ``rewards``, so nothing imports it unless an objective is of this kind.
"""

import asyncio
import functools
import ipaddress
import json
import math
import os
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

import httpx
from circuitbreaker import STATE_HALF_OPEN, STATE_OPEN, CircuitBreaker  # type: ignore[import-untyped]
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from pama_plugin.errors import PamaError
from pama_plugin.rewards.options import HttpOptions
from pama_plugin.rewards.response import Response

BACKOFF = wait_exponential_jitter(multiplier=0.5, max=30, jitter=1)  # 0.5, 1, 2, 4 … s, each and up to 1 s
LONGEST_RETRY_AFTER = 60.0  # seconds; a server that asks for more is asked again earlier
FAILURES_TO_OPEN = 5  # in a row
OPEN_SECONDS = 2.0  # since the last of them; then one request tries, which costs a dead server's users nothing
POLL_SECONDS = 0.1
LARGEST_REPLY = 2**20  # bytes, unpacked


class ServerFailure(PamaError, RuntimeError):
    """A response that was not scored: which replica was asked last, what happened, and after how many attempts."""


def split_replicas(location: str) -> tuple[str, ...]:
    """``URL|URL…`` → the URLs.

    Raises:
        ValueError: one is not http or https with a host, or holds a user name or password.

    >>> split_replicas("http://a:5000/get_reward|https://b/get_reward")
    ('http://a:5000/get_reward', 'https://b/get_reward')
    """
    replicas = tuple(location.split("|"))
    for url in replicas:
        if not _is_usable(url):
            # What stands before an @ may be a password.
            found = "one with '@', not shown because it may hold a password" if "@" in url else repr(_shown(url))
            raise ValueError(f"a replica must be http(s)://HOST[:PORT]/PATH without user or password, found {found}")
    return replicas


def check_http(location: str, options: HttpOptions) -> list[str]:
    """Refuse what cannot work, without asking the servers, and return one warning for each replica to worry about.

    Raises:
        ValueError: a URL or the token's environment variable cannot be used.
    """
    _token(options)
    sent = f"prompts, responses and the token in {options.token_env}" if options.token_env else "prompts and responses"
    return [
        f"{_shown(url)} is plain http to another machine, so {sent} can be read on the way; use https"
        for url in split_replicas(location)
        if httpx.URL(url).scheme == "http" and not _is_loopback(httpx.URL(url).host)
    ]


def load_http(location: str, options: HttpOptions, *, patient: bool = False) -> Callable[[Response], Awaitable[float]]:
    """A scorer to be awaited, always in the same event loop; whatever it cannot score raises ``ServerFailure``.

    Args:
        location: the replicas.
        options: how they are asked.
        patient: whether to wait while all replicas are left alone, for as long as an attempt may take, before that
            costs an attempt: for those to whom a failure costs the run. Others go on to their next attempt.

    Raises:
        ValueError: as ``check_http``.
    """
    return _HttpScorer(location, options, patient)


class _Failure(Exception):
    """An attempt that would fail in the same way again."""


class _Transient(_Failure):
    """An attempt that may succeed when repeated, after ``retry_after`` seconds at the earliest."""

    def __init__(self, problem: str, retry_after: float = 0.0) -> None:
        super().__init__(problem)
        self.retry_after = retry_after


class _ServerTrouble(_Transient):
    """One that also speaks against the replica."""


@dataclass(eq=False)  # two replicas may have one URL
class _Replica:
    """One server, and whether its last answers make it worth asking."""

    url: str
    breaker: CircuitBreaker = field(
        default_factory=lambda: CircuitBreaker(FAILURES_TO_OPEN, OPEN_SECONDS, _ServerTrouble)
    )
    on_trial: bool = False

    @property
    def may_be_asked(self) -> bool:
        """Always, but when the breaker is open, and during the one request that tries whether it may be closed."""
        state = self.breaker.state
        return not (state == STATE_OPEN or state == STATE_HALF_OPEN and self.on_trial)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Let the breaker see how a request ends, and let no other pass while it is a trial."""
        # The library lets all pass: a server that hangs would take every slot for as long as the time-out.
        trial = self.breaker.state == STATE_HALF_OPEN
        self.on_trial = self.on_trial or trial
        try:
            with self.breaker:
                yield
        finally:
            self.on_trial = self.on_trial and not trial


class _HttpScorer:
    """What the requests of one objective share: connections, slots, replicas."""

    def __init__(self, location: str, options: HttpOptions, patient: bool) -> None:
        self.options, self.patient = options, patient
        self.token = _token(options)
        self.replicas = [_Replica(url) for url in split_replicas(location)]  # the one asked longest ago is first
        self.slots = asyncio.Semaphore(options.concurrency)

    @functools.cached_property
    def client(self) -> httpx.AsyncClient:
        """Made by the first request, inside the running loop."""
        authorization = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        connections = self.options.concurrency
        return httpx.AsyncClient(
            headers={"Content-Type": "application/json"} | authorization,
            timeout=None,  # httpx limits each read, not their sum: see _post
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            # As the host's client: no proxy from the environment, and the certificates that Python itself trusts.
            trust_env=False,
            verify=ssl.create_default_context(),
        )

    async def __call__(self, response: Response) -> float:
        # Escaped to ASCII, as the host's client does: half a surrogate pair in a prompt would not encode as UTF-8.
        body = json.dumps({"query": [response.query], "prompts": [response.prompt], "labels": [response.label]})
        asked: list[_Replica] = []
        attempts = AsyncRetrying(
            stop=stop_after_attempt(1 + self.options.retries),
            wait=_wait,
            retry=retry_if_exception_type(_Transient),
            reraise=True,
        )
        try:
            reward: float = await attempts(self._attempt, body, asked)
        except _Failure as failure:
            raise ServerFailure(f"{failure} (attempts: {len(asked)})") from None  # the text says it all
        return reward

    async def _attempt(self, body: str, asked: list[_Replica]) -> float:
        async with self.slots:
            replica = await self._next(asked)
            asked.append(replica)
            with replica.request():
                return self._reward(_shown(replica.url), *await self._post(replica.url, body))

    async def _next(self, asked: list[_Replica]) -> _Replica:
        """Of the replicas that this response was sent to least often, the one that was asked longest ago."""
        patience = self.options.timeout + OPEN_SECONDS if self.patient else 0.0
        waited = 0.0
        while not (ready := [replica for replica in self.replicas if replica.may_be_asked]):
            if waited >= patience:
                problem = (
                    f"no replica may be asked, each failed {FAILURES_TO_OPEN} times in a row; "
                    f"last error: {self.replicas[-1].breaker.last_failure}"
                )
                raise _Failure(problem) if self.patient else _Transient(problem)
            await asyncio.sleep(POLL_SECONDS)
            waited += POLL_SECONDS
        replica = min(ready, key=asked.count)
        self.replicas.remove(replica)
        self.replicas.append(replica)
        return replica

    async def _post(self, url: str, body: str) -> tuple[httpx.Response, bytes]:
        """The reply, and its body as far as a reward may be long."""
        request = asyncio.ensure_future(self._receive(url, body))
        try:
            await asyncio.wait([request], timeout=self.options.timeout)
        finally:
            # Again and again: on Python 3.10 a request that has just connected swallows a cancellation, and wait_for,
            # which cancels once, then waits for as long as the server hangs.
            while not request.done():
                request.cancel()
                await asyncio.wait([request], timeout=0.1)
        try:
            return request.result()
        except asyncio.CancelledError:  # by the lines above; a caller's comes out of the wait
            problem = f"no complete reply within {self.options.timeout:g} s"
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__} {error}".rstrip()
        raise _ServerTrouble(f"{_shown(url)}: {problem}")

    async def _receive(self, url: str, body: str) -> tuple[httpx.Response, bytes]:
        received = bytearray()
        async with self.client.stream("POST", url, content=body) as reply:
            async for chunk in reply.aiter_bytes(LARGEST_REPLY):
                received += chunk
                if len(received) > LARGEST_REPLY:  # a server gone wild must not take the rollout's memory
                    raise _Failure(f"{_shown(url)}: the body is longer than {LARGEST_REPLY} bytes")
        return reply, bytes(received)

    def _reward(self, where: str, reply: httpx.Response, body: bytes) -> float:
        if not reply.is_success:
            raise self._refused(where, reply, body)
        try:
            # Integers as floats, too: one beyond a float's range becomes inf, and true does not become 1.
            document = json.loads(body, parse_int=float)
        except (ValueError, RecursionError):
            raise _ServerTrouble(f"{where}: the body is not JSON, found {self._quoted(body)}") from None
        rewards = document.get("rewards") if isinstance(document, dict) else None
        match rewards:
            case [float(reward)] if math.isfinite(reward):
                return reward
        raise _Failure(f"{where}: rewards must be a list of one finite number, found {self._quoted(body)}")

    def _refused(self, where: str, reply: httpx.Response, body: bytes) -> _Failure:
        status = reply.status_code
        problem = f"{where}: HTTP {status}, {self._quoted(body)}"
        if status >= 500:
            return _ServerTrouble(problem, _retry_after(reply))
        if status == 429:
            return _Transient(problem, _retry_after(reply))
        if status in (401, 403):
            variable = self.options.token_env
            hint = f"check the token in {variable}" if variable else "if it wants a token, name its variable: token_env"
            problem += f"; {hint}"
        if reply.is_redirect:
            problem += "; redirects are not followed: give the URL that they lead to"
        return _Failure(problem)

    def _quoted(self, body: bytes) -> str:
        """The beginning of what the server says, which may repeat the token."""
        text = body.decode("utf-8", "replace")
        return repr((text.replace(self.token, "***") if self.token else text)[:200])


def _wait(state: RetryCallState) -> float:
    failure = state.outcome.exception() if state.outcome else None
    return max(BACKOFF(state), failure.retry_after if isinstance(failure, _Transient) else 0.0)


def _retry_after(reply: httpx.Response) -> float:
    """The seconds in either form of the header (RFC 9110, section 10.2.3), 0 if there is none that can be read."""
    value = reply.headers.get("Retry-After", "")
    try:
        seconds = float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def _token(options: HttpOptions) -> str | None:
    """The bearer token; anything that cannot be sent in a header is refused here, where nobody quotes it."""
    if options.token_env is None:
        return None
    token = os.environ.get(options.token_env, "")
    if not re.fullmatch("[!-~]+", token):
        found = "other characters in it" if token else "it unset or empty"
        raise ValueError(
            f"the environment variable {options.token_env} (token_env) must hold the bearer token, "
            f"printable ASCII without spaces, found {found}"
        )
    return token


def _is_usable(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    has_port = url.port is None or 0 < url.port < 2**16
    return url.scheme in ("http", "https") and url.host != "" and has_port and not url.userinfo and " " not in text


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(url: str) -> str:
    """The URL without its query, which may hold a key."""
    return re.split("[?#]", url)[0]

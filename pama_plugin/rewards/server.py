"""Requests to a server, of the kinds ``http`` and ``judge``: retries, replicas, limits, tokens.

    failure                                                  repeated   counts against the replica
    no connection, time-out, status 5xx, body is not JSON    yes        yes
    status 429                                               yes        no
    any other status, reward is not one finite number        no         no

The module contains, in this order: the check before a run, the failures, a replica with its circuit breaker, ``Server``
with its methods in the order of a request (``ask``, ``_attempt``, ``_next``, ``_post``, ``_read``), and helpers.

It needs the extra ``rewards``, so it is imported only for objectives of these kinds.
"""

import asyncio
import functools
import json
import logging
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx
from circuitbreaker import STATE_HALF_OPEN, STATE_OPEN, CircuitBreaker  # type: ignore[import-untyped]
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from pama_plugin.errors import PamaError
from pama_plugin.rewards.options import HttpOptions
from pama_plugin.rewards.urls import forms_of, is_loopback, redact, split_replicas

BACKOFF = wait_exponential_jitter(multiplier=0.5, max=30, jitter=1)  # 0.5, 1, 2, 4 … s, plus up to 1 s
LONGEST_RETRY_AFTER = 60.0  # seconds that the header may add to the waits for one response
FAILURES_TO_OPEN = 5  # consecutive failures of a replica
OPEN_SECONDS = 2.0  # seconds from the last failure to the trial request
POLL_SECONDS = 0.1
LONGEST_OUTAGE = 30.0  # seconds for which responses wait for a server that is down, if a failure does not end the run
LARGEST_REPLY = 2**20  # bytes, decompressed


def check_servers(location: str, options: HttpOptions) -> list[str]:
    """Check URLs and token without a request, and return a warning for each replica with an unencrypted connection.

    Raises:
        ValueError: a URL or the environment variable of the token is invalid.
    """
    _token(options)
    sent = f"prompts, responses and the token in {options.token_env}" if options.token_env else "prompts and responses"
    return [
        f"{redact(url)} is plain http to another machine, so others can read {sent}; use https"
        for url in split_replicas(location)
        if httpx.URL(url).scheme == "http" and not is_loopback(httpx.URL(url).host)
    ]


class ServerFailure(PamaError, RuntimeError):
    """No reward for a response. The message names the last replica, the problem and the number of attempts."""


class Failure(Exception):
    """A failed attempt that would fail again."""


class _Transient(Failure):
    """A failed attempt that may succeed if repeated, after at least ``retry_after`` seconds."""

    def __init__(self, problem: str, retry_after: float = 0.0) -> None:
        super().__init__(problem)
        self.retry_after = retry_after


class _ServerTrouble(_Transient):
    """A transient failure that counts against the replica."""


@dataclass(eq=False)  # replicas with the same URL are different
class _Replica:
    """One server with a circuit breaker."""

    url: str
    breaker: CircuitBreaker = field(
        default_factory=lambda: CircuitBreaker(FAILURES_TO_OPEN, OPEN_SECONDS, _ServerTrouble)
    )
    on_trial: bool = False

    @property
    def may_be_asked(self) -> bool:
        """False while the breaker is open, and during the trial request that may close it."""
        state = self.breaker.state
        return not (state == STATE_OPEN or state == STATE_HALF_OPEN and self.on_trial)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Report the result of a request to the breaker, and block other requests during a trial."""
        # The library does not block them, so a hanging server would occupy every slot until the time-out.
        trial = self.breaker.state == STATE_HALF_OPEN
        self.on_trial = self.on_trial or trial
        try:
            with self.breaker:
                yield
        finally:
            self.on_trial = self.on_trial and not trial


class Server:
    """Connections, slots and replicas, which answer a JSON document with another.

    Args:
        urls: of the replicas.
        options: limits of the requests, and the token.
        keys: what is secret in the URLs.
        patient: how long to wait while all replicas are suspended, as in ``load_http``.
    """

    def __init__(self, urls: Sequence[str], options: HttpOptions, keys: Sequence[str], *, patient: bool) -> None:
        self.options, self.patient = options, patient
        self.replicas = [_Replica(url) for url in urls]  # least recently used first
        self.token = _token(options)
        self.secrets = forms_of([*keys, *([self.token] if self.token else [])])
        if keys:  # it logs the URL of every request
            logging.getLogger("httpx").setLevel(logging.WARNING)
        self.slots = asyncio.Semaphore(options.concurrency)
        self.down_since: float | None = None  # all replicas have been suspended since, apart from trials

    @functools.cached_property
    def client(self) -> httpx.AsyncClient:
        """Created by the first request, in the running event loop."""
        authorization = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        connections = self.options.concurrency
        return httpx.AsyncClient(
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
            | authorization,
            timeout=None,  # httpx limits single reads, not their sum; _post limits the sum
            # One request per connection, as in OpenRLHF's client: if a server or proxy sends a reply twice, the second
            # would be the reply to the next request.
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=0),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # accepts none
            # As OpenRLHF's client: no proxy from the environment, and the certificates that Python trusts.
            trust_env=False,
            verify=ssl.create_default_context(),
        )

    async def ask(self, document: dict[str, Any], read: Callable[[Any], list[Any]], *, quote: bool = True) -> Any:
        """Send a document; return what ``read`` makes of the reply, in which numbers are floats.

        Args:
            document: what is sent as JSON.
            read: returns a reward for each of its keys, or a text that says why it is missing.
            quote: whether such a text gets the beginning of the reply.

        Returns:
            The only reward, or a list of several.

        Raises:
            ServerFailure: there is no reply, or not the only reward.
        """
        # Escaped to ASCII, as in OpenRLHF's client, because an unpaired surrogate cannot be encoded as UTF-8.
        body = json.dumps(document)
        attempted: list[_Replica] = []
        attempts = AsyncRetrying(
            stop=stop_after_attempt(1 + self.options.retries),
            wait=_wait,
            retry=retry_if_exception_type(_Transient),
            reraise=True,
        )
        try:
            rewards: list[Any] = await attempts(self._attempt, body, read, quote, attempted)
        except Failure as failure:
            raise ServerFailure(f"{failure} (attempts: {len(attempted)})") from None  # the message has all details
        if len(rewards) == 1 and isinstance(rewards[0], str):
            raise ServerFailure(f"{rewards[0]} (attempts: {len(attempted)})")
        return rewards if len(rewards) > 1 else rewards[0]

    async def _attempt(
        self, body: str, read: Callable[[Any], list[Any]], quote: bool, attempted: list[_Replica]
    ) -> list[Any]:
        async with self.slots:
            replica = await self._next(attempted)
            attempted.append(replica)
            with replica.request():
                return self._read(redact(replica.url), *await self._post(replica.url, body), read, quote)

    async def _next(self, attempted: list[_Replica]) -> _Replica:
        """The least recently used of the replicas with the fewest attempts for this response."""
        patience = self.options.timeout + OPEN_SECONDS if self.patient else LONGEST_OUTAGE
        while not (ready := [replica for replica in self.replicas if replica.may_be_asked]):
            # The outage is timed, not the wait: else responses that wait for a slot would wait one after another.
            self.down_since = self.down_since or time.monotonic()
            # A trial may show that the server is back, as after a training step during which nobody asked.
            on_trial = any(replica.on_trial for replica in self.replicas)
            if time.monotonic() - self.down_since >= patience and not on_trial:
                raise Failure(
                    f"all replicas have been suspended for {patience:g} s, each failed {FAILURES_TO_OPEN} times in a "
                    f"row; last error: {self.replicas[-1].breaker.last_failure}"
                )
            await asyncio.sleep(POLL_SECONDS)
        if any(replica.breaker.closed for replica in ready):
            self.down_since = None
        replica = min(ready, key=attempted.count)
        self.replicas.remove(replica)
        self.replicas.append(replica)
        return replica

    async def _post(self, url: str, body: str) -> tuple[httpx.Response, bytes]:
        """Send the request; return the reply and its body."""
        request = asyncio.ensure_future(self._receive(url, body))
        try:
            await asyncio.wait([request], timeout=self.options.timeout)
        finally:
            # Cancel repeatedly: on Python 3.10 a request that has just connected swallows a cancellation. wait_for
            # cancels only once, and would then wait for as long as the server hangs.
            while not request.done():
                request.cancel()
                await asyncio.wait([request], timeout=0.1)
        try:
            return request.result()
        except asyncio.CancelledError:  # from the lines above; a cancellation by the caller leaves asyncio.wait
            problem = f"no complete reply within {self.options.timeout:g} s"
        except httpx.HTTPError as error:
            problem = self._without_secrets(f"{type(error).__name__} {error}".rstrip())
        raise _ServerTrouble(f"{redact(url)}: {problem}")

    async def _receive(self, url: str, body: str) -> tuple[httpx.Response, bytes]:
        received = bytearray()
        async with self.client.stream("POST", url, content=body) as reply:
            async for chunk in reply.aiter_raw(LARGEST_REPLY):  # a kilobyte of nested gzip would unpack to gigabytes
                received += chunk
                if len(received) > LARGEST_REPLY:  # limits the memory of the rollout
                    raise Failure(f"{redact(url)}: the body is longer than {LARGEST_REPLY} bytes")
        return reply, bytes(received)

    def _read(
        self, where: str, reply: httpx.Response, body: bytes, read: Callable[[Any], list[Any]], quote: bool
    ) -> list[Any]:
        if not reply.is_success:
            raise self._refused(where, reply, body)
        encoding = reply.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            found = self._without_secrets(encoding)[:40]
            raise Failure(f"{where}: Content-Encoding must be identity, as requested, found {found!r}")
        try:
            # Parse integers as floats: too large ones become inf, and true is not a number.
            document = json.loads(body, parse_int=float, object_pairs_hook=unique)
        except Failure as failure:
            raise Failure(f"{where}: {failure}, found {self._quoted(body)}") from None
        except (ValueError, RecursionError):
            raise _ServerTrouble(f"{where}: the body is not JSON, found {self._quoted(body)}") from None
        found = f", found {self._quoted(body)}" if quote else ""
        return [
            f"{where}: {self._without_secrets(reward)}{found}" if isinstance(reward, str) else reward
            for reward in read(document)
        ]

    def _refused(self, where: str, reply: httpx.Response, body: bytes) -> Failure:
        status = reply.status_code
        problem = f"{where}: HTTP {status}, {self._quoted(body)}"
        if status >= 500:
            return _ServerTrouble(problem, _retry_after(reply))
        if status == 429:
            return _Transient(problem, _retry_after(reply))
        if status in (401, 403):
            variable = self.options.token_env
            hint = f"check the token in {variable}" if variable else "if the server needs a token, set token_env"
            problem += f"; {hint}"
        if reply.is_redirect:
            problem += "; redirects are not followed, use the target URL"
        return Failure(problem)

    def _quoted(self, body: bytes) -> str:
        """The beginning of the body."""
        return repr(self._without_secrets(body.decode("utf-8", "replace"))[:200])

    def _without_secrets(self, text: str) -> str:
        """What a server sent, without the token and the keys."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a repeated key it is not clear which value counts."""
    document = dict(pairs)
    if len(document) < len(pairs):
        raise Failure("the keys of an object must differ")
    return document


def _wait(state: RetryCallState) -> float:
    failure = state.outcome.exception() if state.outcome else None
    asked = failure.retry_after if isinstance(failure, _Transient) else 0.0
    return max(BACKOFF(state), min(asked, LONGEST_RETRY_AFTER - state.idle_for))


def _retry_after(reply: httpx.Response) -> float:
    """Seconds in either form of the header (RFC 9110, section 10.2.3); 0 without a valid header."""
    value = reply.headers.get("Retry-After", "")
    try:
        seconds = float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return max(seconds, 0.0)


def _token(options: HttpOptions) -> str | None:
    """The bearer token. Refuses one that cannot be sent in a header.

    The error quotes neither the token nor the name of its variable, in whose place some write the token itself.
    """
    if options.token_env is None:
        return None
    token = os.environ.get(options.token_env, "")
    if not re.fullmatch("[!-~]+", token):
        problem = "other characters" if token else "it unset or empty"
        raise ValueError(
            "token_env must name an environment variable that contains the bearer token, printable ASCII without "
            f"spaces, found {problem}"
        )
    return token

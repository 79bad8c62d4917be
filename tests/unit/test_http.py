"""The kind http against a server that fails in every known way."""

import asyncio
import contextlib
import pickle
import re
import subprocess
import sys
import time
import traceback
from email.utils import formatdate
from types import SimpleNamespace

import pytest
import tenacity
from faultserver import MODES, FaultServer, reward_of
from pydantic import ValidationError

from pama_plugin.errors import PamaError
from pama_plugin.rewards import Response, http
from pama_plugin.rewards import server as client

RESPONSE = Response(query="Once more, please", prompt="Once", label="tale", response=" more, please", num_tokens=7)
TOKEN = "s3cret/token"

ANSWERED = {
    **dict.fromkeys(("ok", "double", "double_late"), reward_of(RESPONSE.query)),
    **{"huge": 1e300, "integer": 2.0, "cookie": 0.5, "null": None},
}

NOT_ONE_NUMBER = "rewards .*list of one finite number.*found "
FINAL = {
    "307": "HTTP 307, 'status 307'.*redirects",
    "400": "HTTP 400, 'status 400'",
    "401": "HTTP 401, 'status 401'.*token_env",
    "403": "HTTP 403, 'status 403'.*token_env",
    "404": "HTTP 404, 'status 404'",
    "422": "HTTP 422, 'status 422'",
    "echo": r"HTTP 422, 'what is None\?'",
    "echo_path": "HTTP 403, 'no access to /get_reward'",
    "long": ".*longer than 1048576 bytes",
    "not_an_object": NOT_ONE_NUMBER + re.escape("'[0.5]'"),
    "no_rewards": NOT_ONE_NUMBER + re.escape("""'{"scores": [0.5]}'"""),
    "scalar": NOT_ONE_NUMBER + re.escape("""'{"rewards": 0.5}'"""),
    "no_reward": NOT_ONE_NUMBER + re.escape("""'{"rewards": []}'"""),
    "wrong_length": NOT_ONE_NUMBER + re.escape("""'{"rewards": [0.5, 0.5]}'"""),
    "nan": NOT_ONE_NUMBER + re.escape("""'{"rewards": [NaN]}'"""),
    "inf": NOT_ONE_NUMBER + re.escape("""'{"rewards": [Infinity]}'"""),
    "-inf": NOT_ONE_NUMBER + re.escape("""'{"rewards": [-Infinity]}'"""),
    "overflow": NOT_ONE_NUMBER + re.escape("""'{"rewards": [1000"""),
    "string": NOT_ONE_NUMBER + re.escape("""'{"rewards": ["0.5"]}'"""),
    "bool": NOT_ONE_NUMBER + re.escape("""'{"rewards": [true]}'"""),
    "twice": 'the keys of an object must differ.*found \'{"rewards": .0.5., "rewards": .0.9.',
    "twice_inside": "the keys of an object must differ",
    "gzip": "Content-Encoding must be identity.*found 'gzip'",
    "gzip_in_gzip": "Content-Encoding must be identity.*found 'gzip, gzip'",
}

REPEATED = {
    "refuse": "ConnectError",
    "reset": "ReadError",
    "hang": "no complete reply .*0.3 s",
    "drip": "no complete reply .*0.3 s",
    "429": "HTTP 429, 'status 429'",
    "500": "HTTP 500, 'status 500'",
    "502": "HTTP 502, 'status 502'",
    "503": "HTTP 503, 'status 503'",
    "502_gzip": "HTTP 502, ",  # as a proxy may pack its error page
    "empty": ".*not JSON, found ''",
    "html": ".*not JSON, found '<html>",
    "truncated": r""".*not JSON, found '{"rewards": \[0.5'""",
}


@pytest.fixture(autouse=True)
def backoff(monkeypatch):
    """No waiting between attempts. Returns the value outside these tests."""
    original = client.BACKOFF
    monkeypatch.setattr(client, "BACKOFF", tenacity.wait_none())
    return original


@contextlib.asynccontextmanager
async def scorer(*servers: FaultServer, patient: bool = False, **options):
    location = "|".join(server.url for server in servers)
    options = {"timeout": 10} | options  # an unexpected hang must not last minutes
    score = http.load_http(location, http.HttpOptions(**options), patient=patient)
    try:
        yield score
    finally:
        await score.client.aclose()


def score_once(*servers: FaultServer, response: Response = RESPONSE, **options) -> float:
    async def main() -> float:
        async with scorer(*servers, **options) as score:
            return await score(response)

    return asyncio.run(main())


def test_every_mode_has_an_expectation() -> None:
    assert {*ANSWERED, *FINAL, *REPEATED, "flaky", "dying"} == set(MODES)


def test_the_request_is_that_of_openrlhf() -> None:
    with FaultServer() as server:
        score_once(server)
        assert server.bodies == [{"query": ["Once more, please"], "prompts": ["Once"], "labels": ["tale"]}]
        assert server.authorization is None


def test_half_a_surrogate_pair_is_sent() -> None:
    with FaultServer() as server:
        score_once(server, response=RESPONSE._replace(prompt="\ud83d"))
        assert server.bodies[0]["prompts"] == ["\ud83d"]


@pytest.mark.parametrize(("mode", "reward"), ANSWERED.items())
def test_a_good_reply(mode, reward) -> None:
    with FaultServer(mode) as server:
        result = score_once(server, retries=0)
        assert result == reward and type(result) is type(reward) and server.requests == 1


@pytest.mark.parametrize(("mode", "message"), FINAL.items())
def test_a_permanent_failure_is_not_repeated(mode, message) -> None:
    with FaultServer(mode) as server:
        with pytest.raises(client.ServerFailure) as caught:
            score_once(server)
        assert re.match(f"{re.escape(server.url)}: {message}", str(caught.value))
        assert str(caught.value).endswith("(attempts: 1)") and server.requests == 1


@pytest.mark.parametrize(("mode", "message"), REPEATED.items())
def test_a_transient_failure_is_repeated(mode, message) -> None:
    with FaultServer(mode) as server:
        with pytest.raises(client.ServerFailure) as caught:
            score_once(server, retries=2, timeout=0.3 if mode in ("hang", "drip") else 10)
        assert re.match(f"{re.escape(server.url)}: {message}", str(caught.value))
        assert str(caught.value).endswith("(attempts: 3)")
        if mode not in ("hang", "drip"):  # on a busy machine the time may be up before the server has read the request
            assert server.requests == (0 if mode == "refuse" else 3)


@pytest.mark.parametrize("mode", ["double", "double_late"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_reply_that_comes_twice_is_never_that_of_another_response(mode, concurrency) -> None:
    async def main() -> None:
        with FaultServer(mode) as server:
            async with scorer(server, concurrency=concurrency) as score:
                queries = ["x" * length for length in range(50)]
                rewards = await asyncio.gather(*(score(RESPONSE._replace(query=query)) for query in queries))
        assert rewards == list(map(reward_of, queries))

    asyncio.run(main())


def test_cookies_are_not_kept() -> None:
    async def main() -> None:
        with FaultServer("cookie") as server:
            async with scorer(server) as score:
                for _ in range(3):
                    await score(RESPONSE)
                assert server.cookies == [None] * 3 and not list(score.client.cookies.jar)

    asyncio.run(main())


def test_a_reward_after_failures() -> None:
    with FaultServer("flaky", count=2) as server:
        assert score_once(server, retries=2) == reward_of(RESPONSE.query) and server.requests == 3


def test_a_failure_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(client.ServerFailure("http://judge: HTTP 500 (attempts: 5)")))
    assert isinstance(error, PamaError) and str(error) == "http://judge: HTTP 500 (attempts: 5)"


def test_a_time_out_ends_a_request_that_swallows_a_cancellation(monkeypatch) -> None:
    """On Python 3.10 a request that has just connected does."""

    async def receive(url: str, body: str) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    async def main() -> None:
        with FaultServer() as server:
            async with scorer(server, retries=0, timeout=0.05) as score:
                monkeypatch.setattr(score, "_receive", receive)
                with pytest.raises(client.ServerFailure, match="no complete reply .*0.05 s"):
                    await score(RESPONSE)

    asyncio.run(main())


def test_a_cancelled_response_stays_cancelled() -> None:
    async def main() -> None:
        with FaultServer("hang") as server:
            async with scorer(server) as score:
                task = asyncio.create_task(score(RESPONSE))
                while not server.requests:
                    await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert server.requests == 1

    asyncio.run(main())


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Records the waits between attempts instead of sleeping."""
    slept = []
    sleep = asyncio.sleep

    async def record(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", record)
    return slept


@pytest.mark.parametrize("mode", ["429", "503"])
@pytest.mark.parametrize(
    ("retry_after", "wait"),
    [
        ("7", [7, 7, 7]),
        ("25", [25, 25, 10]),
        ("7200", [client.LONGEST_RETRY_AFTER, 0, 0]),
        *((text, [0, 0, 0]) for text in ("soon", "-1", "Mon, 01 Jan 2024 00:00:00 GMT")),
    ],
)
def test_retry_after(mode, retry_after, wait, waits) -> None:
    """A server may delay one response by a minute in all."""
    with FaultServer(mode, retry_after=retry_after) as server, pytest.raises(client.ServerFailure):
        score_once(server, retries=3)
    assert waits == wait


def test_retry_after_as_a_date(waits) -> None:
    date = formatdate(time.time() + 20, usegmt=True)
    with FaultServer("429", retry_after=date) as server, pytest.raises(client.ServerFailure):
        score_once(server, retries=1)
    assert 15 < waits[0] <= 20


def test_waits_grow_and_differ(backoff, monkeypatch, waits) -> None:
    monkeypatch.setattr(client, "BACKOFF", backoff)
    with FaultServer("429", retry_after="2") as server, pytest.raises(client.ServerFailure):
        score_once(server, retries=9)
    bounds = [(2, 2), (2, 2), (2, 3), (4, 5), (8, 9), (16, 17), (30, 30), (30, 30), (30, 30)]
    assert all(low <= wait <= high for wait, (low, high) in zip(waits, bounds, strict=True)), waits
    assert not any(wait.is_integer() for wait in waits[2:6])


@pytest.fixture
def later(monkeypatch):
    """``later()`` advances the clock of the breakers by the time for which they stay open."""
    now = [0.0]
    monkeypatch.setattr("circuitbreaker.monotonic", lambda: now[0])

    def wait() -> None:
        now[0] += client.OPEN_SECONDS

    return wait


def test_replicas_take_turns() -> None:
    async def main() -> None:
        with FaultServer() as a, FaultServer() as b, FaultServer() as c:
            async with scorer(a, b, c) as score:
                for _ in range(6):
                    await score(RESPONSE)
            assert (a.requests, b.requests, c.requests) == (2, 2, 2)

    asyncio.run(main())


def test_a_retry_goes_to_another_replica() -> None:
    async def main() -> None:
        with FaultServer("429") as a, FaultServer("429") as b, FaultServer() as c:
            async with scorer(a, b, c, retries=2) as score:
                assert await asyncio.gather(*(score(RESPONSE) for _ in range(12))) == [reward_of(RESPONSE.query)] * 12

    asyncio.run(main())


def test_a_replica_that_dies_and_comes_back(later) -> None:
    async def main() -> None:
        with FaultServer("dying", count=2) as a, FaultServer() as b:
            async with scorer(a, b, retries=1) as score:
                for _ in range(16):
                    assert await score(RESPONSE) == reward_of(RESPONSE.query)
                assert (a.requests, b.requests) == (2, 14)
                a.mode = "ok"
                later()
                for _ in range(4):
                    assert await score(RESPONSE) == reward_of(RESPONSE.query)
                assert (a.requests, b.requests) == (4, 16)

    asyncio.run(main())


def test_a_failing_replica_is_left_alone_until_a_trial_succeeds(later) -> None:
    async def main() -> None:
        with FaultServer("500") as a, FaultServer() as b:
            async with scorer(a, b, retries=1) as score:

                async def requests_to_a_during(responses: int) -> int:
                    before = a.requests
                    for _ in range(responses):
                        await score(RESPONSE)
                    return a.requests - before

                assert await requests_to_a_during(20) == client.FAILURES_TO_OPEN
                assert await requests_to_a_during(6) == 0
                later()
                assert await requests_to_a_during(6) == 1, "a trial that fails opens it again"
                a.mode = "ok"
                later()
                assert await requests_to_a_during(6) == 3, "a trial that succeeds closes it"

    asyncio.run(main())


def test_only_one_request_tries_a_replica(later) -> None:
    async def main() -> None:
        with FaultServer("500") as a, FaultServer() as b:
            async with scorer(a, b, retries=1) as score:
                for _ in range(10):
                    await score(RESPONSE)
                a.mode = "hang"
                later()
                tasks = [asyncio.create_task(score(RESPONSE)) for _ in range(8)]
                while sum(task.done() for task in tasks) < 7 or a.requests == client.FAILURES_TO_OPEN:
                    await asyncio.sleep(0.01)
                assert a.requests == client.FAILURES_TO_OPEN + 1
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize(("patient", "outage", "lost"), [(True, 0, 0), (False, 30, 0), (False, 0, 20)])
def test_a_scorer_survives_the_restart_of_a_server(patient, outage, lost, monkeypatch) -> None:
    """Many responses at once open the breaker long before the retries of any of them are used up."""
    monkeypatch.setattr(client, "LONGEST_OUTAGE", outage)
    monkeypatch.setattr(client, "OPEN_SECONDS", 1)
    monkeypatch.setattr(client, "BACKOFF", tenacity.wait_fixed(0.1))  # one request tries, the others repeat after it

    async def main() -> None:
        with FaultServer("refuse") as server:
            async with scorer(server, patient=patient, retries=3, concurrency=1) as score:
                waiting = asyncio.gather(*(score(RESPONSE) for _ in range(20)), return_exceptions=True)
                while score.replicas[0].breaker.closed:
                    await asyncio.sleep(0.01)
                server.mode = "ok"
                outcomes = await waiting
        failed = [outcome for outcome in outcomes if isinstance(outcome, client.ServerFailure)]
        assert len(failed) == lost

    asyncio.run(main())


def test_what_was_not_sent_is_no_attempt(monkeypatch) -> None:
    """A server that is down for 0.3 s of every second, at a tenth of the real times, costs no reward."""
    monkeypatch.setattr(client, "OPEN_SECONDS", 0.2)
    monkeypatch.setattr(client, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(client, "BACKOFF", tenacity.wait_exponential_jitter(multiplier=0.05, max=3, jitter=0.1))

    async def main() -> None:
        with FaultServer(delay=0.03) as server:

            async def fail_now_and_then() -> None:
                while True:
                    for mode, seconds in (("500", 0.3), ("ok", 0.7)):
                        server.mode = mode
                        await asyncio.sleep(seconds)

            failing = asyncio.create_task(fail_now_and_then())
            async with scorer(server, concurrency=8) as score:
                queries = ["x" * length for length in range(400)]
                rewards = await asyncio.gather(*(score(RESPONSE._replace(query=query)) for query in queries))
            failing.cancel()
        assert rewards == list(map(reward_of, queries))

    asyncio.run(main())


def test_a_server_that_stays_down_delays_a_step_once(monkeypatch) -> None:
    """The outage is timed, not the wait of each response: those that wait for a slot fail with the others."""
    monkeypatch.setattr(client, "LONGEST_OUTAGE", 0.3)

    async def main() -> float:
        with FaultServer("refuse") as server:
            async with scorer(server, retries=99, concurrency=4) as score:
                start = time.perf_counter()
                outcomes = await asyncio.gather(*(score(RESPONSE) for _ in range(100)), return_exceptions=True)
        assert all("all replicas have been suspended for 0.3 s" in str(outcome) for outcome in outcomes)
        return time.perf_counter() - start

    assert asyncio.run(main()) < 0.3 * 100 / 4 / 2


@pytest.mark.parametrize("patient", [True, False])
def test_a_server_that_recovers_within_the_retries_costs_no_reward_however_many_wait(patient, monkeypatch) -> None:
    """One burst opens the breaker before any response has used up its retries."""
    monkeypatch.setattr(client, "OPEN_SECONDS", 0.2)
    monkeypatch.setattr(client, "BACKOFF", tenacity.wait_fixed(0.2))

    async def main() -> None:
        with FaultServer("flaky", count=3 * client.FAILURES_TO_OPEN) as server:
            async with scorer(server, patient=patient, retries=9) as score:
                rewards = await asyncio.gather(*(score(RESPONSE) for _ in range(32)))
        assert rewards == [reward_of(RESPONSE.query)] * 32

    asyncio.run(main())


def test_a_patient_scorer_waits_for_a_slow_trial(monkeypatch) -> None:
    monkeypatch.setattr(client, "OPEN_SECONDS", 0.1)

    async def main() -> None:
        with FaultServer("flaky", count=client.FAILURES_TO_OPEN, delay=0.5) as server:
            async with scorer(server, patient=True, retries=1) as score:
                outcomes = await asyncio.gather(*(score(RESPONSE) for _ in range(5)), return_exceptions=True)
        assert outcomes == [reward_of(RESPONSE.query)] * 5

    asyncio.run(main())


@pytest.mark.parametrize("patient", [True, False])
def test_a_body_without_end_takes_no_memory(patient) -> None:
    async def main() -> None:
        with FaultServer("long") as server:
            async with scorer(server, patient=patient, retries=3) as score:
                with pytest.raises(client.ServerFailure, match=r"longer than 1048576 bytes.*\(attempts: 1\)"):
                    await score(RESPONSE)

    asyncio.run(main())


def test_failures_must_be_in_a_row() -> None:
    async def main() -> None:
        with FaultServer() as server:
            async with scorer(server, retries=client.FAILURES_TO_OPEN - 2) as score:
                for mode in ("500", "ok") * 3:
                    server.mode = mode
                    with contextlib.nullcontext() if mode == "ok" else pytest.raises(client.ServerFailure, match="500"):
                        await score(RESPONSE)

    asyncio.run(main())


def test_no_replica_left(monkeypatch) -> None:
    monkeypatch.setattr(client, "LONGEST_OUTAGE", 0.2)

    async def main() -> None:
        with FaultServer("500") as a, FaultServer("refuse") as b:
            async with scorer(a, b, retries=99) as score:
                with pytest.raises(client.ServerFailure, match=r"all replicas .*\(attempts: 10\)"):
                    await score(RESPONSE)
                with pytest.raises(client.ServerFailure) as caught:
                    await score(RESPONSE)
            message = rf"all replicas .*5 times.*{re.escape(b.url)}: ConnectError.*\(attempts: 0\)$"
            assert re.match(message, str(caught.value)) and a.requests == client.FAILURES_TO_OPEN

    asyncio.run(main())


@pytest.mark.parametrize("mode", ["404", "429", "null"])
def test_a_replica_that_replies_is_not_suspended(mode) -> None:
    async def main() -> None:
        with FaultServer(mode) as server:
            async with scorer(server, retries=0) as score:
                for _ in range(2 * client.FAILURES_TO_OPEN):
                    with contextlib.suppress(client.ServerFailure):  # null may mean that it does not apply
                        await score(RESPONSE)
            assert server.requests == 2 * client.FAILURES_TO_OPEN

    asyncio.run(main())


def test_concurrency_is_capped() -> None:
    async def main() -> None:
        with FaultServer(delay=0.05) as server:
            async with scorer(server, concurrency=3) as score:
                await asyncio.gather(*(score(RESPONSE) for _ in range(12)))
            assert server.most_in_flight == 3 and server.requests == 12

    asyncio.run(main())


def test_a_response_that_waits_for_its_retry_holds_no_slot(monkeypatch) -> None:
    monkeypatch.setattr(client, "BACKOFF", tenacity.wait_fixed(0.3))

    async def main() -> None:
        with FaultServer("flaky", count=1) as server:
            async with scorer(server, concurrency=1) as score:
                first, second = (asyncio.create_task(score(RESPONSE)) for _ in range(2))
                await second
                assert not first.done()
                await first

    asyncio.run(main())


def test_the_token_is_sent_and_not_shown(monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    with FaultServer() as server:
        score_once(server, token_env="JUDGE_TOKEN")
        assert server.authorization == f"Bearer {TOKEN}"
    with FaultServer("echo") as server, pytest.raises(client.ServerFailure, match=r"what is Bearer \*\*\*\?"):
        score_once(server, token_env="JUDGE_TOKEN")
    for mode in {**FINAL, **REPEATED}:
        with FaultServer(mode) as server, pytest.raises(client.ServerFailure) as caught:
            score_once(server, token_env="JUDGE_TOKEN", retries=0, timeout=0.1)
        assert TOKEN not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("mode", ["401", "403"])
def test_a_refused_token_is_named(mode, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    with (
        FaultServer(mode) as server,
        pytest.raises(client.ServerFailure, match=f"HTTP {mode}.*token in JUDGE_TOKEN"),
    ):
        score_once(server, token_env="JUDGE_TOKEN")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "unset or empty"),
        ("", "unset or empty"),
        (f"{TOKEN}\n", "other characters"),
        (f"my {TOKEN}", "other characters"),
        (f"{TOKEN}é", "other characters"),
    ],
)
@pytest.mark.parametrize("function", [http.check_http, http.load_http])
def test_a_token_that_cannot_be_sent(function, value, problem, monkeypatch) -> None:
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_TOKEN", value)
    with pytest.raises(ValueError, match=rf"token_env .*printable ASCII.*found .*{problem}") as caught:
        function("http://localhost/get_reward", http.HttpOptions(token_env="JUDGE_TOKEN"))
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert "JUDGE_TOKEN" not in str(caught.value), "it may be the token itself"


def test_the_query_of_a_url_is_sent_and_not_shown(monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", TOKEN)
    with FaultServer("500") as server, pytest.raises(client.ServerFailure) as caught:
        score_once(SimpleNamespace(url=f"{server.url}?model=${{JUDGE_KEY}}&key=${{JUDGE_KEY}}"), retries=0)
    assert server.paths == ["/get_reward?model=s3cret%2Ftoken&key=s3cret%2Ftoken"] and TOKEN not in str(caught.value)


def test_a_key_that_the_server_repeats_is_not_shown(monkeypatch, caplog) -> None:
    """Nor one that httpx would log with every request."""
    monkeypatch.setenv("JUDGE_KEY", TOKEN)
    with (
        caplog.at_level("INFO"),
        FaultServer("echo_path") as server,
        pytest.raises(client.ServerFailure, match=r"no access to /get_reward\?key=\*\*\*") as caught,
    ):
        score_once(SimpleNamespace(url=f"{server.url}?key=${{JUDGE_KEY}}"), retries=0)
    for secret in (TOKEN, "s3cret"):
        assert secret not in str(caught.value) + caplog.text


@pytest.mark.parametrize(
    "reply",
    [
        b"Bearer %s what\r\n\r\n",  # no status line: the error of the HTTP library quotes it
        b"HTTP/1.1 200 %s\r\nContent-Encoding: %s\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nBearer %s\r\n\r\n",
        b"HTTP/1.1 %s OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: %s\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n",
        b"HTTP/1.1 302 %s\r\nLocation: http://%s/\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_a_token_that_a_malformed_reply_repeats_is_not_shown(reply, monkeypatch) -> None:
    secret = "s3cret'\\token"
    monkeypatch.setenv("JUDGE_TOKEN", secret)

    async def ask() -> str:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply.replace(b"%s", secret.encode()))
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        score = http.load_http(url, http.HttpOptions(retries=0, timeout=5, token_env="JUDGE_TOKEN"), patient=False)
        with pytest.raises(client.ServerFailure) as caught:
            await score(Response("q", "p", "l", "r", 1))
        server.close()
        return str(caught.value)

    assert "s3cret" not in asyncio.run(ask())


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("key=pa55", "other text"),
        ("pa55", "other text"),
        ("", "other text"),
        ("key=${JUDGE_KEY}&token=pa55", "other text"),
        ("key=${JUDGE_KEY}pa55", "other text"),
        ("key=$JUDGE_KEY", "other text"),
        ("key=${OTHER_KEY}", "OTHER_KEY unset"),
    ],
)
@pytest.mark.parametrize("function", [http.check_http, http.load_http])
def test_a_key_in_a_url_must_come_from_the_environment(function, query, problem, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", TOKEN)
    with pytest.raises(ValueError, match=rf"query .*KEY=\$.VARIABLE.*found .*{problem}") as caught:
        function(f"https://judge/score?{query}", http.HttpOptions())
    assert "pa55" not in str(caught.value) and TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "location",
    ["http://judge", "https://judge:8443/v1/@model", "http://[::1]:5000/get_reward|http://127.0.0.1:5001/"],
)
def test_replicas(location) -> None:
    assert http.split_replicas(location) == tuple(location.split("|"))


@pytest.mark.parametrize(
    "location",
    [
        "",
        "judge:5000/get_reward",
        "/get_reward",
        "ftp://judge/get_reward",
        "http:///get_reward",
        "http://judge:port/get_reward",
        "http://judge:70000/get_reward",
        "http://judge/get_reward |http://judge/get_reward",
        "http://judge/get_reward|",
        "http://judge/get reward",
        "http://judge/\n",
        "http://judge/#part",
        "http://[::1/get_reward",
    ],
)
@pytest.mark.parametrize("function", [http.check_http, http.load_http])
def test_replicas_that_cannot_be_asked(function, location) -> None:
    with pytest.raises(ValueError, match=r"replica .*http\(s\)://HOST\[:PORT\]/PATH.*found "):
        function(location, http.HttpOptions())


@pytest.mark.parametrize(
    "location", ["http://user:pa55@judge/", "http://pa55@judge/", "http://a:pa55/@judge/", "ftp://judge/#pa55"]
)
def test_a_password_is_refused_and_not_shown(location) -> None:
    with pytest.raises(ValueError, match=r"http\(s\)://HOST.*without user or password.*found ") as caught:
        http.split_replicas(location)
    assert "pa55" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("location", "warned"),
    [
        ("https://judge/get_reward", []),
        ("http://localhost:5000/get_reward|http://127.0.0.1/|http://127.8.9.1:5000/|http://[::1]:5000/", []),
        (
            "http://10.0.0.1/a|https://judge/b|http://judge/c?key=${JUDGE_TOKEN}",
            ["http://10.0.0.1/a", "http://judge/c"],
        ),
        ("http://[2001:db8::1]/", ["http://[2001:db8::1]/"]),
        ("http://localhost.example.com/", ["http://localhost.example.com/"]),
    ],
)
def test_plain_http_to_another_machine_gives_a_warning(location, warned, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    warnings = http.check_http(location, http.HttpOptions())
    assert [warning.split()[0] for warning in warnings] == warned
    warnings = http.check_http(location, http.HttpOptions(token_env="JUDGE_TOKEN"))
    assert all("token in JUDGE_TOKEN" in warning and TOKEN not in warning for warning in warnings)


def test_options_as_text() -> None:
    options = http.HttpOptions.model_validate({"timeout": "30", "retries": "0", "concurrency": "8", "token_env": "T"})
    assert options == http.HttpOptions(timeout=30, retries=0, concurrency=8, token_env="T")


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": "inf"},
        {"timeout": "nan"},
        {"timeout": True},
        {"retries": -1},
        {"retries": 1.5},
        {"retries": False},
        {"concurrency": 0},
        {"concurrency": True},
        {"token_env": ""},
        {"token": "s3cret"},
    ],
)
def test_invalid_options(options) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        http.HttpOptions.model_validate(options)


def test_the_extra_is_not_needed_without_such_an_objective() -> None:
    hide = "import sys; sys.modules |= dict.fromkeys(('httpx', 'tenacity', 'circuitbreaker'))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"{hide}; import pama_plugin.settings.load"], check=True)

"""The kind ``py`` in processes of its own: what a function may do there without harm to the rollout engine."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pama_plugin.errors import PamaError
from pama_plugin.rewards import Response
from pama_plugin.rewards.options import PyOptions
from pama_plugin.rewards.processes import Processes
from pama_plugin.rewards.py import check_function, load_function
from pama_plugin.rewards.response import Scorer


def response(text: str = "fine") -> Response:
    return Response(query=text, prompt="", label="", response=text, num_tokens=1)


def write(folder: Path, body: str, top: str = "", name: str = "rewards.py") -> str:
    """``body`` is run for the query ``bad``; any other query has the reward 1."""
    file = folder / name
    lines = ["def f(queries, prompts, labels):", "    if queries == ['bad']:"]
    lines += [f"        {line}" for line in body.split("\n")]
    file.write_text(top + "\n" + "\n".join([*lines, "    return 1.0", ""]))
    return f"{file}:f"


async def gather(score: Scorer, *texts: str) -> list[str]:
    """Rewards or problems, as text."""
    results = await asyncio.gather(*(score(response(text)) for text in texts), return_exceptions=True)
    return [str(result) for result in results]


HANGS = {
    "a regular expression": "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "a loop": "while True: pass",
    "C code that holds the interpreter": "import ctypes; ctypes.PyDLL(None).sleep(3600)",
    "a conversion": "class Slow:\n    def __float__(self):\n        while True: pass\nreturn Slow()",
    "a repr": "class Slow:\n    def __repr__(self):\n        while True: pass\nreturn Slow()",
    "the text of an error": "class Slow(Exception):\n    def __str__(self):\n        while True: pass\nraise Slow",
    "ignored signals": "import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(3600)",
    "a number without end": "return [10 ** 10 ** 10]",
}


@pytest.mark.parametrize("body", HANGS.values(), ids=HANGS)
def test_a_call_that_does_not_return_is_ended_and_others_are_not_affected(tmp_path, body) -> None:
    async def ask():
        score = load_function(write(tmp_path, body), PyOptions(timeout=1, concurrency=4))
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        first = await gather(score, "bad", "fine", "fine", "bad", "fine")
        ticking.cancel()
        return first, await gather(score, *8 * ["fine"]), ticks

    first, then, ticks = asyncio.run(ask())
    assert first == ["no answer within 1 s", "1.0", "1.0", "no answer within 1 s", "1.0"]
    assert then == 8 * ["1.0"]
    assert ticks > 20, "the event loop stood still"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("import os; os._exit(3)", "its process exited with status 3"),
        ("import os; os.kill(os.getpid(), 11)", "its process was ended by SIGSEGV"),
        ("import os; os.closerange(3, 256)", "its process"),
        ("import sys; sys.exit('no key')", r"SystemExit: no key \(.*rewards.py, line 4\)"),
        # A shell makes background processes, such as a whole run of the tests, ignore SIGINT.
        (
            "import os, signal; signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2)",
            "KeyboardInterrupt",
        ),
        ("raise ValueError('x' * 10 ** 8)", "ValueError: xxxx"),
    ],
)
def test_a_call_that_ends_its_process_is_a_failure(tmp_path, body, problem) -> None:
    async def ask():
        score = load_function(write(tmp_path, body), PyOptions(timeout=10, concurrency=2))
        with pytest.raises(PamaError, match=problem) as error:
            await score(response("bad"))
        assert len(str(error.value)) < 20_000
        return await gather(score, "fine", "fine", "fine")

    assert asyncio.run(ask()) == 3 * ["1.0"]


def test_a_function_may_use_signals_and_print(tmp_path, capfd) -> None:
    """As libraries that limit their own time do: only a main thread may set a signal handler."""
    body = (
        "import signal, time\ndef stop(*_): raise TimeoutError('took too long')\n"
        "signal.signal(signal.SIGALRM, stop)\nsignal.setitimer(signal.ITIMER_REAL, 0.05)\n"
        "print('started')\ntime.sleep(60)"
    )

    async def ask():
        score = load_function(write(tmp_path, body), PyOptions(timeout=10))
        assert (await gather(score, "bad"))[0].startswith("TimeoutError: took too long")
        assert "started" in capfd.readouterr().out

    asyncio.run(ask())


@pytest.mark.parametrize(("patience", "processes"), [(600, 1), (2, 3)])
def test_others_start_once_calls_have_queued_for_as_long_as_a_start_takes(tmp_path, patience, processes) -> None:
    """With an import of 2 s and calls of half a second, no single one of them waits for 2 s."""
    path, _, name = write(tmp_path, "time.sleep(0.5); return os.getpid()", top="import os, time").rpartition(":")

    async def ask() -> set[float]:
        pool = Processes(path, name, (None,), limit=3, timeout=60)
        assert 0 < pool.patience < 60
        pool.patience = patience
        found = await asyncio.gather(*(pool.call("bad", "", "", {}) for _ in range(12)))
        assert pool.count == processes and not pool.waiting
        return set(found)

    assert len(asyncio.run(ask())) == processes


def test_a_process_that_died_while_idle_costs_no_reward(tmp_path) -> None:
    path, _, name = write(tmp_path, "return os.getpid()", top="import os").rpartition(":")

    async def ask() -> None:
        pool = Processes(path, name, (None,), limit=3, timeout=60)
        first = await pool.call("bad", "", "", {})
        os.kill(int(first), signal.SIGKILL)
        assert ended(int(first))
        assert await pool.call("bad", "", "", {}) != first and pool.count == 1

    asyncio.run(ask())


def test_a_process_that_cannot_start_costs_no_reward_while_another_runs(tmp_path, caplog) -> None:
    """As for want of memory; without any process the calls fail."""
    once = f"import os, time\nif os.path.exists({str(tmp_path / 'started')!r}): raise MemoryError\n"
    once += f"open({str(tmp_path / 'started')!r}, 'w')"
    path, _, name = write(tmp_path, "time.sleep(0.2); return 1.0", top=once).rpartition(":")

    async def ask() -> None:
        pool = Processes(path, name, (None,), limit=3, timeout=60)
        pool.patience = 0.01
        assert await asyncio.gather(*(pool.call("bad", "", "", {}) for _ in range(6))) == [1.0] * 6
        assert pool.count == pool.limit == 1 and "cannot start, 1 are running: MemoryError" in caplog.text
        pool.timeout = 0.05
        problems = await asyncio.gather(*(pool.call("bad", "", "", {}) for _ in range(3)), return_exceptions=True)
        assert [str(problem)[:24] for problem in problems] == [
            "no answer within 0.05 s",
            *["its process cannot start"] * 2,
        ]

    asyncio.run(ask())


def test_what_a_call_has_started_ends_with_it(tmp_path) -> None:
    body = f"subprocess.Popen(['sh', '-c', 'echo $$ > {tmp_path}/pid; sleep 3600'])\ntime.sleep(3600)"

    async def ask():
        score = load_function(write(tmp_path, body, top="import subprocess, time"), PyOptions(timeout=1))
        return await gather(score, "bad")

    assert asyncio.run(ask()) == ["no answer within 1 s"]
    assert ended(int((tmp_path / "pid").read_text()))


def test_processes_end_with_the_engine_however_it_ends(tmp_path) -> None:
    """Also one that holds the interpreter, which could not notice it by itself."""
    body = f"""
child = subprocess.Popen(['sleep', '3600'])
open('{tmp_path}/pid', 'w').write(f'{{os.getpid()}} {{child.pid}} ')
while True: pass"""
    engine = (
        "import asyncio; from pama_plugin.rewards import Response; from pama_plugin.rewards.options import PyOptions\n"
        "from pama_plugin.rewards.py import load_function\n"
        f"score = load_function({write(tmp_path, body, top='import os, subprocess')!r}, PyOptions())\n"
        "asyncio.run(score(Response('bad', '', '', '', 1)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", engine], env=environment) as process:
        pid = tmp_path / "pid"
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text().endswith(" ")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert all(ended(int(each)) for each in pid.read_text().split()), "of the function, and what it has started"


def ended(pid: int) -> bool:
    """Whether the process ends within some seconds; it may stay as a zombie if nobody asks for its status."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_processes_end_with_the_scorer(tmp_path) -> None:
    async def ask():
        score = load_function(write(tmp_path, "return os.getpid()", top="import os"), PyOptions())
        return int(await score(response("bad")))

    assert ended(asyncio.run(ask()))


@pytest.mark.parametrize("isolate", [True, False])
def test_a_file_imports_its_neighbours(tmp_path, isolate) -> None:
    (tmp_path / f"helper{isolate}.py").write_text("def half():\n    return 0.5\n")
    location = write(tmp_path, "return half()", top=f"from helper{isolate} import half")
    score = load_function(location, PyOptions(isolate=isolate))
    assert asyncio.run(score(response("bad"))) == 0.5


def test_a_file_may_be_called_like_a_module_that_it_imports(tmp_path) -> None:
    top = "import fractions, half_reward\nassert fractions.__file__ != __file__"
    (tmp_path / "half_reward.py").write_text("half = 0.5\n")
    location = write(tmp_path, "return fractions.Fraction(half_reward.half)", top, name="fractions.py")
    assert asyncio.run(load_function(location, PyOptions())(response("bad"))) == 0.5


def test_a_function_reaches_processes_that_it_starts(tmp_path) -> None:
    top = "from multiprocessing import get_context\n\ndef half(x):\n    return x / 2\n"
    body = "with get_context('spawn').Pool(1) as pool: return pool.map(half, [1.0])"
    location = write(tmp_path, body, top, name="my_rewards.py")
    assert asyncio.run(load_function(location, PyOptions())(response("bad"))) == 0.5


@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1"])
def test_a_file_in_another_encoding(tmp_path, encoding) -> None:
    file = tmp_path / "rewards.py"
    cookie = "# coding: latin-1\n" if encoding == "latin-1" else ""
    file.write_text(f"{cookie}def f(queries, prompts, labels):\n    return len('é')\n", encoding=encoding)
    check_function(f"{file}:f", PyOptions())
    assert asyncio.run(load_function(f"{file}:f", PyOptions())(response())) == 1


def test_a_label_of_any_type_arrives(tmp_path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def f(queries, prompts, labels):\n    return labels[0]['answer'] + len(queries[0])\n")
    scored = Response("\ud800" * 300_000, "", {"answer": 2}, "", 1)  # longer than a socket's buffer
    assert asyncio.run(load_function(f"{file}:f", PyOptions())(scored)) == 300_002

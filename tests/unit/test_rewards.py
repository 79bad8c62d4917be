"""Builtin rewards, the kind py, and rewards of other packages."""

import asyncio
import contextlib
import re
import sys

import pytest
import torch

from pama_plugin.errors import PamaError
from pama_plugin.rewards import Response, available_rewards, load_measure
from pama_plugin.rewards.builtin import load_builtin
from pama_plugin.rewards.options import PyOptions
from pama_plugin.rewards.py import check_function, load_function

NEEDS_NUMPY = pytest.mark.needs_extras


def response(num_tokens: int = 7, text: str = " more, please") -> Response:
    return Response(query="Once more, please", prompt="Once", label="tale", response=text, num_tokens=num_tokens)


def call(location: str, **options) -> float:
    return asyncio.run(load_function(location, PyOptions(**options))(response()))


@pytest.mark.parametrize(("tokens", "reward"), [(35, 0.5), (70, 0.5), (140, 1.0), (210, 1.5), (400, 1.5)])
def test_length_as_in_the_papers_first_experiment(tokens, reward) -> None:
    assert load_measure("length", {"scale": "140", "min": "0.5", "max": "1.5"})(response(tokens)) == reward
    assert load_measure("length", {"preset": "imdb"})(response(tokens)) == reward


def test_length_counts_tokens_by_default() -> None:
    assert load_measure("length", {})(response(7)) == 7.0
    assert asyncio.run(load_builtin("length", {})(response(7))) == 7.0


@pytest.mark.parametrize(
    "body", ["[0.5]", "torch.tensor([0.5])", "{'rewards': torch.tensor([0.5]), 'scores': None}", "0.5"]
)
def test_a_function_gets_the_arguments_of_a_reward_func(tmp_path, body) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(
        "import torch\ndef f(queries, prompts, labels):\n"
        "    assert (queries, prompts, labels) == (['Once more, please'], ['Once'], ['tale'])\n"
        f"    return {body}\n"
    )
    assert call(f"{file}:f") == 0.5


@pytest.mark.parametrize(
    ("definition", "fits"),
    [
        ("def f(q, p, l)", True),
        ("def f(q, p, l, extra=None, **rest)", True),
        ("def f(*texts)", True),
        ("def f(q, p, l, /, *, scale=2)", True),
        ("def f(q, p)", False),
        ("def f(q, p, l, extra)", False),
        ("def f(q, p, l, *, scale)", False),
        ("async def f(q, p, l)", True),
        ("async def f(q, p)", False),
        ("@functools.partial(make)\ndef f(q)", True),  # a decorator may change the signature
        ("f = None\ndef f(q)", True),
    ],
)
def test_a_signature_other_than_that_of_a_reward_func_is_refused(tmp_path, definition, fits) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(f"{definition}:\n    return 0.0\n")
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(ValueError, match=r"rewards.py: .*def f\(queries, prompts, labels\).*found (async )?def f\(")
    ):
        check_function(f"{file}:f", PyOptions())


VERL = """
def score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)
"""
TRL = """
def score(prompts, completions, answer, **kwargs):
    return [float(a == b) for a, b in zip(completions, answer)]
"""
SHORT = "def score(completions, **kwargs):\n    return [float(text == '4') for text in completions]"
ORDER = (
    "def score(prompts, queries, labels):\n    return [float(a + c == b) for a, b, c in zip(prompts, queries, labels)]"
)


@pytest.mark.parametrize("source", [VERL, TRL, SHORT, ORDER])
def test_a_function_for_another_trainer_is_refused_with_the_lines_that_adapt_it(tmp_path, source) -> None:
    """OpenRLHF would call it with the wrong texts: verl's gave a right answer 0, and a wrong one 1."""
    file = tmp_path / "rewards.py"
    file.write_text(source)
    with pytest.raises(ValueError, match=r"rewards.py: must be .*found def score\(.*wrap it:") as error:
        check_function(f"{file}:score", PyOptions())
    file.write_text(f"{source}\n\n\n{str(error.value).partition('wrap it:')[2]}\n")
    location = f"{file}:score_of_query"
    check_function(location, PyOptions())
    score = load_function(location, PyOptions())
    for text, reward in {"4": 1.0, "5": 0.0}.items():
        assert asyncio.run(score(Response(f"2 + 2 = {text}", "2 + 2 = ", "4", text, 1))) == reward


@pytest.mark.parametrize(
    "names", ["queries, prompts, labels", "q, p, l", "query, prompt, answer", "texts, _, ground_truth"]
)
def test_names_that_may_be_openrlhfs_are_taken(tmp_path, names) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(f"def f({names}):\n    return 0.0\n")
    check_function(f"{file}:f", PyOptions())


def test_an_error_has_the_line_in_the_file_of_the_user(tmp_path) -> None:
    file = tmp_path / "rewards.py"
    lines = ("import json", "def read(text):", "    return json.loads(text)", "def f(q, p, l):", "    return read('{')")
    file.write_text("\n".join(lines))
    with pytest.raises(PamaError, match=r"JSONDecodeError: .* \(.*rewards.py, line 3\)"):
        call(f"{file}:f")


def test_functions_of_one_file_in_the_engine_share_it(tmp_path) -> None:
    """The file is imported once, with the models that it loads; dataclasses in it work."""
    file = tmp_path / "rewards.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Model:\n    calls: int = 0\n"
        "model = Model()\n"
        "def f(q, p, l):\n    model.calls += 1\n    return [model.calls]\n"
        "def g(q, p, l):\n    model.calls += 1\n    return [model.calls]\n"
    )
    assert call(f"{file}:f", isolate=False) == 1 and call(f"{file}:g", isolate=False) == 2
    assert call(f"{file}:g") == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{}", "dict with 'rewards', found none"),
        ("{'reward': 1.0, 'scores': 2}", "dict with 'rewards', found the keys 'reward', 'scores'"),
        ("bytearray(b'5')", r"returned bytearray\(b'5'\).*not a number"),
        ("[memoryview(b'5')]", "returned <memory.*not a number"),
        ("b'5'", "returned b'5'.*not a number"),
        ("True", "returned True.*not a number"),
        ("{'rewards': [False]}", "returned False.*not a number"),
        ("__import__('torch').tensor([True])", "returned True.*not a number"),
        pytest.param("__import__('numpy').bool_(True)", "returned True.*not a number", marks=NEEDS_NUMPY),
        pytest.param(
            "__import__('numpy').ma.masked_array([5.0], mask=[True])", "returned None.*not a number", marks=NEEDS_NUMPY
        ),
        ("1j", "returned 1j.*not a number"),
        ("float", "returned <class 'float'>.*not a number"),
        ("[0.5, 0.5]", "returned 2 rewards for 1 response"),
        ("[]", "returned 0 rewards for 1 response"),
        ("'0.5'", "returned '0.5'.*not a number"),
        ("['good']", "returned 'good'.*not a number"),
        ("{'rewards': {}}", "returned {}.*not a number"),
    ],
)
def test_a_function_that_returns_the_wrong_thing(tmp_path, body, message) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(f"def f(queries, prompts, labels):\n    return {body}\n")
    with pytest.raises((PamaError, TypeError), match=message):
        call(f"{file}:f")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('label')", "KeyError: 'label'"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("next(iter(()))", "StopIteration"),  # a future cannot carry it
        ("import time; time.sleep(60)", "no answer within 0.1 s"),
    ],
)
def test_a_function_that_does_not_return(tmp_path, body, message) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(f"def f(queries, prompts, labels):\n    {body}\n")
    with pytest.raises(PamaError, match=message):
        call(f"{file}:f", timeout=0.1)


NUMBERS = {
    "0.5": 0.5,
    "[1]": 1.0,
    "{'rewards': [[0.5]], 'scores': [9]}": 0.5,
    "__import__('torch').tensor([[0.5]], dtype=__import__('torch').bfloat16, requires_grad=True)": 0.5,
    "__import__('fractions').Fraction(1, 4)": 0.25,
    "__import__('decimal').Decimal('0.25')": 0.25,
}


ARRAYS = {
    "__import__('numpy').ma.masked_array([5.0, 0.5], mask=[True, False])[1:]": 0.5,
    "__import__('pandas').Series([0.5])": 0.5,  # which has a method called mask
}


@pytest.mark.parametrize("body", [*NUMBERS, *(pytest.param(body, marks=NEEDS_NUMPY) for body in ARRAYS)])
def test_a_number_of_any_type_and_shape(tmp_path, body) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(f"def f(queries, prompts, labels):\n    return {body}\n")
    assert call(f"{file}:f") == (NUMBERS | ARRAYS)[body]


def test_a_file_may_replace_functions_of_torch(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "as_tensor", lambda *_, **__: torch.zeros(1))
    file = tmp_path / "rewards.py"
    file.write_text("def f(queries, prompts, labels):\n    return [0.7]\n")
    assert call(f"{file}:f", isolate=False) == 0.7


def test_the_time_limit_includes_the_conversion(tmp_path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(
        "import time\n\nclass Slow:\n    def __float__(self):\n        time.sleep(60)\n        return 1.0\n\n"
        "def f(queries, prompts, labels):\n    return [Slow()]\n"
    )
    with pytest.raises(PamaError, match="no answer within 0.1 s"):
        call(f"{file}:f", timeout=0.1)


@pytest.mark.parametrize(
    "body", ["import sys\nsys.exit('set JUDGE_API_KEY first')", "raise SystemExit('set JUDGE_API_KEY first')"]
)
@pytest.mark.parametrize("isolate", [True, False])
def test_a_file_that_exits_at_its_import_is_named(tmp_path, body, isolate) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(f"{body}\n\ndef f(queries, prompts, labels):\n    return 1.0\n")
    with pytest.raises(PamaError, match="rewards.py exits when it is imported: set JUDGE_API_KEY first"):
        call(f"{file}:f", isolate=isolate)


def test_functions_that_hang_in_the_engine_take_no_more_threads_than_they_may(tmp_path) -> None:
    """The process can also exit although they never return; otherwise pytest would hang here."""
    file = tmp_path / "rewards.py"
    file.write_text("import time\n\ndef f(queries, prompts, labels):\n    time.sleep(3600)\n")

    async def ask():
        score = load_function(f"{file}:f", PyOptions(timeout=0.05, concurrency=2, isolate=False))
        return await asyncio.gather(*(score(response()) for _ in range(9)), return_exceptions=True)

    problems = [str(problem) for problem in asyncio.run(ask())]
    assert problems[:2] == ["no answer within 0.05 s"] * 2
    assert re.search("not called.* 2 earlier calls", problems[-1])


def test_the_time_limit_excludes_waiting_for_a_slot(tmp_path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("import time\n\ndef f(queries, prompts, labels):\n    time.sleep(0.1)\n    return 1.0\n")

    async def ask():
        score = load_function(f"{file}:f", PyOptions(timeout=0.3, concurrency=1))
        return await asyncio.gather(*(score(response()) for _ in range(6)))

    assert asyncio.run(ask()) == [1.0] * 6


def test_a_function_may_modify_its_arguments(tmp_path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def f(queries, prompts, labels):\n    queries.clear(); labels[0] = 'x'\n    return 1.0\n")
    scored = response()
    asyncio.run(load_function(f"{file}:f", PyOptions())(scored))
    assert scored == response()


@pytest.mark.parametrize(("unit", "reward"), [("tokens", 7), ("words", 2), ("characters", 13)])
def test_units_of_length(unit, reward) -> None:
    assert load_measure("length", {"unit": unit})(response(7)) == reward


@pytest.mark.parametrize(
    ("text", "reward"), [("a b c a b c", -0.25), ("a b c d", 0), ("a a a a a", -2 / 3), ("a b", 0), ("", 0)]
)
def test_repetition(text, reward) -> None:
    assert load_measure("repetition", {})(response(text=text)) == pytest.approx(reward)


@pytest.mark.parametrize(
    ("options", "text", "reward"),
    [
        ({"pattern": r"<answer>.*</answer>"}, "so <answer>4\n2</answer>.", 1),
        ({"pattern": r"<answer>.*</answer>"}, "so 42", 0),
        ({"pattern": r"\d+", "full": "true"}, "42", 1),
        ({"pattern": r"\d+", "full": "true"}, "42.", 0),
    ],
)
@pytest.mark.needs_extras
def test_regex(options, text, reward) -> None:
    assert load_measure("regex", options)(response(text=text)) == reward


@pytest.mark.needs_extras
def test_a_regex_of_exponential_time_is_stopped(monkeypatch) -> None:
    from pama_plugin.rewards import builtin

    monkeypatch.setattr(builtin, "REGEX_SECONDS", 0.1)
    with pytest.raises(PamaError, match="TimeoutError"):
        asyncio.run(load_builtin("regex", {"pattern": "(a|aa)+$"})(response(text="a" * 60 + "b")))


@pytest.mark.parametrize(
    ("options", "text", "reward"),
    [
        ({}, '{"a": [1, 2]}', 1),
        ({}, ' "text" ', 1),
        ({}, '{"a": 1} and more', 0),
        ({}, "NaN", 0),
        ({}, "[" * 100_000, 0),
        ({}, "", 0),
        ({"fenced": "true"}, 'Here:\n```json\n{"a": 1}\n```\nbye', 1),
        ({"fenced": "true"}, '{"a": 1}', 0),
        ({"fenced": "true"}, "```python\nx = 1\n```\n42\n```bash\nls\n```", 0),  # between two blocks is no block
        ({"fenced": "true"}, "```\n42\n```", 0),
        ({"fenced": "true"}, '```python\nx = 1\n```\n```json\n{"a": 1}\n```', 1),
        ({"fenced": "true"}, "```json\n1 2\n```\n```json\n3\n```", 0),  # the first one counts
        *(
            ({"fenced": "true"}, f"```{tag}\n42\n```", 1)
            for tag in ("JSON", "json ", " json", "json\r", "json title=x")
        ),
        ({"fenced": "true"}, '```json\r\n{"a":\r\n1}\r\n```', 1),
        ({"fenced": "true"}, '```json\n{"a": "```"}\n```', 1),
        ({"fenced": "true"}, '```json\n"a\u2028b"\n```', 1),  # which splitlines takes for the end of a line
        ({"fenced": "true"}, "````json\n42\n````", 1),
        ({"fenced": "true"}, "~~~json\n42\n~~~", 1),
        ({"fenced": "true"}, "  ```json\n  42\n  ```", 1),
        ({"fenced": "true"}, "````text\n```json\n42\n```\n````", 0),  # a fence inside a longer one is text
        ({"fenced": "true"}, "```json\n42", 1),
    ],
)
def test_json(options, text, reward) -> None:
    assert load_measure("json", options)(response(text=text)) == reward


@pytest.mark.parametrize("decorated", [False, True])
def test_an_installed_package_adds_a_reward(decorated, tmp_path, monkeypatch) -> None:
    name = f"shout{decorated}"
    decorator = f"@register_reward({name!r})\n" if decorated else ""
    (tmp_path / f"other{decorated}.py").write_text(
        f"from pama_plugin.rewards import register_reward\n\n{decorator}def shout(*, marks: int = 1):\n"
        "    return lambda response: float(response.response.count('!') >= marks)\n"
    )
    metadata = tmp_path / f"other{decorated}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: other{decorated}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[pama_plugin.rewards]\n{name} = other{decorated}:shout\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert name in available_rewards()
    try:
        assert load_measure(name, {"marks": "2"})(response(text="no!!")) == 1
        with pytest.raises(ValueError, match=f"builtin:{name} .*option loud.*marks"):
            load_measure(name, {"loud": 1})
    finally:
        from pama_plugin.rewards import builtin

        builtin.REWARDS.entries.pop(name, None)
        sys.modules.pop(f"other{decorated}", None)


def test_an_error_whose_text_raises_is_reported_by_its_type(tmp_path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(
        "class Silent(Exception):\n    def __str__(self): raise RuntimeError\n"
        "def f(queries, prompts, labels):\n    raise Silent\n"
    )
    with pytest.raises(PamaError, match=r"Silent: \(its text cannot be read\) \(.*rewards.py, line 4\)"):
        call(f"{file}:f", timeout=5)


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ("raise RuntimeError('Already borrowed')", "concurrency=1"),
        ("import signal; signal.signal(signal.SIGALRM, print)", "isolate=true"),
    ],
)
def test_errors_of_threads_say_what_to_set(tmp_path, body, hint) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(f"def f(queries, prompts, labels):\n    {body}\n")
    with pytest.raises(PamaError, match=hint):
        call(f"{file}:f", isolate=False)


@pytest.mark.parametrize("isolate", [True, False])
def test_what_a_function_returns_beside_its_rewards_is_said_once(tmp_path, isolate, capfd) -> None:
    file = tmp_path / f"extra{isolate}.py"
    file.write_text(
        "def f(q, p, l):\n    return {'rewards': 1.0, 'scores': 2.0, 'extra_logs': {'a': 1}, 'none': None}\n"
    )

    async def ask() -> None:
        score = load_function(f"{file}:f", PyOptions(isolate=isolate))
        for _ in range(3):
            await score(response())

    asyncio.run(ask())
    assert capfd.readouterr().err.count("also returns extra_logs, scores: not used") == 1


@pytest.mark.parametrize("reward", ["1.2345678", "[1.2345678]", "{'rewards': [1.2345678]}"])
def test_the_default_dtype_does_not_round_rewards(tmp_path, reward) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(f"def f(queries, prompts, labels):\n    return {reward}\n")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert call(f"{file}:f", isolate=False) == 1.2345678
    finally:
        torch.set_default_dtype(before)

"""Objectives that apply to some prompts, and objectives that share one call."""

import asyncio
import math
from pathlib import Path

import pytest
from faultserver import FaultServer

from pama_plugin.batch.outcome import NOT_ASKED, Outcome, attempt, code_of
from pama_plugin.errors import ConfigError
from pama_plugin.rewards import Response, RewardKind
from pama_plugin.settings.load import dump_config, load_config, load_objectives
from pama_plugin.settings.objective import make_objective, parse_objective
from pama_plugin.settings.source import group_by_source

RESPONSE = Response("2 + 2? 4", "2 + 2?", "4", " 4", 2, {"answer": "4", "level": 3})
GRADE = """
calls = []


def grade(queries, prompts, labels, answer, **kwargs):
    calls.append(queries)
    (query,), (right,) = queries, answer
    return {"correct": [float(right in query)], "calls": len(calls), "style": None, "note": "text", "rewards": [0.5]}
"""


@pytest.fixture
def grade(tmp_path) -> str:
    (tmp_path / "grade.py").write_text(GRADE)
    return f"py:{tmp_path}/grade.py:grade,columns=answer,isolate=false"


def config_of(*objectives: str, file: str | None = None):
    return load_config("linear", objectives, file, None, None, default_level="token")


def ask(*texts: str, response: Response = RESPONSE) -> dict[str, Outcome]:
    """The outcomes of objectives that share one source."""
    (source,) = group_by_source(map(parse_objective, texts))
    outcomes = asyncio.run(attempt(source, source.load(patient=False)(response)))
    return dict(zip((objective.name for objective in source.objectives), outcomes))


# ---- conditions


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("datasource:math", True),
        ("datasource:chat|math", True),
        ("datasource:chat", False),
        ("datasource:mat", False),
        ("level:3", True),
        ("risky:true", True),
        ("risky:True", False),
        ("note:a:b", True),  # only the first colon separates
    ],
)
def test_a_condition_compares_a_column_as_text(text, holds) -> None:
    objective = parse_objective(f"x=builtin:length,when={text}")
    assert objective.applies_to({"datasource": "math", "level": 3, "risky": True, "note": "a:b"}) == holds


@pytest.mark.parametrize("text", ["math", "datasource:", ":math", "datasource:math|", ""])
def test_anything_else_is_refused(text) -> None:
    with pytest.raises(ConfigError, match=r"when: must be COLUMN:VALUE or COLUMN:VALUE\|VALUE.*found"):
        parse_objective(f"x=builtin:length,when={text}")


@pytest.mark.parametrize("when", [{"a": "x", "b": "y"}, {}, 3, True, ["a:b"], {"a": []}])
def test_so_it_is_in_a_file(when) -> None:
    with pytest.raises(ConfigError, match=r"when: must be COLUMN:VALUE"):
        make_objective("x", {"kind": "builtin", "location": "length", "when": when}, "pama.yaml")


def test_a_file_may_have_values_that_a_flag_could_not_and_keeps_them(tmp_path) -> None:
    file = tmp_path / "pama.yaml"
    file.write_text("objectives:\n  x: {kind: builtin, location: length, when: {task: ['a|b', true, 3]}}\n")
    config = config_of(file=str(file))
    assert config.objectives[0].when.values == ("a|b", "true", "3") and config.columns == ("task",)
    file.write_text(dump_config(config))
    assert load_config(None, [], str(file), None, None, default_level="token") == config


def test_which_prompts_it_applies_to_is_part_of_what_an_objective_is() -> None:
    texts = ("x=builtin:length", "x=builtin:length,when=task:a", "x=builtin:length,when=task:b")
    assert len({parse_objective(text).identity() for text in texts}) == 3


@pytest.mark.parametrize("location", ["rm:org/model", "hf:org/model", "builtin:length"])
def test_what_scores_every_response_cannot_abstain(location) -> None:
    with pytest.raises(ConfigError, match=r"abstain needs a kind.*py, http, judge or agent.*when= leaves out"):
        parse_objective(f"x={location},abstain=true")


# ---- columns


@pytest.mark.parametrize("listed", ["answer|level", "answer,level", "answer,level,timeout=3"])
def test_columns_are_separated_by_bars_or_commas(listed, grade) -> None:
    objective = parse_objective(f"x={grade.partition(',')[0]},when=task:a,columns={listed}")
    assert objective.settings.columns == ("answer", "level") and objective.columns == ("task", "answer", "level")


@pytest.mark.parametrize(
    ("signature", "columns", "problem"),
    [
        ("queries, prompts, labels", "answer", r"must be def f\(queries, prompts, labels, answer\), found"),
        ("queries, prompts, labels, other", "answer", r"labels, answer\), found .*other.*columns= passes columns"),
        ("queries, prompts, labels, answer, *, level", "answer", "columns= passes columns"),
        ("queries, prompts, labels, answer", "answer", None),
        ("queries, prompts, labels, answer=None", "answer", None),
        ("queries, prompts, labels, *, answer", "answer", None),
        ("queries, prompts, labels, **kwargs", "answer|level", None),
    ],
)
def test_a_function_must_take_its_columns(signature, columns, problem, tmp_path) -> None:
    (tmp_path / "f.py").write_text(f"def f({signature}):\n    return [0.0]\n")
    objective = parse_objective(f"x=py:{tmp_path}/f.py:f,columns={columns}") if problem is None else None
    if objective is None:
        with pytest.raises(ConfigError, match=problem):
            parse_objective(f"x=py:{tmp_path}/f.py:f,columns={columns}")


@pytest.mark.parametrize("isolate", ["true", "false"])
def test_a_coroutine_function_is_awaited_with_its_columns(isolate, tmp_path) -> None:
    code = (
        "import asyncio\nlock = None\n\n\nasync def f(queries, prompts, labels, level):\n"
        "    global lock\n    lock = lock or asyncio.Lock()\n"  # belongs to the event loop of the first call
        "    async with lock:\n        await asyncio.sleep(0.01)\n"
        "    if level == [0]:\n        raise ValueError('no level')\n    return [float(level[0])]\n"
    )
    (tmp_path / "f.py").write_text(code)
    (source,) = group_by_source([parse_objective(f"x=py:{tmp_path}/f.py:f,columns=level,isolate={isolate}")])
    score = source.load(patient=False)

    async def ask_all() -> list[list[Outcome]]:
        responses = [RESPONSE._replace(columns={"level": level}) for level in (3, 5, 0)]
        return await asyncio.gather(*(attempt(source, score(response)) for response in responses))

    (three,), (five,), (failed,) = asyncio.run(ask_all())
    assert (three.reward, five.reward) == (3, 5)
    assert failed.problem == f"ValueError: no level ({tmp_path}/f.py, line 11)"


def test_columns_are_sent_to_a_server() -> None:
    with FaultServer() as server:
        outcome = ask(f"x=http:{server.url},columns=answer|level")["x"]
        assert outcome == Outcome(0.8)
        assert server.bodies == [
            {"query": ["2 + 2? 4"], "prompts": ["2 + 2?"], "labels": ["4"], "answer": ["4"], "level": [3]}
        ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("http:http://localhost/,columns=prompts", "query, prompts, labels, found prompts"),
        ("py:{f},columns=labels", "queries, prompts, labels, found labels"),
        ("py:{f},columns=p", "q, p, l, found p"),
        ("judge:http://localhost/v1,model=m,rubric=r.txt,columns=response", "prompt, response, label, found response"),
    ],
)
def test_a_column_cannot_take_the_place_of_what_every_reward_receives(text, found, tmp_path) -> None:
    (tmp_path / "f.py").write_text("def f(q, p, l, **kwargs):\n    return [0.0]\n")
    with pytest.raises(ConfigError, match=f"columns must not have the names of {found}"):
        parse_objective("x=" + text.format(f=f"{tmp_path}/f.py:f"))


def test_what_an_async_function_raises_concerns_its_own_call_alone(tmp_path) -> None:
    code = (
        "async def f(queries, prompts, labels):\n    if labels == ['x']:\n        raise SystemExit(3)\n    return 1.0\n"
    )
    (tmp_path / "f.py").write_text(code)
    (source,) = group_by_source([parse_objective(f"x=py:{tmp_path}/f.py:f,isolate=false,timeout=9")])
    score = source.load(patient=False)

    async def ask_all() -> list[list[Outcome]]:
        return [await attempt(source, score(RESPONSE._replace(label=label))) for label in ("x", "y")]

    (exited,), (fine,) = asyncio.run(ask_all())
    assert exited.problem.startswith("SystemExit: 3") and fine == Outcome(1.0)


# ---- None


@pytest.mark.parametrize("result", ["None", "[None]", "{'rewards': None}", "{'rewards': [None]}"])
@pytest.mark.parametrize("isolate", ["true", "false"])
def test_none_does_not_apply_where_the_objective_says_so(result, isolate, tmp_path) -> None:
    (tmp_path / "f.py").write_text(f"def f(queries, prompts, labels):\n    return {result}\n")
    location = f"py:{tmp_path}/f.py:f,isolate={isolate}"
    abstained = ask(f"x={location},abstain=true")["x"]
    assert math.isnan(abstained.reward) and abstained.problem is None
    assert "returned None (abstain=true takes it as" in ask(f"x={location}")["x"].problem
    assert code_of(abstained) < 0 and code_of(NOT_ASKED) < 0 and code_of(abstained) != code_of(NOT_ASKED)


def test_none_of_a_function_with_keys_is_none_of_each(tmp_path) -> None:
    (tmp_path / "f.py").write_text("def f(queries, prompts, labels):\n    return None\n")
    texts = [f"{name}=py:{tmp_path}/f.py:f,isolate=false,key={name},abstain=true" for name in "ab"]
    assert [outcome.problem for outcome in ask(*texts).values()] == [None, None]


def test_null_does_not_apply_where_the_objective_says_so() -> None:
    with FaultServer("null") as server:
        assert ask(f"x=http:{server.url},abstain=true")["x"].problem is None
        assert "abstain=true" in ask(f"x=http:{server.url}")["x"].problem


# ---- one call for several objectives


def test_objectives_of_one_function_share_a_call(grade) -> None:
    found = ask(*(f"{name}={grade},key={name}" for name in ("correct", "calls", "none", "note")), f"default={grade}")
    assert found["correct"] == Outcome(1.0) and found["calls"] == Outcome(1.0) and found["default"] == Outcome(0.5)
    listed = "'correct', 'calls', 'style', 'note', 'rewards'"
    assert found["none"].problem == f"must return a dict with 'none', found the keys {listed}"
    assert found["note"].problem == "returned 'text', which is not a number"


def test_one_of_them_may_abstain(grade) -> None:
    found = ask(f"style={grade},key=style,abstain=true", f"again={grade},key=style", f"correct={grade},key=correct")
    assert found["style"].problem is None and "abstain=true" in found["again"].problem
    assert found["correct"] == Outcome(1.0)


def test_a_failed_call_is_the_failure_of_each(grade) -> None:
    found = ask(f"a={grade},key=correct", f"b={grade}", response=RESPONSE._replace(columns={"answer": 7}))
    assert found["a"].problem == found["b"].problem and found["a"].problem.startswith("TypeError: ")


def test_a_key_alone_picks_too(grade) -> None:
    assert ask(f"a={grade},key=correct") == {"a": Outcome(1.0)}
    problem = ask(f"a={grade},key=no")["a"].problem
    assert problem.startswith("must return a dict with 'no', found the keys 'correct'")


def test_objectives_of_one_server_share_a_request() -> None:
    document = {"helpful": [0.25], "safe": 1, "style": None, "rewards": [0.5], "text": "high"}
    with FaultServer(answer=lambda _: document) as server:
        names = ("helpful", "safe", "missing", "text")
        texts = [f"{name}=http:{server.url},key={name}" for name in names]
        found = ask(*texts, f"default=http:{server.url}", f"style=http:{server.url},key=style,abstain=true")
        assert server.requests == 1
    rewards = [found[name].reward for name in ("helpful", "safe", "default")]
    assert rewards == [0.25, 1.0, 0.5] and found["style"].problem is None
    listed = "found the keys helpful, safe, style, rewards, text"
    assert f"/get_reward: missing must be one finite number, {listed}, found '{{" in found["missing"].problem
    assert "/get_reward: text must be one finite number, found '{" in found["text"].problem


def test_a_secret_that_a_server_repeats_is_not_shown(monkeypatch) -> None:
    monkeypatch.setenv("TOKEN", "s3cret")
    with FaultServer(answer=lambda _: {"s3cret": 1, "a": "s3cret"}) as server:
        url = f"http:{server.url},token_env=TOKEN"
        problems = [outcome.problem for outcome in ask(f"x={url},key=x", f"a={url},key=a").values()]
        problems += [outcome.problem for outcome in ask(f"x={url},key=x").values()]
    assert len(problems) == 3 and all("s3cret" not in problem for problem in problems)
    assert "found the keys ***, a" in problems[0]


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("http:http://localhost/a,key=x", "http:http://localhost/a,key=y,timeout=3", "timeout must be the same.*3.0"),
        ("hf:org/m,label=a,text=full", "hf:org/m,label=b,text=pair", "text must be the same for both, found 'full'"),
        ("hf:org/m,label=a", "hf:org/m,label=b,output=log_odds", "of the options of the kind only label= may differ"),
    ],
)
def test_two_objectives_of_one_location_have_the_same_options(one, other, message) -> None:
    for load in (config_of, lambda *texts: load_objectives(texts, None)):
        with pytest.raises(ConfigError, match=f"'a' and 'b' share .*{message}"):
            load(f"a={one}", f"b={other}")


def test_options_of_every_kind_may_differ_and_what_is_not_shared_stays_apart() -> None:
    config = config_of(
        "a=hf:org/m,label=x,weight=2",
        "b=builtin:length,scale=2",
        "c=hf:org/m,label=y,when=task:t,on_failure=mask",
        "d=builtin:length,scale=3",
        "e=hf:org/other,label=0",
    )
    shared = [[objective.name for objective in source.objectives] for source in config.sources()]
    assert shared == [["a", "c"], ["b"], ["d"], ["e"]]
    assert config.sources("replicas")[0].picked == ("x", "y") and config.sources("replicas")[0].patient


def test_the_files_of_options_are_found_from_anywhere(tmp_path, monkeypatch) -> None:
    (tmp_path / "rubric.txt").write_text("Rate {response}")
    monkeypatch.chdir(tmp_path)
    objective = parse_objective("x=judge:http://localhost/v1,model=m,rubric=rubric.txt")
    assert objective.files() == [tmp_path / "rubric.txt"] and Path(objective.settings.rubric).is_absolute()
    before = objective.identity()
    (tmp_path / "rubric.txt").write_text("Rate it: {response}")
    assert objective.identity() != before


def test_a_kind_that_picks_has_a_model() -> None:
    with pytest.raises(ValueError, match="picks must be one of the options, which need a model"):
        RewardKind(summary="", scored_in="rollout", options=("key",), picks="key")


def test_the_order_of_objectives_changes_no_name() -> None:
    texts = ["b=hf:org/m,label=1", "a=hf:org/m,label=2"]
    names = [config_of(*order).sources()[0].name for order in (texts, texts[::-1])]
    assert names == ["a", "a"], "a resumed run takes the order of the checkpoint, after its plan was made"

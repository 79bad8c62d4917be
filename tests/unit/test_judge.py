"""The kind judge: what it asks, and how it reads the answers."""

import asyncio
import json
import math
import re

import pytest
import tenacity
from faultserver import FaultServer, judgement

from pama_plugin.batch.outcome import Outcome, attempt
from pama_plugin.errors import ConfigError
from pama_plugin.rewards import Response
from pama_plugin.rewards import server as client
from pama_plugin.settings.objective import parse_objective
from pama_plugin.settings.source import group_by_source

RUBRIC = 'Question: {prompt}\nAnswer: {response}\nRight: {label}\nReply {{"tone": 3}}.'
RESPONSE = Response("q", "2 + {2}?", "4", " It is {4}", 2, {"level": 3})


@pytest.fixture
def rubric(tmp_path) -> str:
    (tmp_path / "rubric.txt").write_text(RUBRIC)
    return f"model=m,rubric={tmp_path}/rubric.txt"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch) -> None:
    monkeypatch.setattr(client, "BACKOFF", tenacity.wait_none())


def ask(server: FaultServer, *options: str) -> list[Outcome]:
    url = f"http://127.0.0.1:{server.port}/v1"
    texts = [f"o{index}=judge:{url},{option}" for index, option in enumerate(options)]
    (source,) = group_by_source(map(parse_objective, texts))
    return asyncio.run(attempt(source, source.load(patient=False)(RESPONSE)))


def answering(content: str, **choice: object) -> FaultServer:
    return FaultServer(answer=lambda _: judgement(content, **choice))


def test_the_rubric_is_sent_as_one_message_and_sampling_is_the_servers(rubric) -> None:
    with answering('{"tone": 4}') as server:
        assert ask(server, f"{rubric},key=tone") == [Outcome(4.0)]
        text = 'Question: 2 + {2}?\nAnswer:  It is {4}\nRight: 4\nReply {"tone": 3}.'
        assert server.bodies == [{"model": "m", "messages": [{"role": "user", "content": text}]}]
        assert server.paths == ["/v1/chat/completions"]


def test_json_may_be_in_a_fenced_block(rubric) -> None:
    with answering('Sure!\n```json\n{"tone": 4}\n```\nAnything else?') as server:
        assert ask(server, f"{rubric},key=tone") == [Outcome(4.0)]


def test_two_rubrics_or_models_on_one_server_are_two_judges(rubric, tmp_path) -> None:
    (tmp_path / "other.txt").write_text("{response}")
    url = "judge:http://localhost/v1"
    texts = [f"a={url},{rubric},key=x", f"b={url},{rubric},key=y", f"c={url},model=m,rubric={tmp_path}/other.txt"]
    shared = [len(source.objectives) for source in group_by_source(map(parse_objective, texts))]
    assert shared == [2, 1]
    with pytest.raises(ValueError, match="temperature must be the same for both"):
        group_by_source(map(parse_objective, [texts[0], f"{texts[1]},temperature=0"]))


def test_sampling_and_schema_are_passed_on(rubric, tmp_path) -> None:
    schema = {"type": "object", "properties": {"tone": {"type": "integer"}}, "required": ["tone"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    with answering('{"tone": 4}') as server:
        options = f"{rubric},temperature=0,max_tokens=64,json_schema={tmp_path}/schema.json"
        assert ask(server, options) == [Outcome(4.0)], "an object of one key needs no key="
        (body,) = server.bodies
    assert (body["temperature"], body["max_tokens"]) == (0, 64)
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "rating", "schema": schema, "strict": True},
    }


def test_columns_are_in_the_rubric(tmp_path) -> None:
    (tmp_path / "rubric.txt").write_text("{response} at {level}")
    with answering("5") as server:
        ask(server, f"model=m,rubric={tmp_path}/rubric.txt,columns=level,pattern=(5)")
        assert server.bodies[0]["messages"][0]["content"] == " It is {4} at 3"


def test_several_keys_of_one_answer_cost_one_request(rubric) -> None:
    with answering('{"tone": 4, "facts": 2.5, "style": null, "note": "good"}') as server:
        names = ("tone", "facts", "style", "note", "missing")
        found = ask(server, *(f"{rubric},key={name},abstain=true" for name in names))
        assert server.requests == 1
    assert [outcome.reward for outcome in found[:2]] == [4, 2.5]
    assert math.isnan(found[2].reward) and found[2].problem is None
    quoted = """/v1/chat/completions: the answer '{"tone": 4, "facts": 2.5, "style": null, "note": "good"}': """
    assert f"{quoted}note must be one finite number" in found[3].problem
    assert f"{quoted}missing must be one finite number, found the keys tone, facts, style, note" in found[4].problem


@pytest.mark.parametrize(
    ("pattern", "key", "answer", "reward"),
    [
        (r"Rating: (\d)", "", "It has 3 parts. Rating: 2? No. Rating: 4", 4),
        (r"(-?[\d.]+)\s*$", "", "I would say -1.5 \n", -1.5),
        (r"tone (?P<tone>\d) facts (?P<facts>\d)", "facts", "tone 3 facts 5", 5),
    ],
)
def test_a_pattern_finds_the_last_rating(pattern, key, answer, reward, rubric) -> None:
    with answering(answer) as server:
        assert ask(server, f"{rubric},pattern={pattern}" + (f",key={key}" if key else "")) == [Outcome(reward)]


@pytest.mark.parametrize(
    ("answer", "options", "problem"),
    [
        ("I cannot rate this.", "key=tone", "the answer 'I cannot rate this.': must be a JSON object (attempts: 1)"),
        ("[4]", "key=tone", "must be a JSON object"),
        ('{"tone": "high"}', "key=tone", "tone must be one finite number"),
        ('{"tone": NaN}', "key=tone", "tone must be one finite number"),
        ('{"tone": true}', "key=tone", "tone must be one finite number"),
        ('{"tone": 1, "tone": 5}', "key=tone", "the keys of an object must differ"),
        ('{"a": 1, "b": 2}', "temperature=0", "key= must pick one of its keys, found a, b"),
        ("{}", "temperature=0", "key= must pick one of its keys, found none"),
        ("no number", r"pattern=Rating: (\d)", r"must match Rating: (\d)"),
        ("Rating: x", r"pattern=Rating: (\w)", "rating must be one finite number"),
        ("a" * 90 + "b", r"pattern=((?:a|aa)+)$", "took longer than 1 s"),
    ],
)
def test_an_answer_without_the_number_is_a_failure_that_quotes_it(answer, options, problem, rubric) -> None:
    with answering(answer) as server:
        (outcome,) = ask(server, f"{rubric},{options}")
        assert server.requests == 1, "the model would answer the same again, or cost as much again"
    assert "/v1/chat/completions: the answer " in outcome.problem and problem in outcome.problem


def test_an_answer_that_was_cut_off_says_so(rubric) -> None:
    with answering("Let me think", finish_reason="length") as server:
        assert "'Let me think' (it was cut off: max_tokens)" in ask(server, f"{rubric},key=tone")[0].problem


@pytest.mark.parametrize(
    "reply", [{}, [], {"choices": []}, {"choices": [{"message": {}}]}, {"error": {"message": "no such model"}}]
)
def test_a_reply_that_is_no_completion_is_a_failure(reply, rubric) -> None:
    with FaultServer(answer=lambda _: reply) as server:
        assert "must have one choice with a message" in ask(server, f"{rubric},key=tone")[0].problem


def test_a_message_without_text_is_a_failure(rubric) -> None:
    with answering(None) as server:
        assert "must have a text as its content" in ask(server, f"{rubric},key=tone")[0].problem


def test_failures_and_tokens_are_those_of_http(rubric, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    with FaultServer("flaky", count=2, answer=lambda _: judgement('{"tone": 4}')) as server:
        (outcome,) = ask(server, f"{rubric},key=tone,token_env=JUDGE_TOKEN")
        assert server.authorization == "Bearer s3cret" and server.requests == 3
    assert outcome == Outcome(4.0)
    with FaultServer("404") as server:
        assert "HTTP 404" in ask(server, f"{rubric},key=tone")[0].problem


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("Rate it.", "", r"rubric .* must contain \{response\}, found none"),
        ("{response} {lable}", "", r"must contain only label, prompt, response, found lable: columns="),
        ('{response} {"tone": 3}', "", "must double braces that are no names"),
        ("{response} {", "", "must double braces that are no names: .*'{'"),
        ("{response:>3}", "", "must double braces"),
        ("{response}", "pattern=(", "pattern must be a regular expression"),
        ("{response}", r"pattern=\d", r"pattern must have one group"),
        ("{response}", r"pattern=(\d),key=tone", r"pattern must have the group \(\?P<tone>"),
        ("{response}", "json_schema=none.json", "json_schema must be a text file, found .*none.json"),
        ("{response}", "json_schema=rubric.txt", "json_schema must be a file with a JSON schema"),
        ("{response}", "temperature=-1", "temperature"),
        ("{response}", "rubric=", "rubric"),
    ],
)
def test_what_cannot_work_is_refused_before_a_run(text, options, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rubric.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        rubric = "" if options.startswith("rubric") else "rubric=rubric.txt,"
        parse_objective(f"x=judge:http://localhost/v1,model=m,{rubric}{options}".rstrip(","))


@pytest.mark.parametrize("missing", ["model", "rubric"])
def test_model_and_rubric_are_required(missing, rubric) -> None:
    given = ",".join(option for option in rubric.split(",") if not option.startswith(missing))
    with pytest.raises(ConfigError, match=f"{missing}: Field required"):
        parse_objective(f"x=judge:http://localhost/v1,{given}")


def test_a_key_in_the_address_is_not_shown(rubric, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    with FaultServer("500") as server:
        url = f"http://127.0.0.1:{server.port}/v1?key=${{JUDGE_KEY}}"
        (source,) = group_by_source([parse_objective(f"x=judge:{url},{rubric},retries=0")])
        (outcome,) = asyncio.run(attempt(source, source.load(patient=False)(RESPONSE)))
        assert re.fullmatch(r"/v1/chat/completions\?key=s3cret", server.paths[0])
    assert "s3cret" not in outcome.problem
    with answering("Invalid key s3cret") as server:
        url = f"http://127.0.0.1:{server.port}/v1?key=${{JUDGE_KEY}}"
        (source,) = group_by_source([parse_objective(f"x=judge:{url},{rubric}")])
        (outcome,) = asyncio.run(attempt(source, source.load(patient=False)(RESPONSE)))
    assert "the answer 'Invalid key ***'" in outcome.problem and "s3cret" not in outcome.problem

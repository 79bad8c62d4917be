"""Kind ``judge``: a language model behind an OpenAI-compatible server rates each response by the user's rubric.

The rubric, with prompt, response and label in it, is sent as one message to ``LOCATION/chat/completions``. The reward
is read from the answer: a key of its JSON object, or a group of a regular expression. Retries, limits, replicas and the
token are those of ``http``.
"""

import json
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import regex

from pama_plugin.rewards.builtin import fenced_blocks
from pama_plugin.rewards.http import pick
from pama_plugin.rewards.options import JudgeOptions, refuse_columns
from pama_plugin.rewards.response import Response, Scorer
from pama_plugin.rewards.server import Failure, Server, check_servers, unique
from pama_plugin.rewards.urls import keys_of, split_replicas

TEXTS = ("prompt", "response", "label")  # in a rubric, beside columns of the data set
LONGEST_ANSWER = 200  # characters that an error quotes
PATTERN_SECONDS = 1.0  # limit of one search, in which generation waits; some patterns take exponential time


def check_judge(location: str, options: JudgeOptions) -> list[str]:
    """Check servers, rubric, pattern and schema without a request. Returns warnings as ``check_servers`` does.

    Raises:
        ValueError: one of them cannot be used.
    """
    refuse_columns(options.columns, TEXTS)
    fields = set(_fields(options.rubric))
    if "response" not in fields:
        raise ValueError(f"rubric {options.rubric} must contain {{response}}, found {_listed(fields)}")
    known = {*TEXTS, *options.columns}
    if unknown := fields - known:
        raise ValueError(
            f"rubric {options.rubric} must contain only {_listed(known)}, found {_listed(unknown)}: columns= adds "
            "columns of the data set, and doubled braces are braces"
        )
    if options.pattern is not None:
        _check_pattern(options.pattern, options.key)
    if options.json_schema is not None:
        if options.pattern is not None:
            raise ValueError("json_schema makes the answer a JSON object: it has no use with pattern, found both")
        _load_schema(options.json_schema)
    return check_servers(location, options)


def needs_label(options: JudgeOptions) -> bool:
    """Whether the rubric contains the label."""
    return "label" in _fields(options.rubric)


def load_judge(
    location: str, options: JudgeOptions, *, patient: bool = False, keys: Sequence[str | None] | None = None
) -> Scorer:
    """Load a scorer, with the arguments of ``http``; it raises ``ServerFailure`` for a response without a reward."""
    rubric, wanted = _read(options.rubric, "rubric"), keys or (options.key,)
    asked: dict[str, Any] = {"model": options.model}
    asked |= {} if options.temperature is None else {"temperature": options.temperature}
    asked |= {} if options.max_tokens is None else {"max_tokens": options.max_tokens}
    if options.json_schema is not None:
        schema = {"name": "rating", "schema": _load_schema(options.json_schema), "strict": True}
        asked["response_format"] = {"type": "json_schema", "json_schema": schema}
    urls = [_completions(url) for url in split_replicas(location)]
    server = Server(urls, options, keys_of(location), patient=patient)

    async def score(response: Response) -> Any:
        texts = {"prompt": response.prompt, "response": response.response, "label": response.label}
        texts |= {column: response.columns[column] for column in options.columns}
        message = {"role": "user", "content": rubric.format(**texts)}
        request = asked | {"messages": [message]}
        return await server.ask(request, lambda reply: _rating(reply, options.pattern, wanted), quote=False)

    return score


def _rating(reply: Any, pattern: str | None, keys: Sequence[str | None]) -> list[Any]:
    """The numbers in the answer, or texts that say why they are missing."""
    try:
        (choice,) = reply["choices"]
        answer = choice["message"]["content"]
    except (TypeError, KeyError, ValueError):
        found = json.dumps(reply)[:LONGEST_ANSWER]
        return [f"the reply must have one choice with a message, as OpenAI's API has it, found {found!r}"] * len(keys)
    if not isinstance(answer, str):
        return ["the message must have a text as its content"] * len(keys)
    try:
        document = _parse(answer, pattern)
    except Failure as failure:
        ratings: list[Any] = [str(failure)] * len(keys)
    else:
        ratings = [_pick(document, key) for key in keys]
    hint = " (it was cut off: max_tokens)" if choice.get("finish_reason") == "length" else ""
    return [
        f"the answer {answer[-LONGEST_ANSWER:]!r}{hint}: {rating}" if isinstance(rating, str) else rating
        for rating in ratings
    ]


def _parse(answer: str, pattern: str | None) -> dict[str, Any]:
    """Key → number in the answer.

    >>> _parse('{"safe": 4}', None), _parse("Safe? 3/5. Rating: 4", r"Rating: (?P<safe>\\d)")
    ({'safe': 4.0}, {'safe': 4.0})
    """
    if pattern is None:
        blocks = [block for _, block in fenced_blocks(answer)]  # in which many chat models put JSON
        try:
            document = json.loads(blocks[-1] if blocks else answer, parse_int=float, object_pairs_hook=unique)
        except (ValueError, RecursionError):
            raise Failure("must be a JSON object") from None
        if not isinstance(document, dict):
            raise Failure("must be a JSON object")
        return document
    try:
        matches = [*regex.finditer(pattern, answer, timeout=PATTERN_SECONDS)]
    except TimeoutError:
        raise Failure(f"the search for {pattern} took longer than {PATTERN_SECONDS:g} s") from None
    if not matches:
        raise Failure(f"must match {pattern}")
    last = matches[-1]  # reasons come before the rating
    return {key: _float(text) for key, text in (last.groupdict() or {"rating": last[1]}).items()}


def _pick(document: Mapping[str, Any], key: str | None) -> Any:
    if key is None and len(document) != 1:
        return f"key= must pick one of its keys, found {', '.join(document) or 'none'}"
    return pick(document, [key or next(iter(document))])[0]


def _float(text: str | None) -> float | str | None:
    """The number, or the text, which ``pick`` refuses."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _completions(url: str) -> str:
    """The address of the API's method, before the query.

    >>> _completions("http://judge:8000/v1")
    'http://judge:8000/v1/chat/completions'
    """
    address, mark, query = url.partition("?")
    return f"{address.rstrip('/')}/chat/completions{mark}{query}"


def _read(file: str, option: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} must be a text file, found {file}: {error}") from error


def _load_schema(file: str) -> Mapping[str, Any]:
    try:
        schema = json.loads(_read(file, "json_schema"))
    except json.JSONDecodeError as error:
        raise ValueError(f"json_schema must be a file with a JSON schema, found {file}: {error}") from error
    if not isinstance(schema, dict):
        raise ValueError(f"json_schema must be a file with a JSON object, found {file}")
    return schema


def _fields(file: str) -> Iterator[str]:
    """The names in the braces of a rubric."""
    text = _read(file, "rubric")
    try:
        parts = [*string.Formatter().parse(text)]
    except ValueError as error:  # a brace alone
        raise ValueError(f"rubric {file} must double braces that are no names: {error}") from error
    for _, name, form, conversion in parts:
        if name is not None:
            if not name.isidentifier() or form or conversion:
                raise ValueError(f"rubric {file} must double braces that are no names, found {{{name}}}")
            yield name


def _check_pattern(pattern: str, key: str | None) -> None:
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern must be a regular expression, found {pattern!r}: {error}") from error
    if key is not None and key not in compiled.groupindex:
        raise ValueError(
            f"pattern must have the group (?P<{key}>…) for key={key}, found {_listed(compiled.groupindex)}"
        )
    if key is None and (compiled.groups != 1 or compiled.groupindex):
        raise ValueError(f"pattern must have one group, which matches the number, found {compiled.groups}")


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"

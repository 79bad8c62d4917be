"""``pama score``: score the prompts and responses of a file with the objectives of a run, without training.

The module contains, in this order: the command; ``score_rows`` and ``check_columns``, which ``pama stationarity`` calls
too; reading the rows and writing them with their rewards; making a ``Response`` of a row, as in a rollout; scoring, by
where a kind is scored; and the table.
"""

import argparse
import asyncio
import contextlib
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from pama_plugin.batch.outcome import NOT_ASKED, Outcome, attempt, check_results
from pama_plugin.errors import ConfigError, PamaError, printable, problem_of
from pama_plugin.rewards import Conversation, Response
from pama_plugin.settings.condition import column_of, text_of
from pama_plugin.settings.load import load_objectives
from pama_plugin.settings.names import DATASOURCE
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.source import Source, group_by_source

SHOWN = 3  # problems of an objective that are printed
AT_ONCE = 64  # responses that an objective of the rollout scores in parallel

Row = dict[str, Any]


class _Uncounted(Response):
    """A response without a tokenizer to count its tokens."""

    @property
    def num_tokens(self) -> int:
        raise PamaError("--tokenizer MODEL (the policy) is required to count tokens, found none")


def score_file(options: argparse.Namespace) -> int:
    """Score every line, write the lines with their rewards and print a table.

    Returns:
        The exit code: 1 if an objective scored no response, else 0.

    Raises:
        ConfigError: the file or a line cannot be read, or an objective cannot be scored without a run.
    """

    flags = vars(options)
    objectives = load_objectives(flags["pama.objective"], flags["pama.config"])
    _refuse_agents(objectives)
    out = options.out or options.file.with_suffix(".scored.jsonl")
    if not out.parent.is_dir() or out.is_dir() or out.resolve() == options.file.resolve():
        raise ConfigError(f"--out must be a file other than {options.file}, in an existing folder, found {out}")
    numbered = load_rows(options.file)
    rows = list(numbered.values())
    tokenizer = _load_tokenizer(options.tokenizer, objectives)
    check_columns(objectives, rows, str(options.file))
    needed = {name for objective in objectives for name in objective.columns}
    responses = [_as_response(row, tokenizer, needed, f"{options.file}, line {line}") for line, row in numbered.items()]
    partial = out.with_name(f"{out.name}.partial")
    _reserve(partial, rows, [objective.name for objective in objectives])
    results: dict[str, list[Outcome]] = {}
    seconds: dict[str, float] = {}
    for source in group_by_source(objectives):
        start = time.perf_counter()
        results |= _score_with_progress(source, rows, responses, tokenizer)
        seconds |= dict.fromkeys((objective.name for objective in source.objectives), time.perf_counter() - start)
        _write(partial, rows, results)
    with partial.open("r+b") as file:
        file.truncate(len(file.read().rstrip()) + 1)
    partial.replace(out)
    _print_table({objective.name: results[objective.name] for objective in objectives}, seconds)
    print(f"rewards  {out}")
    return int(any(all(math.isnan(outcome.reward) for outcome in outcomes) for outcomes in results.values()))


def score_rows(objectives: Sequence[Objective], rows: list[Row], tokenizer: Any) -> dict[str, list[Outcome]]:
    """Score rows with a prompt and a response with every objective, with progress. Raises as ``score_file``."""
    _refuse_agents(objectives)
    needed = {name for objective in objectives for name in objective.columns}
    responses = [_as_response(row, tokenizer, needed, f"response {index}") for index, row in enumerate(rows)]
    results: dict[str, list[Outcome]] = {}
    for source in group_by_source(objectives):
        results |= _score_with_progress(source, rows, responses, tokenizer)
    return {objective.name: results[objective.name] for objective in objectives}


def check_columns(objectives: Sequence[Objective], rows: Sequence[Row], where: str) -> None:
    """Refuse rows without a column or label that an objective needs, and conditions that hold for none of them."""
    for objective in objectives:
        for column in (*objective.columns, *(["label"] if objective.needs_label else [])):
            if lacking := [row for row in rows if column not in (*row, DATASOURCE)]:
                raise ConfigError(
                    f"objective {objective.name!r}: every line of {where} must have {column!r}, found one with "
                    f"{', '.join(lacking[0])}"
                )
        if objective.when is not None:
            name = objective.when.column
            objective.when.check({text_of(column_of(row, name)) for row in rows}, objective.name)


def _score_with_progress(
    source: Source, rows: list[Row], responses: list[Response], tokenizer: Any
) -> dict[str, list[Outcome]]:
    """The outcomes of each objective of the source, those of rows to which it does not apply among them."""
    from tqdm import tqdm

    applies = [[objective.applies_to(response.columns) for response in responses] for objective in source.objectives]
    asked = [index for index, flags in enumerate(zip(*applies)) if any(flags)]
    with tqdm(total=len(asked), desc=source.name, unit="response") as bar:
        chosen = [rows[index] for index in asked], [responses[index] for index in asked]
        scored = dict(zip(asked, _score(source, *chosen, tokenizer, bar.update)))
    return {
        objective.name: [
            scored[index][position] if applied else NOT_ASKED for index, applied in enumerate(applies[position])
        ]
        for position, objective in enumerate(source.objectives)
    }


def _refuse_agents(objectives: Sequence[Objective]) -> None:
    if agents := [objective.name for objective in objectives if objective.reward_kind.scored_in == "agent"]:
        raise ConfigError(f"kind agent needs rollouts and cannot be scored here, found objective {agents[0]!r}")


def load_rows(path: Path, *, response: bool = True) -> dict[int, Row]:
    """Line number → row, for lines that are not empty; with ``response=False``, rows need no response."""
    try:
        with path.open(encoding="utf-8") as file:  # splitlines would also split at U+2028 in a text
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    rows = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number} must be JSON: {error}") from error
        whole = isinstance(row, dict) and _is_prompt(row.get("prompt"))
        if not whole or (response and not isinstance(row.get("response"), str)):
            needs = "a prompt (text or messages)" + " and a response (text)" * response
            raise ConfigError(f"{path}, line {number} must have {needs}, found {line[:80]!r}")
        if not isinstance(row.get("rewards", {}), dict):  # those of an earlier call are kept
            raise ConfigError(
                f"{path}, line {number}: rewards must map names to rewards, which are added, found {row['rewards']!r}"
            )
        rows[number] = row
    if not rows:
        raise ConfigError(f"{path} must have at least one line, found none")
    return rows


def _reserve(partial: Path, rows: list[Row], names: list[str]) -> None:
    """Write a file as large as the result can become: a disk that is too small is found before anything is scored."""
    longest = dict.fromkeys(names, Outcome(-sys.float_info.max))
    try:
        partial.touch()
        _write(partial, rows, {name: [outcome] * len(rows) for name, outcome in longest.items()})
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ConfigError(f"--out must be a file that can be written, found {partial}: {error.strerror}") from error


def _write(partial: Path, rows: list[Row], results: dict[str, list[Outcome]]) -> None:
    """Write the rewards so far in place, within the space that ``_reserve`` took; blanks keep the rest of it."""
    with partial.open("r+", encoding="ascii") as file:
        size = file.seek(0, 2)
        file.seek(0)
        for index, row in enumerate(rows):
            outcomes = {name: outcomes[index] for name, outcomes in results.items()}
            rewards = {n: None if math.isnan(outcome.reward) else outcome.reward for n, outcome in outcomes.items()}
            file.write(json.dumps(row | {"rewards": row.get("rewards", {}) | rewards}) + "\n")
        file.write(" " * (size - file.tell()))


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, list) and prompt:
        return all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in prompt)
    return isinstance(prompt, str)


def _load_tokenizer(location: str | None, objectives: tuple[Objective, ...]) -> Any:
    models = [objective.location for objective in objectives if objective.reward_kind.scored_in == "ranks"]
    location = location or (models[0] if models else None)
    if location is None:
        for objective in objectives:
            is_length = (objective.kind, objective.location) == ("builtin", "length")
            if is_length and objective.options.get("unit", "tokens") == "tokens":
                raise ConfigError(
                    f"--tokenizer MODEL (the policy) is required to count tokens for {objective.name!r}, found none; "
                    "unit=words and unit=characters need no tokenizer"
                )
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location)
    except Exception as error:  # transformers raises many types
        raise ConfigError(f"--tokenizer: cannot load the tokenizer of {location}: {_first_line(error)}") from error


def _as_response(row: Row, tokenizer: Any, columns: Collection[str], where: str) -> Response:
    """Build a ``Response`` as in a rollout: messages are formatted with the chat template of the tokenizer."""
    prompt, text = row["prompt"], row["response"]
    if not isinstance(prompt, str):
        prompt = _format(prompt, tokenizer, where)
    end = tokenizer.eos_token or "" if tokenizer else ""
    fields: dict[str, Any] = {"columns": {name: column_of(row, name) for name in columns}}
    fields |= {"query": prompt + text + end, "prompt": prompt, "label": row.get("label", ""), "response": text}
    if tokenizer is None:
        return _Uncounted(**fields, num_tokens=0)
    try:
        return Response(**fields, num_tokens=len(tokenizer(text + end, add_special_tokens=False)["input_ids"]))
    except (TypeError, UnicodeError) as error:  # half of a surrogate pair, which JSON can write
        raise ConfigError(f"{where}: the tokenizer cannot read {text[:80]!r}: {_first_line(error)}") from error


def _format(messages: list[Row], tokenizer: Any, where: str) -> str:
    if tokenizer is not None and tokenizer.chat_template:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # of the template, such as one without a system role
            raise ConfigError(f"{where}: the tokenizer's chat template refuses it: {_first_line(error)}") from error
    contents = [message["content"] for message in messages]
    if not all(isinstance(content, str) for content in contents):
        raise ConfigError(
            f"{where}: without a chat template (--tokenizer) every content must be text, found {contents!r}"
        )
    return "\n".join(contents)


def _score(
    source: Source, rows: list[Row], responses: list[Response], tokenizer: Any, advance: Callable[[int], Any]
) -> list[list[Outcome]]:
    """For each row, the outcome of each objective."""
    first = source.objectives[0]
    if not rows:
        return []
    if first.reward_kind.scored_in == "replicas":
        return _score_texts(source, rows, advance)
    if first.reward_kind.scored_in == "ranks":
        from pama_plugin.host.reward_model import score_responses

        return _check_each(source, score_responses(first, responses, tokenizer, advance))
    return asyncio.run(_score_in_turn(source, responses, advance))


def _score_texts(source: Source, rows: list[Row], advance: Callable[[int], Any]) -> list[list[Outcome]]:
    import torch

    options = source.objectives[0].settings
    device = "cuda" if torch.cuda.is_available() and options.gpus else "cpu"
    try:
        model = source.load(device)
    except Exception as error:  # unknown label or model, damaged file
        raise ConfigError(f"objective {source.name!r}: {_first_line(error)}") from error
    outcomes = []
    for start in range(0, len(rows), options.batch_size):
        part = rows[start : start + options.batch_size]
        prompts = [row["prompt"] for row in part]
        messages = [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in prompts]
        conversations = [Conversation(prompt, row["response"]) for prompt, row in zip(messages, part)]
        outcomes += _check_each(source, model.score_each(conversations))
        advance(len(part))
    return outcomes


def _check_each(source: Source, results: list[Any]) -> list[list[Outcome]]:
    """Check the rewards of a model, some of which may be reasons why there are none."""
    return [
        [Outcome(math.nan, printable(result))] * len(source.objectives)
        if isinstance(result, str)
        else check_results(source, result)
        for result in results
    ]


async def _score_in_turn(
    source: Source, responses: list[Response], advance: Callable[[int], Any]
) -> list[list[Outcome]]:
    try:
        scorer = source.load(patient=False)  # a failure does not end a run here
    except Exception as error:  # user code may raise any exception
        raise ConfigError(f"objective {source.name!r} cannot be loaded: {problem_of(error)}") from error
    slots = asyncio.Semaphore(AT_ONCE)

    async def score(response: Response) -> list[Outcome]:
        async with slots:
            outcomes = await attempt(source, scorer(response))
            advance(1)
            return outcomes

    return list(await asyncio.gather(*map(score, responses)))


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().partition("\n")[0]) or type(error).__name__


def _print_table(results: dict[str, list[Outcome]], seconds: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    partial = any(
        outcome.problem is None and math.isnan(outcome.reward) for each in results.values() for outcome in each
    )
    headings = ("mean", "std", "min", "max", *(["applies to"] if partial else []), "no reward", "seconds")
    table = Table(Column("objective", overflow="fold"), *headings, padding=(0, 0))
    for name, outcomes in results.items():
        rewards = [outcome.reward for outcome in outcomes if not math.isnan(outcome.reward)]
        numbers = [f"{measure(rewards):.4g}" if rewards else "–" for measure in (fmean, pstdev, min, max)]
        failed = sum(outcome.problem is not None for outcome in outcomes)
        applies = [f"{len(rewards) + failed} of {len(outcomes)}"] if partial else []
        table.add_row(name, *numbers, *applies, f"{failed} of {len(rewards) + failed}", f"{seconds[name]:.1f}")
    console = Console(emoji=False)
    console.print(table)
    for name, outcomes in results.items():
        texts = [outcome.problem for outcome in outcomes if outcome.problem is not None]
        problems = Counter(re.sub(r" \(attempts: \d+\)$", "", text) for text in texts)
        for problem, count in problems.most_common(SHOWN):
            console.print(f"{name}: {count} × {problem}", style="yellow", markup=False)
        if len(problems) > SHOWN:
            console.print(f"{name}: {len(problems) - SHOWN} other problems", style="yellow")

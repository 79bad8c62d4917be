"""Kind ``py``: a function in the user's file, with the signature of OpenRLHF's ``reward_func``."""

import ast
import functools
import math
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from pama_plugin.rewards.options import PyOptions, refuse_columns
from pama_plugin.rewards.processes import Processes
from pama_plugin.rewards.response import Response, Scorer
from pama_plugin.rewards.threads import Threads
from pama_plugin.rewards.user_code import load


def split_location(location: str) -> tuple[Path, str]:
    """Split ``FILE.py:FUNCTION`` into the absolute path and the function name.

    Raises:
        ValueError: the location does not have that form.

    >>> split_location("/rewards.py:polite")
    (PosixPath('/rewards.py'), 'polite')
    """
    path, separator, function = location.rpartition(":")
    if not separator or not path.endswith(".py") or not function.isidentifier():
        raise ValueError(f"expected FILE.py:FUNCTION, found {location!r}")
    return Path(path).expanduser().absolute(), function


def absolute_function(location: str) -> str:
    """``FILE.py:FUNCTION`` with the absolute path of the file."""
    path, function = split_location(location)
    return f"{path}:{function}"


def function_files(location: str) -> list[Path]:
    """The file of the function."""
    return [split_location(location)[0]]


def check_function(location: str, options: PyOptions) -> None:
    """Check that the function exists and takes OpenRLHF's arguments. The file is parsed, not run: it may load models.

    Raises:
        ValueError: the file does not exist or is not Python, or the function is missing or has another signature.
    """
    refuse_columns(options.columns, ("queries", "prompts", "labels"))
    path, function = split_location(location)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        module = ast.parse(path.read_bytes(), path.name)  # bytes, for files with a byte-order mark or a coding line
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not valid Python: {error}") from error
    functions, others = _top_level_names(module)
    if function not in functions | others and "*" not in others:
        raise ValueError(f"no function {function!r} in {path}; it defines {', '.join(sorted(functions)) or 'none'}")
    definitions = [node for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in definitions:
        if node.name == function and function not in others and not node.decorator_list:
            _check_signature(node, path, options.columns)


def _check_signature(node: ast.FunctionDef | ast.AsyncFunctionDef, path: Path, columns: Sequence[str]) -> None:
    parameters = node.args
    positional = len(parameters.posonlyargs) + len(parameters.args)
    fits = (math.inf if parameters.vararg else positional) >= 3
    names = [parameter.arg for parameter in (*parameters.posonlyargs, *parameters.args)]
    signature = f"def {node.name}({ast.unparse(parameters)})"
    if wrapper := _adapt(node.name, names):
        raise ValueError(
            f"{path}: must be def {node.name}(queries, prompts, labels), where a query is prompt and response as one "
            f"text, found {signature}; wrap it:\n{wrapper}"
        )
    required = [
        parameter.arg for parameter, default in zip(parameters.kwonlyargs, parameters.kw_defaults) if default is None
    ]
    if positional - len(parameters.defaults) > 3:
        required += names[3 : positional - len(parameters.defaults)]
    takes = {*names[3:], *(parameter.arg for parameter in parameters.kwonlyargs)}
    refuse_columns(columns, names[:3])
    unknown = [] if parameters.kwarg else [column for column in columns if column not in takes]
    if not fits or not set(required) <= set(columns) or unknown:
        wanted = "".join(f", {column}" for column in columns)
        hint = "; columns= passes columns of the data set by name" if set(required) - set(columns) else ""
        raise ValueError(f"{path}: must be def {node.name}(queries, prompts, labels{wanted}), found {signature}{hint}")


def _adapt(name: str, parameters: list[str]) -> str | None:
    """A wrapper for a function whose parameters, by their names, are not OpenRLHF's; None if they may be."""
    head = f"def {name}_of_query(queries, prompts, labels):"
    responses = "[query.removeprefix(prompt) for query, prompt in zip(queries, prompts)]"
    if "solution_str" in parameters:  # verl's compute_score
        pairs = f"zip({responses}, labels)"
        arguments = {"data_source": "None", "solution_str": "response", "ground_truth": "label", "extra_info": "None"}
        given = ", ".join(f"{each}={arguments[each]}" for each in parameters if each in arguments)
        return f"{head}\n    return [{name}({given}) for response, label in {pairs}]"
    of_labels = dict.fromkeys(("answer", "answers", "ground_truth", "solution"), "labels")
    texts = {"completions": responses, "responses": responses, "prompts": "prompts", **of_labels}
    if {"completions", "responses"} & set(parameters):  # as TRL calls it
        given = ", ".join(f"{each}={texts[each]}" for each in parameters if each in texts)
        return f"{head}\n    return {name}({given})"
    places = {"query": 0, "queries": 0, "prompt": 1, "prompts": 1, "label": 2, "labels": 2}
    if any(places.get(each, place) != place for place, each in enumerate(parameters[:3])):
        order = {0: "queries", 1: "prompts", 2: "labels"}
        given = ", ".join(f"{each}={order[places[each]]}" for each in parameters if each in places)
        return f"{head}\n    return {name}({given})"
    return None


def _top_level_names(module: ast.Module) -> tuple[set[str], set[str]]:
    """The functions and classes, and the other names, that the module binds, including in ``if`` and ``try`` blocks."""
    functions: set[str] = set()
    others: set[str] = set()
    pending: list[ast.AST] = list(module.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            functions.add(node.name)  # names bound inside it are not top-level
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            others |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            others.add(node.id)
        pending += ast.iter_child_nodes(node)
    return functions, others


def load_function(
    location: str, options: PyOptions, *, patient: bool = False, keys: tuple[str | None, ...] | None = None
) -> Scorer:
    """Import the file, in a process of its own with ``isolate``, and wrap the function.

    The function returns a dict with ``rewards``, as OpenRLHF's ``reward_func`` does, or the rewards themselves: one
    number in any shape. ``key=`` picks another key of the dict. A coroutine function is awaited.
    """
    path, name = split_location(location)
    wanted = keys or (options.key,)
    call: Callable[..., Awaitable[Any]]
    if options.isolate:
        call = Processes(str(path), name, wanted, options.concurrency, options.timeout).call
    else:
        threads = Threads(options.concurrency, options.timeout)
        call = functools.partial(threads.call, load(str(path), name, wanted, alone=False))

    async def score(response: Response) -> Any:
        columns = {column: response.columns[column] for column in options.columns}
        return await call(response.query, response.prompt, response.label, columns)

    return score

"""Kind ``py``: a function in the user's own file, with the signature that the host gives its ``reward_func``."""

import ast
import functools
import hashlib
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pama_plugin.errors import PamaError
from pama_plugin.rewards.options import PyOptions
from pama_plugin.rewards.response import Response, Scorer
from pama_plugin.rewards.threads import Threads


def split_location(location: str) -> tuple[Path, str]:
    """``FILE.py:FUNCTION`` → (absolute path, function name).

    Raises:
        ValueError: not of that form.

    >>> split_location("/rewards.py:polite")
    (PosixPath('/rewards.py'), 'polite')
    """
    path, separator, function = location.rpartition(":")
    if not separator or not path.endswith(".py") or not function.isidentifier():
        raise ValueError(f"expected FILE.py:FUNCTION, found {location!r}")
    return Path(path).expanduser().absolute(), function


def absolute_function(location: str) -> str:
    """``FILE.py:FUNCTION`` with the file's absolute path."""
    path, function = split_location(location)
    return f"{path}:{function}"


def function_files(location: str) -> list[Path]:
    """The user's file."""
    return [split_location(location)[0]]


def check_function(location: str, options: PyOptions) -> None:
    """Refuse a function that is not there or takes other arguments, without running its file: it may load models.

    Raises:
        ValueError: no such file, a file that is not Python, or no function in it that can be called as the host does.
    """
    path, function = split_location(location)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        module = ast.parse(path.read_text(), path.name)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid Python: {error}") from error
    functions, others = _top_level_names(module)
    if function not in functions | others and "*" not in others:
        raise ValueError(f"no function {function!r} in {path}; it defines {', '.join(sorted(functions)) or 'none'}")
    found = [node for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in found:
        if node.name == function and function not in others and not node.decorator_list:
            _check_signature(node, path)


def _check_signature(node: ast.FunctionDef | ast.AsyncFunctionDef, path: Path) -> None:
    takes = node.args
    positional = len(takes.posonlyargs) + len(takes.args)
    fits = positional - len(takes.defaults) <= 3 <= (math.inf if takes.vararg else positional)
    if isinstance(node, ast.AsyncFunctionDef) or not fits or None in takes.kw_defaults:
        found = ast.unparse(node).partition(":\n")[0]
        raise ValueError(f"{path}: must be def {node.name}(queries, prompts, labels), found {found}")


def _top_level_names(module: ast.Module) -> tuple[set[str], set[str]]:
    """Functions and classes, and every other name, that the module binds, also inside ``if`` and ``try``."""
    functions: set[str] = set()
    others: set[str] = set()
    pending: list[ast.AST] = list(module.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            functions.add(node.name)  # and not what it binds inside
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            others |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            others.add(node.id)
        pending += ast.iter_child_nodes(node)
    return functions, others


@functools.cache  # two functions of one file share it, and the models it loads
def _import(path: Path) -> ModuleType:
    name = f"pama_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    spec.loader.exec_module(module)
    return module


def load_function(location: str, options: PyOptions, *, patient: bool = False) -> Scorer:
    """Import the file and wrap ``function(queries, prompts, labels)``, called with lists of one.

    The function returns what the host's ``reward_func`` returns, a dict with ``rewards``, or the rewards themselves:
    one number, in whatever shape. The host's other keys (``scores``, ``extra_logs``) are not used.
    """
    path, name = split_location(location)
    function = getattr(_import(path), name)
    threads = Threads(options.concurrency, options.timeout)

    async def score(response: Response) -> float:
        return _only_number(await threads.call(function, [response.query], [response.prompt], [response.label]))

    return score


def _only_number(result: Any) -> float:
    rewards = result.get("rewards") if isinstance(result, dict) else result
    if rewards is None:
        raise PamaError("returned None")
    # Not the process's default type, which a function may have set for a model that it loads.
    dtype = None if isinstance(rewards, torch.Tensor) else torch.float64
    try:
        values = torch.as_tensor(rewards, dtype=dtype).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise PamaError(f"returned {repr(rewards)[:80]}, which is no number") from None
    if len(values) != 1:
        raise PamaError(f"returned {len(values)} rewards for 1 response")
    return float(values[0])

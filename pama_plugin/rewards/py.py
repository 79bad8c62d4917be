"""Kind ``py``: a function in the user's own file, with the signature that the host gives its ``reward_func``."""

import ast
import importlib.util
from pathlib import Path

import torch

from pama_plugin.rewards.response import Response, Scorer


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


def check_location(location: str) -> None:
    """Refuse a file or function that is not there, without running the file: it may load models.

    Raises:
        ValueError: no such file, a file that is not Python, or no such function in it.
    """
    path, function = split_location(location)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        body = ast.parse(path.read_text()).body
    except SyntaxError as error:
        raise ValueError(f"{path} is not valid Python: {error}") from error
    defined = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assigned = [
        name.id for node in body if isinstance(node, ast.Assign) for name in node.targets if isinstance(name, ast.Name)
    ]
    imported = [alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    if function not in (*defined, *assigned, *imported) and "*" not in imported:
        raise ValueError(f"no function {function!r} in {path}; it defines {', '.join(defined) or 'none'}")


def load_function(location: str) -> Scorer:
    """Import the file and wrap ``function(queries, prompts, labels)``, called with lists of one.

    The function returns what the host's ``reward_func`` returns, a dict with ``rewards``, or the rewards themselves.
    The host's other keys (``scores``, ``extra_logs``) are not used.
    """
    path, name = split_location(location)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)

    def score(response: Response) -> float:
        result = function([response.query], [response.prompt], [response.label])
        rewards = result.get("rewards") if isinstance(result, dict) else result
        if rewards is None:
            raise ValueError("returned None")
        values = torch.as_tensor(rewards).flatten()
        if len(values) != 1:
            raise ValueError(f"returned {len(values)} rewards for 1 response")
        return float(values[0])

    return score

"""Import and call the function of a user's file. Imports little, because every process of a ``py`` reward does it."""

import functools
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pama_plugin.errors import PamaError, text_of
from pama_plugin.rewards.numbers import only_number

# Errors of threads (isolate=false) whose cause is not in their text.
_HINTS = {
    "Already borrowed": "; a tokenizer takes one call at a time: set concurrency=1, or isolate=true",
    "signal only works in main thread of the main interpreter": "; set isolate=true, for a main thread of its own",
}
_HERE = str(Path(__file__).parent)


def load(path: str, name: str, *, alone: bool) -> Callable[[str, str, Any], float]:
    """Import the file and wrap its ``function(queries, prompts, labels)``, called with lists of one element.

    Args:
        path: the file.
        name: the function.
        alone: whether the process serves this file only. Then the file may import its neighbours first, as a script
            does, and ``multiprocessing`` finds its functions. Otherwise its neighbours come last, so that they hide no
            module from the rest of the process.
    """
    function = getattr(_import(Path(path), alone), name)
    known = {"rewards"}

    def call(query: str, prompt: str, label: Any) -> float:
        result = function([query], [prompt], [label])
        if isinstance(result, dict):
            if "rewards" not in result:
                raise PamaError(f"must return a dict with 'rewards', found the keys {', '.join(map(repr, result))}")
            unused = {str(key) for key, value in result.items() if value is not None} - known
            if unused:
                known.update(unused)
                print(
                    f"PAMA: {name} in {path} also returns {', '.join(sorted(unused))}: not used; a number is logged by "
                    "an objective of its own, with role=monitor",
                    file=sys.stderr,
                )
            result = result["rewards"]
        return only_number(result)

    return call


@functools.cache  # functions of one file share the module and the models that it loads
def _import(path: Path, alone: bool) -> ModuleType:
    folder, name = str(path.parent), path.stem
    if alone and name.isidentifier() and name not in sys.modules and _is_free(name, path):
        sys.path.insert(0, folder)
    else:  # a file that is called like a module that it may import
        sys.path.append(folder)
        name = f"pama_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up the module of a class there
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:  # of a script: an engine that it ended would keep OpenRLHF waiting for ever
        raise PamaError(f"{path} exits when it is imported: {error}") from error
    return module


def _is_free(name: str, path: Path) -> bool:
    """Whether no other module has the name; the file itself has it if its folder is on the path already."""
    spec = importlib.util.find_spec(name)
    return spec is None or spec.origin is not None and Path(spec.origin).resolve() == path.resolve()


def describe(error: BaseException) -> PamaError:
    """The error of user code as one of ours, with the line in the user's file."""
    if type(error) is PamaError:
        return error
    text = text_of(error)
    problem = PamaError(f"{type(error).__name__}: {text}{_where(error)}{_HINTS.get(text, '')}")
    problem.__cause__ = error
    return problem


def _where(error: BaseException) -> str:
    """The last line in the file of the user's function that led to the error."""
    ours = (_HERE, "<frozen importlib")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    in_file = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({in_file[-1].filename}, line {in_file[-1].lineno})" if in_file else ""

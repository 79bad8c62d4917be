"""Import and call the function of a user's file. Imports little, because every process of a ``py`` reward does it."""

import asyncio
import concurrent.futures
import functools
import hashlib
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pama_plugin.errors import PamaError, text_of
from pama_plugin.rewards.numbers import number_or_none

# Errors of threads (isolate=false) whose cause is not in their text.
_HINTS = {
    "Already borrowed": "; a tokenizer takes one call at a time: set concurrency=1, or isolate=true",
    "signal only works in main thread of the main interpreter": "; set isolate=true, for a main thread of its own",
}
_LOCK = threading.Lock()
_HERE, _FUTURES = (str(Path(file).parent) for file in (__file__, concurrent.futures.__file__))


Call = Callable[[str, str, Any, Mapping[str, Any]], Any]


def load(path: str, name: str, keys: Sequence[str | None], *, alone: bool) -> Call:
    """Import the file and wrap its ``function(queries, prompts, labels, **columns)``, called with lists of one element.

    The wrapped function returns a number or None for one key, a list of them for several, in which the text is the
    reason why one is missing.

    Args:
        path: the file.
        name: the function.
        keys: of the dict that the function returns; None stands for ``rewards``, or for a result that is no dict.
        alone: whether the process serves this file only. Then the file may import its neighbours first, as a script
            does, and ``multiprocessing`` finds its functions. Otherwise its neighbours come last, so that they hide no
            module from the rest of the process.
    """
    function = getattr(_import(Path(path), alone), name)
    known = {key or "rewards" for key in keys}

    def call(query: str, prompt: str, label: Any, columns: Mapping[str, Any]) -> Any:
        result = function([query], [prompt], [label], **{column: [value] for column, value in columns.items()})
        if inspect.isawaitable(result):
            with _LOCK:  # the threads of ``isolate=false`` must find the same loop
                loop = _event_loop()
            result = asyncio.run_coroutine_threadsafe(_wait_for(result), loop).result()
        if isinstance(result, dict):
            unused = {str(key) for key, value in result.items() if value is not None} - known
            if unused and not known.isdisjoint(result):
                known.update(unused)
                print(
                    f"PAMA: {name} in {path} also returns {', '.join(sorted(unused))}: not used; a number is logged by "
                    "an objective of its own, with key= and role=monitor",
                    file=sys.stderr,
                )
        return pick(result, keys)

    return call


def pick(result: Any, keys: Sequence[str | None]) -> Any:
    """The number or None of one key; a list for several, in which a missing number is the text of the reason.

    Raises:
        PamaError: the only number is missing.

    >>> pick({"helpful": [0.5], "safe": None}, ["helpful", "safe"]), pick([0.5], [None])
    ([0.5, None], 0.5)
    """
    if len(keys) == 1:
        return _number(result, keys[0])
    picked: list[float | str | None] = []
    for key in keys:
        try:
            picked.append(_number(result, key))
        except PamaError as problem:
            picked.append(str(problem))
    return picked


def _number(result: Any, key: str | None) -> float | None:
    if not isinstance(result, dict):
        if key is not None and result is not None:
            raise PamaError(f"must return a dict with {key!r}, found {type(result).__name__}")
        return number_or_none(result)
    wanted = key or "rewards"
    if wanted not in result:
        keys = f"the keys {', '.join(map(repr, result))}{'' if key else ' (key= picks one)'}" if result else "none"
        raise PamaError(f"must return a dict with {wanted!r}, found {keys}")
    return number_or_none(result[wanted])


async def _wait_for(result: Any) -> Any:
    try:
        return await result
    except BaseException as error:  # SystemExit would end the event loop
        raise describe(error) from error


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One for all ``async`` functions of this process, because their clients belong to the loop of their first call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


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
    ours = (_HERE, _FUTURES, "<frozen importlib")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    in_file = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({in_file[-1].filename}, line {in_file[-1].lineno})" if in_file else ""

"""Kind ``builtin``: rewards of this package and of packages that register their own, by name."""

import functools
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pama_plugin.registry import Registry
from pama_plugin.rewards.response import Response, Scorer
from pama_plugin.rewards.threads import Threads

Measure = Callable[[Response], float]
Factory = Callable[..., Measure]

SECONDS = 60.0  # limit of one call; a builtin reward should take milliseconds
REGEX_SECONDS = 5.0  # limit of one search; some patterns take exponential time

REWARDS = Registry[Factory]("builtin reward", "pama_plugin.rewards")


def register_reward(name: str) -> Callable[[Factory], Factory]:
    """Register a function that takes options (keyword-only, annotated) and returns a ``Response -> float``.

    The registration applies to this process only. For rollout engines, declare the function in the entry-point group
    ``pama_plugin.rewards`` of an installed package.

    Raises:
        ValueError: ``name`` is taken.
    """

    def register(factory: Factory) -> Factory:
        REWARDS.add(name, factory)
        return factory

    return register


def available_rewards() -> tuple[str, ...]:
    """Sorted names for ``builtin:NAME``: the rewards of this package, registered ones, and those of installed packages.

    >>> available_rewards()
    ('json', 'length', 'regex', 'repetition')
    """
    return REWARDS.names()


def load_measure(name: str, options: dict[str, Any]) -> Measure:
    """Load the reward of ``builtin:NAME,key=value…``. Text values are converted to the types of the options.

    Raises:
        ValueError: the name or an option is unknown (the message lists the known ones), or a value has the wrong type.

    >>> load_measure("length", {"scale": "140", "min": "0.5", "max": "1.5"})(Response("", "", "", "", 280))
    1.5
    """
    from pydantic import validate_call  # imported here, because --help lists the names without it

    factory = REWARDS[name]
    known = list(inspect.signature(factory).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        options_taken = ", ".join(known) or "none"
        raise ValueError(f"builtin:{name} has no option {', '.join(unknown)}; it takes {options_taken}")
    return validate_call(factory)(**options)


def check_builtin(name: str, options: dict[str, Any]) -> None:
    """Raise ``ValueError`` as ``load_measure`` does."""
    load_measure(name, options)


def load_builtin(name: str, options: dict[str, Any], *, patient: bool = False) -> Scorer:
    """Load the reward as a coroutine function that runs in a thread."""
    return functools.partial(Threads(limit=16, timeout=SECONDS).call, load_measure(name, options))


# arXiv 2508.07768, section 6: clip(l / 140, 70/140, 210/140) for film reviews, clip(l / 140, 0, 4096/140) for HH-RLHF.
PAPER_LENGTHS = {"imdb": (140.0, 70 / 140, 210 / 140), "hh": (140.0, 0.0, 4096 / 140)}


@register_reward("length")
def length(
    *,
    scale: float = 1.0,
    min: float = -math.inf,
    max: float = math.inf,
    unit: Literal["tokens", "words", "characters"] = "tokens",
    preset: Literal["imdb", "hh"] | None = None,
) -> Measure:
    """``clip(l / scale, min, max)`` for a response of length l. A negative scale rewards brevity.

    ``preset`` selects one of the two settings of the paper, ``imdb`` or ``hh``, in tokens of the policy.

    >>> brevity = length(scale=-10)
    >>> brevity(Response("", "", "", "", 25)), brevity(Response("", "", "", "", 0))
    (-2.5, 0.0)
    """
    if preset is not None:
        if (scale, min, max, unit) != (1.0, -math.inf, math.inf, "tokens"):
            raise ValueError("length takes either preset or scale, min, max and unit, found both")
        scale, min, max = PAPER_LENGTHS[preset]
    if not (scale and math.isfinite(scale)) or not min <= max:
        raise ValueError(f"length needs a finite scale ≠ 0 and min ≤ max, found scale={scale}, min={min}, max={max}")

    def measure(response: Response) -> float:
        text = response.response
        units = response.num_tokens if unit == "tokens" else len(text.split() if unit == "words" else text)
        return float(sorted((min, units / scale + 0.0, max))[1])  # 0 / -10 is -0.0

    return measure


@register_reward("repetition")
def repetition(*, n: int = 3) -> Measure:
    """``distinct n-grams / n-grams − 1`` over words: 0 without repetition, close to −1 if all n-grams are equal."""
    if n < 1:
        raise ValueError(f"repetition needs n ≥ 1, found n={n}")

    def measure(response: Response) -> float:
        words = response.response.split()
        grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return measure


@register_reward("regex")
def regex(*, pattern: str, full: bool = False) -> Measure:
    """1 if the pattern matches in the response (``full``: matches all of it), else 0. ``.`` also matches a newline.

    Uses the package ``regex``, because some patterns take exponential time: it stops a search after 5 seconds and lets
    other threads run meanwhile.
    """
    try:
        from regex import DOTALL, compile, error
    except ImportError as missing:
        raise ValueError(f"builtin:regex needs pip install 'pama_plugin[rewards]', found {missing}") from missing
    try:
        compiled = compile(pattern, DOTALL)
    except error as problem:
        raise ValueError(f"regex needs a valid pattern, found {pattern!r}: {problem}") from problem
    search = compiled.fullmatch if full else compiled.search

    def measure(response: Response) -> float:
        return float(search(response.response, timeout=REGEX_SECONDS, concurrent=True) is not None)

    return measure


@register_reward("json")
def valid_json(*, fenced: bool = False) -> Measure:
    """1 if the response is valid JSON (``fenced``: if its first fenced block marked ``json`` is), else 0.

    Fences are those of CommonMark: three or more backticks or tildes at the start of a line, closed by as many or more.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def measure(response: Response) -> float:
        text = response.response
        if fenced:
            text = next((block for language, block in fenced_blocks(text) if language == "json"), "")
        try:
            json.loads(text, parse_constant=refuse)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0

    return measure


def fenced_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of each fenced block, in order. A block that is not closed goes on to the end."""
    fence, language = "", ""
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):  # splitlines would split at U+2028 in a string
        mark = re.match(r" {0,3}(`{3,}|~{3,})\s*(.*)", line)
        if not fence and mark and not ("`" in mark[1] and "`" in mark[2]):  # inline code may stand on a line of its own
            fence, language, lines = mark[1], mark[2].split(maxsplit=1)[0].lower() if mark[2].strip() else "", []
        elif fence and mark and mark[1].startswith(fence) and not mark[2].strip():
            yield language, "\n".join(lines)
            fence = ""
        elif fence:
            lines.append(line)
    if fence:
        yield language, "\n".join(lines)

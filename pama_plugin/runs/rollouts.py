"""``pama rollouts``: what the policy wrote, with the rewards of every response, from the log of a run."""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from pama_plugin.errors import ConfigError, printable

if TYPE_CHECKING:
    from rich.console import Console

# What a run writes, beside its TensorBoard logs if it has any.
FILE, EVALUATION_FILE, SETTINGS = "rollouts.jsonl", "evaluation.jsonl", "pama.yaml"


class Rollout(BaseModel):
    """A response as logged: its texts, the rewards or the reasons for missing ones, and what was made of them."""

    step: int
    sample: int
    prompt: str
    response: str
    label: str | None = None
    turns: list[dict[str, str]] = []
    rewards: dict[str, float | None]
    problems: dict[str, str] = {}
    weights: dict[str, float | None] = {}
    coefficients: dict[str, float | None] = {}
    advantage: float | None = None
    nats: float | None = None
    reference_nll: float | None = None


def read_rollouts(folder: Path, name: str = FILE) -> list[Rollout]:
    """The logged responses of a run by step. Of a step that a resumed run repeated, those that were written last.

    Args:
        folder: of the run.
        name: ``EVALUATION_FILE`` for the responses to held-out prompts.

    Raises:
        ConfigError: there is no log, or a line of it cannot be read. The last line may be cut off.
    """
    files = sorted(folder.rglob(name), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(f"no {name} in {folder}: give the folder of --logger.tensorboard_dir or --ckpt.output_dir")
    steps: dict[int, dict[int, Rollout]] = {}
    for file in files:
        lines = file.read_bytes().splitlines()
        latest = math.inf
        for number, line in enumerate(lines, start=1):
            try:
                rollout = Rollout.model_validate_json(line)
            except ValidationError as error:
                if number == len(lines):  # the run was killed, or is writing
                    break
                raise ConfigError(f"{file}, line {number}: {error.errors()[0]['msg']}") from error
            if rollout.step != latest:  # a step that is written again replaces what was there
                steps[rollout.step] = {}
            latest = rollout.step
            steps[latest][rollout.sample] = rollout
    return [rollout for step in sorted(steps) for rollout in steps[step].values()]


def show_rollouts(options: argparse.Namespace) -> int:
    """Print the responses that the options choose.

    Raises:
        ConfigError: there is no log, or it has no such step or objective.
    """
    from rich.console import Console

    rollouts = read_rollouts(options.folder, EVALUATION_FILE if options.evaluation else FILE)
    steps = list(dict.fromkeys(rollout.step for rollout in rollouts))
    if not steps:
        raise ConfigError(f"{options.folder}: no response was logged yet")
    chosen = [steps[-1]] if options.step is None else options.step
    if missing := [step for step in chosen if step not in steps]:
        raise ConfigError(f"--step must be one of the logged steps, {_ranges(steps)}, found {missing[0]}")
    found = [rollout for rollout in rollouts if rollout.step in chosen]
    names = list(dict.fromkeys(name for rollout in rollouts for name in rollout.rewards))
    for flag, reverse in (("best", True), ("worst", False)):
        if (name := getattr(options, flag)) is not None:
            if name not in names:
                raise ConfigError(f"--{flag} must be one of {', '.join(names)}, found {name!r}")
            found = ranked(found, by_reward(name), reverse=reverse)
    if options.disagree:
        found = ranked(found, disagreement(found), reverse=True)
    console = Console(markup=False, emoji=False, highlight=False)
    for rollout in found[: options.limit]:
        print_rollout(console, rollout)
    console.print(
        f"{min(len(found), options.limit)} of {len(found)} responses of step {', '.join(map(str, chosen))}; logged "
        f"steps: {_ranges(steps)}",
        style="dim",
    )
    return 0


def ranked(rollouts: Iterable[Rollout], measure: Callable[[Rollout], float | None], *, reverse: bool) -> list[Rollout]:
    """The responses that have the measure, in order of it."""
    measured = [(value, rollout) for rollout in rollouts if (value := measure(rollout)) is not None]
    return [rollout for _, rollout in sorted(measured, key=lambda entry: entry[0], reverse=reverse)]


def by_reward(name: str) -> Callable[[Rollout], float | None]:
    """The reward of one objective, as a measure of responses."""
    return lambda rollout: rollout.rewards.get(name)


def disagreement(rollouts: Sequence[Rollout]) -> Callable[[Rollout], float | None]:
    """Largest minus smallest reward of a response, each in standard deviations from its mean over ``rollouts``."""
    scales = {}
    for name in rollouts[0].rewards:
        values = [value for rollout in rollouts if (value := rollout.rewards.get(name)) is not None]
        scales[name] = (fmean(values), stdev(values)) if len(values) > 1 else (0.0, 0.0)

    def measure(rollout: Rollout) -> float | None:
        scaled = [
            (value - scales[name][0]) / scales[name][1]
            for name, value in rollout.rewards.items()
            if value is not None and scales.get(name, (0, 0))[1] > 0
        ]
        return max(scaled) - min(scaled) if len(scaled) > 1 else None

    return measure


def visible(text: str) -> str:
    """The text with its lines, and nothing that could move a terminal's cursor."""
    return "\n".join(printable(line, longest=len(line)) for line in text.split("\n"))


def print_rollout(console: "Console", rollout: Rollout) -> None:
    """Print prompt and response, below them the rewards with the shares of the objectives."""
    console.rule(f"step {rollout.step}, response {rollout.sample}", style="dim", align="left")
    console.print(visible(rollout.prompt).strip(), style="dim")
    for turn in rollout.turns or [{"policy": rollout.response}]:
        for who, text in turn.items():
            console.print(visible(text).strip() or "(empty)", style="bold" if who == "policy" else "dim")
    parts = []
    for name, reward in rollout.rewards.items():
        share = rollout.coefficients.get(name)
        shown = "–" if reward is None else f"{reward:.4g}"
        parts.append(f"{name} {shown}" if share is None else f"{name} {shown} ({100 * share:.0f} %)")
    if rollout.nats is not None:
        parts.append(f"{rollout.nats:.2g} nats")
    if rollout.reference_nll is not None:
        parts.append(f"reference nll {rollout.reference_nll:.3g}")
    if rollout.advantage is not None:
        parts.append(f"advantage {rollout.advantage:+.2g}")
    console.print("  ".join(parts), style="cyan")
    for name, problem in rollout.problems.items():
        console.print(f"{name}: {visible(problem)}", style="yellow")


def _ranges(steps: Sequence[int]) -> str:
    """Steps in few words.

    >>> _ranges([1, 2, 3, 7])
    '1-3, 7'
    """
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)

"""Update the tables and the figure of RESULTS.md from the committed runs in results/.

    python examples/paper/results.py

A table is between ``<!-- NAME -->`` and ``<!-- end -->``; the text around it is not changed.
"""

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from analysis import MARGIN, Difference, Run, difference, equal_distances, holm, load, smooth

from pama_plugin.runs.report.pareto import by_arm, interval

HERE = Path(__file__).parent
BLOCK = re.compile(r"(<!-- (?P<name>[\w-]+) -->\n)(?:(?!<!--).)*(<!-- end -->)", re.DOTALL)
NATS = (3, 6, 12)
SHOWN = (21, 22)  # seeds whose texts are shown


class Contrast(NamedTuple):
    """A primary contrast of the protocol: ``arm`` minus ``baseline``."""

    endpoint: str
    experiment: str
    arm: str
    baseline: str


TASKS_OF_A = ("length", "concise", "shares4", "shares8", "exploit")
CONTRASTS = (
    *(Contrast("way", f"A-{task}", arm, "linear") for task in TASKS_OF_A for arm in ("pama", "pama-paper")),
    *(Contrast("way", f"A-{task}", "pama", "min_norm") for task in ("shares4", "shares8")),
    *(Contrast("way", f"A-{task}", "min_norm", "linear") for task in ("shares4", "shares8")),
    *(Contrast("way", "C-summary", arm, "linear") for arm in ("pama", "pama-paper")),
    *(Contrast("stay", where, arm, "linear") for where in ("A-concise", "C-summary") for arm in ("pama", "pama-paper")),
)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """
    >>> print(table(["a", "b"], [["x", "1"]], "Note."))
    | a | b |
    |---|---:|
    | x | 1 |
    <BLANKLINE>
    Note.
    <BLANKLINE>
    """
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    rule = f"|---|{'---:|' * (len(columns) - 1)}"
    return "\n".join([lines[0], rule, *lines[1:], *(["", note] if note else []), ""])


def over(runs: Sequence[Run], measure: Callable[[Run], float | None], digits: int = 2) -> str:
    """Mean ± half of the 95 % interval over the runs for which the measure exists; how many, if not all."""
    values = [value for run in runs if (value := measure(run)) is not None]
    if not values:
        return "–"
    found = interval(values)
    shown = f"{found.mean:.{digits}f}" + (f" ± {found.half:.{digits}f}" if len(values) > 1 else "")
    return shown if len(values) == len(runs) else f"{shown} ({len(values)})"


def endpoints_table(runs: Sequence[Run]) -> str:
    columns = ["arm", *(f"{nats} nats" for nats in NATS), "end", "nats at the end", "hypervolume", "nll at the end"]
    monitors = [tag.removeprefix("reward/") for tag in runs[0].series if tag.startswith("reward/")]
    monitors = [name for name in monitors if name not in runs[0].objectives]
    rows = []
    for arm, own in by_arm(runs).items():
        cells = [arm]
        for nats in NATS:
            reached = sum(run.reaches(nats) for run in own)
            short = "" if reached == len(own) else f" [{reached}]"
            cells.append(over(own, lambda run, nats=nats: run.worst(nats)) + short)
        cells += [over(own, lambda run: run.end), over(own, lambda run: float(run.nats[-1]), 1)]
        cells += [
            over(own, lambda run: run.hypervolume, 1),
            over(own, lambda run: float(smooth(run.series["nll"])[-1])),
        ]
        rows.append(cells + [over(own, lambda run, name=name: float(run.rise(name)[-1])) for name in monitors])
    seeds = len({run.seed for run in runs})
    note = (
        f"Worst rise; {seeds} seeds. [n]: only n runs came that far, the others count as they ended. Monitors: rise at "
        "the end."
    )
    return table([*columns, *monitors], rows, note)


def objectives_table(runs: Sequence[Run]) -> str:
    """The rise of every objective at 6 nats, and at the end."""
    names = runs[0].objectives
    rows = [
        [arm]
        + [over(own, lambda run, i=i: float(run.read(run.rises, run.at(6))[i])) for i in range(len(names))]
        + [over(own, lambda run, i=i: float(run.rises[i, -1])) for i in range(len(names))]
        for arm, own in by_arm(runs).items()
    ]
    return table(["arm", *(f"{name}, 6 nats" for name in names), *(f"{name}, end" for name in names)], rows)


def stay_table(runs: Sequence[Run]) -> str:
    def gained(run: Run) -> float | None:
        return None if run.arrival is None or run.later is None else float(run.nats[run.later] - run.nats[run.arrival])

    names = runs[0].objectives
    columns = ["arm", "arrived", "step of arrival", "with a stay", "stay", "nats gained", "beyond 40 nats"]
    rows = []
    for arm, own in by_arm(runs).items():
        steps = [run.arrival + 1.0 for run in own if run.arrival is not None]
        cells = [arm, f"{len(steps)} of {len(own)}", f"{statistics.fmean(steps):.0f}" if steps else "–"]
        cells += [str(sum(run.stay is not None for run in own)), over(own, lambda run: run.stay), over(own, gained, 1)]
        spreads = [over(own, lambda run, name=name: run.last_spread[name]) for name in names]
        rows.append([*cells, str(sum(run.farthest > 40 for run in own)), *spreads])
    note = (
        "Stay: worst rise 30 steps after arrival minus that at arrival. (n): runs for which it exists. Spread: standard"
        " deviation of the rewards of a step, mean of the last five steps, relative to the first step."
    )
    return table([*columns, *(f"spread of {name}" for name in names)], rows, note)


def exploit_table(runs: Sequence[Run]) -> str:
    rows = [
        [
            arm,
            over(own, lambda run: statistics.fmean(run.series["reward/trigger"][-5:])),
            *(over(own, lambda run, name=name: float(run.rise(name)[-1])) for name in ("dense", "long")),
        ]
        for arm, own in by_arm(runs).items()
    ]
    return table(["arm", "responses with the word, last five steps", "dense, end", "long, end"], rows)


def contrast_values(contrast: Contrast, runs: Sequence[Run]) -> Difference | None:
    """Over the seeds that both arms have; *stay* over those where both arrived and have enough steps left."""
    arms = {arm: {run.seed: run for run in runs if run.arm == arm} for arm in (contrast.arm, contrast.baseline)}
    values: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    for seed in arms[contrast.arm].keys() & arms[contrast.baseline].keys():
        one, other = (own[seed] for own in arms.values())
        pair = equal_distances(one, other, 6) if contrast.endpoint == "way" else (one.stay, other.stay)
        if None not in pair:
            for arm, value in zip(values, pair):
                values[arm][seed] = value
    return difference(values[contrast.arm], values[contrast.baseline]) if values[contrast.arm] else None


def contrasts_table(experiments: dict[str, list[Run]]) -> str:
    found = [(contrast, contrast_values(contrast, experiments.get(contrast.experiment, []))) for contrast in CONTRASTS]
    # A contrast that could not be tested counts, too: as one that is not rejected.
    rejected = holm([1.0 if value is None or value.n < 2 else value.p for _, value in found])
    rows = []
    for (contrast, value), kept in zip(found, rejected):
        cells = [contrast.endpoint, contrast.experiment, f"{contrast.arm} − {contrast.baseline}"]
        if value is None or value.n < 2:
            rows.append(
                [*cells, "–", "–", "–", "no runs" if contrast.experiment not in experiments else "too few runs"]
            )
            continue
        verdict = " and ".join(["different"] * kept + ["equivalent"] * value.equivalent) or "not known"
        rows.append([*cells, str(value.n), f"{value.mean:+.2f} ± {value.half:.2f}", f"{value.p:.2g}", verdict])
    note = (
        "In standard deviations at the start, ± half of the 95 % interval, paired over n seeds. *different*: kept by "
        f"Holm's method over the {len(CONTRASTS)} contrasts, α = .05. *equivalent*: 90 % interval within ±{MARGIN}."
    )
    return table(["endpoint", "task", "contrast", "n", "difference", "p", "verdict"], rows, note)


def texts_table(runs: Sequence[Run]) -> str:
    rows = []
    for seed in SHOWN:
        for run in runs:
            if run.seed == seed:
                last = run.texts[-1]
                rows.append([run.arm, f"{cell(question(last['prompt']))} → {cell(last['response'])}"])
    return table(["arm", f"first prompt of the last step, seeds {' and '.join(map(str, SHOWN))}"], rows).replace(
        "---:|", "---|"
    )


def question(prompt: str) -> str:
    """The last line of a prompt, without the template of a chat.

    >>> question("<|im_start|>user\\nShorten this: A film.<|im_end|>\\n<|im_start|>assistant\\n")
    'Shorten this: A film.'
    """
    lines = re.sub(r"<\|[^|]*\|>(assistant|user|system)?", "\n", prompt).split("\n")
    return [line for line in lines if line.strip()][-1]


def cell(text: str) -> str:
    """A text in a cell of a table."""
    shown = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    return shown.replace("|", "\\|") or "(empty)"


def draw(experiments: dict[str, list[Run]], file: Path) -> None:
    """Worst rise against distance, mean over seeds, for every task."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = min(4, len(experiments))
    rows = -(-len(experiments) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows + 1), squeeze=False, layout="constrained"
    )
    arms = list(dict.fromkeys(run.arm for runs in experiments.values() for run in runs))
    colours = dict(zip(arms, pyplot.colormaps["tab10"].colors))
    for axis in axes.flat[len(experiments) :]:
        axis.remove()
    for axis, (name, runs) in zip(axes.flat, experiments.items()):
        for arm, own in by_arm(runs).items():
            farthest = np.median([run.nats.max() for run in own])
            grid = np.linspace(0, min(farthest, 15), 31)
            mean = [statistics.fmean(run.worst(nats) for run in own) for nats in grid]
            axis.plot(grid, mean, color=colours[arm], label=arm, linewidth=1.4)
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("nats per response from the start", fontsize=8)
        axis.set_ylabel("worst rise (sd)", fontsize=8)
    handles = [pyplot.Line2D([], [], color=colours[arm], label=arm) for arm in arms]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def blocks(experiments: dict[str, list[Run]]) -> dict[str, str]:
    """Name of a block → its table."""
    found = {"contrasts": contrasts_table(experiments)}
    for name, runs in experiments.items():
        found[name] = endpoints_table(runs)
        found[f"{name}-objectives"] = objectives_table(runs)
        found[f"{name}-stay"] = stay_table(runs)
        found[f"{name}-texts"] = texts_table(runs)
        if "reward/trigger" in runs[0].series:
            found[f"{name}-exploit"] = exploit_table(runs)
    return found


def experiments() -> dict[str, list[Run]]:
    return {file.stem: load(file) for file in sorted((HERE / "results").glob("?-*.json"))}


def render(page: str, tables: dict[str, str]) -> str:
    if unknown := {match["name"] for match in BLOCK.finditer(page)} - tables.keys():
        raise SystemExit(f"RESULTS.md asks for tables that there are no runs for: {', '.join(sorted(unknown))}")
    return BLOCK.sub(lambda match: f"{match[1]}{tables[match['name']]}{match[3]}", page)


if __name__ == "__main__":
    page = HERE / "RESULTS.md"
    page.write_text(render(page.read_text(), blocks(experiments())))
    draw(experiments(), HERE / "curves.png")

"""Write the tables and pictures of RESULTS.md anew, from the result of every run in results/.

    python examples/paper/results.py

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``; the words around it are left as they are.
"""

import json
import re
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from matplotlib import pyplot

from pama_plugin.report.figures import draw_curves, draw_front
from pama_plugin.report.pareto import by_arm, fifth, interval, paired
from pama_plugin.report.runs import Run, find_runs
from pama_plugin.report.summary import (
    Grid,
    arms_table,
    differences_table,
    front_table,
    objectives_table,
    shared_objectives,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BLOCK = re.compile(r"(<!-- (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Experiment(NamedTuple):
    """A sweep: the point that hypervolume is measured above, whatever was run, and the arms to compare with."""

    reference: dict[str, float]
    baselines: tuple[str, ...] = ("linear", "pama-token")


EXPERIMENTS = {
    "main": Experiment({"length": 0.5, "sentiment": -2.0}),
    "conflict": Experiment({"matter_of_fact": -3.0, "sentiment": -2.0}),
    "three": Experiment({"length": 0.5, "sentiment": -2.0, "variety": -1.0}),
    "four": Experiment({"length": 0.5, "matter_of_fact": -3.0, "sentiment": -2.0, "variety": -1.0}),
}


def markdown(grid: Grid) -> str:
    """
    >>> print(markdown(Grid("", ["a", "b"], [["x", "1"]], "Note.")))
    | a | b |
    |---|---:|
    | x | 1 |
    <BLANKLINE>
    Note.
    <BLANKLINE>
    """
    head, *rows = (f"| {' | '.join(line)} |" for line in [grid.columns, *grid.rows])
    rule = f"|---|{'---:|' * (len(grid.columns) - 1)}"
    return "\n".join([head, rule, *rows, "", grid.caption, ""])


def correlations_table(runs: Sequence[Run]) -> Grid:
    """How the rewards go together in the first rollout, before any update, and where each arm ends."""
    names = [name for name in runs[0].scored if all(f"reward/{name}" in run.scalars for run in runs)]
    logged = {tag for run in runs for tag in run.scalars}
    tags = [tag for pair in combinations(names, 2) for a, b in (pair, pair[::-1])
            if (tag := f"pama/correlation/{a}/{b}") in logged]  # fmt: skip
    first = [str(interval([run.scalars[tag][0][1] for run in runs if tag in run.scalars])) for tag in tags]
    rows = [["all, before the first update", *first]]
    for arm, own in by_arm(runs).items():
        rows.append(
            [arm, *(str(interval([fifth(run.scalars.get(tag, []), last=True) for run in own])) for tag in tags)]
        )
    columns = [tag.removeprefix("pama/correlation/").replace("/", " and ") for tag in tags]
    return Grid(
        "correlations",
        ["arm", *columns],
        rows,
        "Pearson's, over the responses of a step; mean of the last fifth of steps.",
    )


def conflict_table(runs: Sequence[Run]) -> Grid:
    """Share of tokens on which two objectives' advantages have different signs, as the run goes on."""
    tag = "pama/conflict_rate"
    rows = [
        [arm, *(str(interval([fifth(run.scalars[tag], last=last) for run in own])) for last in (False, True))]
        for arm, own in by_arm(runs).items()
    ]
    return Grid("conflict", ["arm", "first fifth", "last fifth"], rows, "Conflict rate, share of the response tokens.")


def speed_table(runs: Sequence[Run], baseline: str) -> Grid:
    """How fast an arm gets there: the mean over all steps, and what that is above the baseline's, paired over seeds."""
    names = [name for name in runs[0].scored if all(f"reward/{name}" in run.scalars for run in runs)]
    arms = by_arm(runs)

    def means(arm: str, name: str) -> dict[int, float]:
        return {run.seed: statistics.fmean(value for _, value in run.scalars[f"reward/{name}"]) for run in arms[arm]}

    rows = []
    for arm in arms:
        row = [arm]
        for name in names:
            above = paired(means(arm, name), means(baseline, name))
            row += [f"{interval(list(means(arm, name).values())).mean:.3f}", f"{above}{' *' * above.excludes_zero}"]
        rows.append(row)
    columns = ["arm", *(column for name in names for column in (name, f"above {baseline}"))]
    return Grid(
        "speed", columns, rows, "Mean over all steps; * where the interval of the paired differences excludes 0."
    )


def equal_kl_table(runs: Sequence[Run], level: float = 1.0, window: int = 5) -> Grid:
    """Where a run is once it is so far from the reference policy: its first steps whose mean KL is at least that."""
    names = [name for name in runs[0].scored if all(f"reward/{name}" in run.scalars for run in runs)]
    rows = []
    for arm, own in by_arm(runs).items():
        found: dict[str, list[float]] = {"step": [], **{name: [] for name in names}}
        for run in own:
            kl = [value for _, value in run.scalars["kl"]]
            reached = (end for end in range(window, len(kl) + 1) if statistics.fmean(kl[end - window : end]) >= level)
            if (end := next(reached, None)) is None:
                continue
            found["step"].append(float(end))
            for name in names:
                there = [value for _, value in run.scalars[f"reward/{name}"][end - window : end]]
                found[name].append(statistics.fmean(there))
        cells = [str(interval(values)) if values else "–" for values in found.values()]
        rows.append([arm, f"{len(found['step'])} of {len(own)}", *cells])
    return Grid(
        "equal KL",
        ["arm", "runs", "step", *names],
        rows,
        f"Mean over the first {window} steps in which the mean KL from the start is at least {level:g}; a run "
        "that never went so far is left out.",
    )


def time_table(found: dict[str, list[Run]]) -> Grid:
    """What the runs took, each alone in its process; how many went on side by side is said in the text."""
    rows = []
    for name, runs in found.items():
        seconds = [json.loads((run.folder / "result.json").read_text())["seconds"] for run in runs]
        steps = f"{min(run.steps for run in runs)}"
        rows.append([name, str(len(runs)), steps, f"{statistics.median(seconds):.0f}", f"{sum(seconds) / 3600:.1f}"])
    return Grid("time", ["experiment", "runs", "steps", "median, s", "together, h"], rows)


def tables(name: str, runs: list[Run]) -> dict[str, str]:
    """Block name → Markdown, and the pictures beside the results."""
    names, own = shared_objectives(runs), EXPERIMENTS[name]
    reference = [own.reference[objective] for objective in names]
    grids = {
        "objectives": objectives_table(runs),
        "runs": arms_table(runs),
        "front": front_table(runs, names, reference),
        "conflict": conflict_table(runs),
        "equal-kl": equal_kl_table(runs),
        "speed": speed_table(runs, own.baselines[0]),
        "correlations": correlations_table(runs),
    } | {f"against-{baseline}": differences_table(runs, names, baseline) for baseline in own.baselines}
    for picture, figure in (("curves", draw_curves(runs)), ("front", draw_front(runs, names, reference))):
        figure.savefig(RESULTS / f"{name}-{picture}.png", dpi=80)
        pyplot.close(figure)
    return {f"{name}-{key}": markdown(grid) for key, grid in grids.items()}


def main() -> None:
    found = {name: find_runs([RESULTS / name])[0] for name in EXPERIMENTS if (RESULTS / name).exists()}
    blocks = {"time": markdown(time_table(found))}
    for name, runs in found.items():
        blocks |= tables(name, runs)
    page = HERE / "RESULTS.md"
    text = page.read_text()
    wanted = {match["name"] for match in BLOCK.finditer(text)}
    if unknown := sorted(wanted - set(blocks)):
        raise SystemExit(f"{page}: no such table: {', '.join(unknown)}; there are {', '.join(sorted(blocks))}")
    page.write_text(BLOCK.sub(lambda match: f"{match[1]}{blocks[match['name']]}{match[3]}", text))


if __name__ == "__main__":
    main()

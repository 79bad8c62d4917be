"""Update the tables and figures of RESULTS.md from the results of the runs in results/.

    python examples/paper/results.py

A table is between ``<!-- NAME -->`` and ``<!-- end -->``; the text around it is not changed.
"""

import json
import re
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from matplotlib import pyplot

from pama_plugin.runs.logs import Run, find_runs
from pama_plugin.runs.report.figures import draw_curves, draw_front
from pama_plugin.runs.report.pareto import by_arm, fifth, interval, whole_mean
from pama_plugin.runs.report.tables import (
    Grid,
    arms_table,
    differences_table,
    front_table,
    objectives_table,
    shared_objectives,
    shared_rewards,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# Pairs of PAMA arms that differ in one setting.
CHANGES = (
    ("pama-token", "pama-signed"),
    ("pama-sequence", "pama-sequence-signed"),
    ("pama-token", "pama-sequence"),
    ("pama-signed", "pama-sequence-signed"),
    ("pama-token", "pama-rescaled"),
    ("pama-signed", "pama-signed-rescaled"),
    ("pama-rescaled", "pama-signed-rescaled"),
    ("pama-sequence-signed", "pama-sequence-signed-rescaled"),
    ("pama-token", "pama-soft"),
)
# The experiments with two, three and four objectives in the table of active fractions.
STARVING = ("conflict", "three", "four")
BLOCK = re.compile(r"(<!-- (?P<name>[\w-]+) -->\n)(?:(?!<!--).)*(<!-- end -->)", re.DOTALL)


class Experiment(NamedTuple):
    """A sweep: a fixed reference point of the hypervolume, and the arms to compare with."""

    reference: dict[str, float]
    baselines: tuple[str, ...] = ("linear", "min_norm")


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


def changes_table(runs: Sequence[Run], names: list[str]) -> Grid:
    """The effect of each change to PAMA: rows of ``differences_table`` with different baselines."""
    arms = by_arm(runs)
    against = {before: differences_table(runs, names, before) for before, _ in CHANGES if before in arms}
    rows = [
        [f"{before} → {row[0]}", *row[1:]]
        for before, after in CHANGES
        if before in against
        for row in against[before].rows
        if row[0] == after
    ]
    caption = (
        "Last fifth of the steps: second arm minus first arm with the same seed, ± half of the 95 % interval over "
        "seeds; * if it excludes zero. Not corrected for the number of comparisons."
    )
    return Grid("changes", ["change", "seeds", *shared_rewards(runs), "worst rise"], rows, caption)


def correlations_table(runs: Sequence[Run]) -> Grid:
    """Correlations of the rewards before any update, and in the first and last fifth of each arm.

    The first rollout of a seed is the same in all arms, so it is counted once. A correlation is not logged in steps in
    which one of the rewards is constant. ``fifth`` counts logged steps, so it would select other steps.
    """
    logged = {tag for run in runs for tag in run.scalars}
    pairs = combinations(shared_rewards(runs), 2)
    tags = [tag for pair in pairs for a, b in (pair, pair[::-1]) if (tag := f"pama/correlation/{a}/{b}") in logged]
    first = {tag: {run.seed: dict(run.scalars.get(tag, [])).get(1) for run in runs} for tag in tags}
    known = [[value for value in by_seed.values() if value is not None] for by_seed in first.values()]
    rows = [["before the first update, over seeds", *(str(interval(values)) for values in known)]]
    for arm, arm_runs in by_arm(runs).items():
        cells = []
        for tag in tags:
            early = [[v for step, v in run.scalars.get(tag, []) if step <= run.steps / 5] for run in arm_runs]
            late = [[v for step, v in run.scalars.get(tag, []) if step > run.steps * 4 / 5] for run in arm_runs]
            cells.append(" → ".join(_cell([statistics.fmean(v) for v in part if v]) for part in (early, late)))
        rows.append([arm, *cells])
    columns = [tag.removeprefix("pama/correlation/").replace("/", " and ") for tag in tags]
    caption = (
        "Pearson correlation over the 64 responses of a step; for the arms, mean over the first → last fifth of the "
        "steps. It has little meaning if a reward is at its ceiling, as length is in the last fifth."
    )
    return Grid("correlations", ["arm", *columns], rows, caption)


def conflict_table(runs: Sequence[Run]) -> Grid:
    """Share of tokens where two objectives have advantages of different signs, in the first and last fifth."""
    tag = "pama/conflict_rate"
    rows = [
        [arm, *(str(interval([fifth(run.scalars[tag], last=last) for run in arm_runs])) for last in (False, True))]
        for arm, arm_runs in by_arm(runs).items()
    ]
    return Grid("conflict", ["arm", "first fifth", "last fifth"], rows, "Conflict rate: share of the response tokens.")


def equal_kl_table(runs: Sequence[Run], level: float = 0.7, window: int = 5) -> Grid:
    """Rewards of a run when it reaches a given distance from the reference policy.

    The distance is ``logprobs_diff``, the mean of ``log π − log π_ref`` over the sampled tokens: an unbiased estimate
    of the KL divergence per token.
    """
    names = shared_rewards(runs)
    rows = []
    for arm, arm_runs in by_arm(runs).items():
        values: dict[str, list[float]] = {"step": [], "reached": [], **{name: [] for name in names}}
        for run in arm_runs:
            distance = dict(run.scalars["logprobs_diff"])
            for step in sorted(distance):
                steps = range(step - window + 1, step + 1)
                if steps[0] in distance and (mean := statistics.fmean(distance[at] for at in steps)) >= level:
                    rewards = {name: dict(run.scalars[f"reward/{name}"]) for name in names}
                    values["step"].append(float(step))
                    values["reached"].append(mean)
                    for name in names:
                        values[name].append(statistics.fmean(rewards[name][at] for at in steps))
                    break
        rows.append([arm, f"{len(values['step'])} of {len(arm_runs)}", *map(_cell, values.values())])
    caption = (
        f"Mean over the first {window} consecutive steps with a mean log ratio to the reference policy of at least "
        f"{level:g} per token. Reached: the log ratio in these steps. Runs that do not reach it are excluded."
    )
    return Grid("equal KL", ["arm", "runs", "step", "reached", *names], rows, caption)


def _cell(values: list[float]) -> str:
    return str(interval(values)) if values else "–"


def starving_table(experiment_runs: dict[str, list[Run]]) -> Grid:
    """Active fraction and rms with two, three and four objectives, for the arms that all these experiments have."""
    experiments = {name: by_arm(experiment_runs[name]) for name in STARVING}
    tags = ("pama/active_fraction", "pama/rms")
    shared = [arm for arm in experiments["conflict"] if all(arm in arms for arms in experiments.values())]
    rows = []
    for arm in shared:
        series = [[run.scalars[tag] for run in arms[arm]] for tag in tags for arms in experiments.values()]
        rows.append([arm, *(f"{statistics.fmean(map(whole_mean, values)):.2f}" for values in series)])
    columns = [f"{what}, {count}" for what in ("active fraction", "rms") for count in ("two", "three", "four")]
    caption = (
        "Two: the conflicting pair. Mean over the run: share of tokens with an advantage other than 0, and root mean "
        "square of the combined advantage over all tokens."
    )
    return Grid("starving", ["arm", *columns], rows, caption)


def quality_table(experiment_runs: dict[str, list[Run]]) -> Grid:
    """Quality of the reward models and of the judge on held-out reviews, measured by prepare.py."""
    measured = {name: json.loads((RESULTS / name / "quality.json").read_text()) for name in experiment_runs}
    keys = dict.fromkeys(key for quality in measured.values() for key in quality)
    rows = [[key, *(f"{quality[key]:g}" for quality in measured.values())] for key in keys]
    return Grid("quality", ["", *measured], rows)


def time_table(experiment_runs: dict[str, list[Run]]) -> Grid:
    """Duration of the runs; the text of RESULTS.md states how many ran at a time."""
    rows = []
    for name, runs in experiment_runs.items():
        seconds = [json.loads((run.folder / "result.json").read_text())["seconds"] for run in runs]
        steps = f"{min(run.steps for run in runs)}"
        rows.append([name, str(len(runs)), steps, f"{statistics.median(seconds):.0f}", f"{sum(seconds) / 3600:.1f}"])
    return Grid("time", ["experiment", "runs", "steps", "median, s", "together, h"], rows)


def tables(name: str, runs: list[Run]) -> dict[str, str]:
    """Block name → Markdown. Also draws the figures into the results folder."""
    names, experiment = shared_objectives(runs), EXPERIMENTS[name]
    reference = [experiment.reference[objective] for objective in names]
    grids = {
        "objectives": objectives_table(runs),
        "runs": arms_table(runs),
        "front": front_table(runs, names, reference),
        "conflict": conflict_table(runs),
        "equal-kl": equal_kl_table(runs),
        "changes": changes_table(runs, names),
        "correlations": correlations_table(runs),
    }
    for baseline in experiment.baselines:
        grids[f"against-{baseline}"] = differences_table(runs, names, baseline)
        grids[f"faster-than-{baseline}"] = differences_table(runs, names, baseline, whole_mean, "mean over all steps")
    for picture, figure in (("curves", draw_curves(runs)), ("front", draw_front(runs, names, reference))):
        figure.savefig(RESULTS / f"{name}-{picture}.png", dpi=80)
        pyplot.close(figure)
    return {f"{name}-{key}": markdown(grid) for key, grid in grids.items()}


def render(page: str) -> str:
    """The page with updated tables. Also draws the figures into the results folder."""
    runs_of = {}
    for name in ("pilot", *EXPERIMENTS):
        # Unfinished runs have logs but no result, and are excluded.
        if folders := [file.parent for file in sorted((RESULTS / name).glob("*/result.json"))]:
            runs_of[name] = find_runs(folders)[0]
    blocks = {"pilot": markdown(objectives_table(runs_of.pop("pilot", [])))}
    blocks |= {"time": markdown(time_table(runs_of)), "quality": markdown(quality_table(runs_of))}
    if runs_of.keys() >= {*STARVING}:
        blocks["starving"] = markdown(starving_table(runs_of))
    for name, runs in runs_of.items():
        blocks |= tables(name, runs)
    page_blocks = {match["name"] for match in BLOCK.finditer(page)}
    missing = {name for name in runs_of if not any(block.startswith(name) for block in page_blocks)}
    if unknown := sorted(page_blocks - set(blocks)) + sorted(missing):
        raise SystemExit(f"RESULTS.md and results/ must go together, found no match for {', '.join(unknown)}")
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match['name']]}{match[3]}", page)


if __name__ == "__main__":
    results = HERE / "RESULTS.md"
    results.write_text(render(results.read_text()))

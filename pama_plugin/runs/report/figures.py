"""The figures of a report: curves with bands over seeds, and the final rewards of the arms."""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")  # no display on a cluster

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pama_plugin.batch.keys import ACTIVE, COEFFICIENT, CONFLICT, COSINE, GAIN, KL, PAMA, REWARD
from pama_plugin.runs.logs import Run
from pama_plugin.runs.report.front import find_front
from pama_plugin.runs.report.pareto import by_arm, ends, interval, moving_average, nondominated, starts
from pama_plugin.runs.report.tables import OF_THE_HOST

AS_TEXT = matplotlib.rc_context({"text.parse_math": False})  # names of rules and folders may have dollar signs


@AS_TEXT
def draw_curves(runs: Sequence[Run]) -> Figure:
    """A panel per logged metric: reward, coefficient, gain, cosine, conflict rate, KL, length, entropy and others."""
    names = list(dict.fromkeys(name for run in runs for name in run.scored))
    per_objective = (REWARD, COEFFICIENT, GAIN, COSINE)
    wanted = [f"{key}{name}" for key in per_objective for name in names]
    wanted += [CONFLICT, ACTIVE, *OF_THE_HOST]
    tags = [tag for tag in wanted if any(run.scalars.get(tag) for run in runs)]
    columns = 3
    rows = -(-len(tags) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 2.6 * rows + 0.5), layout="constrained", squeeze=False
    )
    for tag, panel in zip(tags, panels.flat):
        for index, (arm, arm_runs) in enumerate(by_arm(runs).items()):
            style: dict[str, Any] = {"color": f"C{index % 10}", "ls": ["-", "--", ":", "-."][index // 10 % 4]}
            _band(panel, [run.scalars[tag] for run in arm_runs if run.scalars.get(tag)], _label(arm), style)
        # Limit the axis to the curves: the band of two seeds is often much wider.
        drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in panel.lines])
        drawn = drawn[np.isfinite(drawn)]
        if len(drawn):
            margin = 0.08 * (drawn.max() - drawn.min()) or 0.1
            panel.set_ylim(drawn.min() - margin, drawn.max() + margin)
        panel.set_title(OF_THE_HOST.get(tag, tag.removeprefix(PAMA)))
        panel.set_xlabel("step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels.flat[len(tags) :]:
        panel.remove()
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _band(panel: Axes, series: list[list[tuple[int, float]]], label: str, style: dict[str, Any]) -> None:
    """Plot the mean over seeds at the steps that all have, with its 95 % interval if there are several seeds."""
    if not series:
        return
    steps, smooth = moving_average(series)
    panel.plot(steps, smooth.mean(0), label=label, **style)
    if len(smooth) > 1:
        halves = np.array([interval(column.tolist()).half for column in smooth.T])
        panel.fill_between(
            steps, smooth.mean(0) - halves, smooth.mean(0) + halves, color=style["color"], alpha=0.15, lw=0
        )
    elif len(steps) < len(series[0]):
        panel.plot(*zip(*series[0]), alpha=0.25, **style)


@AS_TEXT
def draw_paths(runs: Sequence[Run], names: Sequence[str]) -> Figure | None:
    """The way of each arm through the space of rewards, coloured by step, and each reward against the distance.

    Two objectives have one panel for all arms, with the front of the final rewards of several arms. More objectives
    have parallel coordinates, one panel per arm: a line is a part of the run, and its heights are the rewards, from the
    lowest (0) to the highest (1) of any arm. A reward is drawn against ``pama/kl_response`` if the runs had a reference
    model. Arms whose runs have no step in common are left out.

    Returns:
        None if no arm is left.
    """
    paths = {arm: _path(arm_runs, names) for arm, arm_runs in by_arm(runs).items()}
    paths = {arm: path for arm, path in paths.items() if path[0]}
    arms = {arm: arm_runs for arm, arm_runs in by_arm(runs).items() if arm in paths}
    if not arms:
        return None
    with_distance = all(run.scalars.get(KL) for arm_runs in arms.values() for run in arm_runs)
    spaces = 1 if len(names) == 2 else len(paths)
    panels_needed = spaces + with_distance * len(names)
    columns = min(panels_needed, 3)
    rows = -(-panels_needed // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 4 * rows + 0.5), layout="constrained", squeeze=False
    )
    panels = iter(grid.flat)
    # The path of an arm with several seeds is their mean, which arrives nowhere.
    single = {arm: find_front(arm_runs[0]) for arm, arm_runs in arms.items() if len(arm_runs) == 1}
    arrivals = {arm: front.step for arm, front in single.items() if front and front.step is not None}
    low = np.min([rewards.min(0) for _, rewards in paths.values()], axis=0)
    high = np.max([rewards.max(0) for _, rewards in paths.values()], axis=0)
    last = max(steps[-1] for steps, _ in paths.values())
    colours, scale = pyplot.get_cmap("viridis"), Normalize(1, last)
    space = next(panels) if len(names) == 2 else None
    for index, (arm, (steps, rewards)) in enumerate(paths.items()):
        panel = space or next(panels)
        shades = [colours(scale(step)) for step in steps]
        if space is not None:
            start = starts(arms[arm], names)
            panel.plot(*np.vstack([start, rewards]).T, color=f"C{index % 10}", lw=0.8, label=_label(arm))
            panel.scatter(*rewards.T, c=shades, s=14, zorder=2)
            panel.plot(*start, "k*", zorder=3)
            for step, point in zip(steps, rewards):
                if step == arrivals.get(arm):
                    panel.plot(*point, "o", color="k", mfc="none", ms=11)
                    offset, side = ((-9, 7), "right") if point[0] > (low[0] + high[0]) / 2 else ((9, 7), "left")
                    text = f"at the front, step {step}"
                    panel.annotate(text, point, offset, textcoords="offset points", ha=side)
        else:
            scaled = (rewards - low) / np.where(high > low, high - low, 1)
            for heights, shade in zip(scaled, shades):
                panel.plot(range(len(names)), heights, color=shade, lw=0.9)
            panel.set_xticks(range(len(names)), names)
            panel.set_title(_label(arm))
    if space is not None:
        space.set_xlabel(names[0])
        space.set_ylabel(names[1])
        space.set_title("from step 1 (*), moving averages")
        if len(paths) > 1:
            finals = np.array([ends(arm_runs, names).mean(0) for arm_runs in arms.values()])
            front = finals[nondominated(finals)]
            front = front[front[:, 0].argsort()]
            space.step(*front.T, "k--", where="pre", lw=0.9, label="front of the final rewards")
    figure.colorbar(ScalarMappable(scale, colours), ax=grid.flat[spaces - 1], label="step")
    if with_distance:
        for name in names:
            panel = next(panels)
            for index, (arm, arm_runs) in enumerate(arms.items()):
                steps, distances = _path(arm_runs, [name], KL)
                panel.plot(distances[:, 1], distances[:, 0], color=f"C{index % 10}", lw=0.8, label=_label(arm))
                panel.scatter(distances[:, 1], distances[:, 0], c=[colours(scale(step)) for step in steps], s=14)
            panel.set_xlabel("nats from the reference, per response")
            panel.set_ylabel(name)
            panel.set_title(f"{name} against distance")
    for panel in panels:
        panel.remove()
    if len(paths) > 1:
        handles = (space or grid.flat[-1]).get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=2 * columns, frameon=False)
    return figure


def _path(runs: Sequence[Run], names: Sequence[str], *tags: str) -> tuple[list[int], np.ndarray]:
    """Steps and (steps, names and tags) rewards and metrics, smoothed, as mean over seeds, where all have them."""
    wanted = [*(f"{REWARD}{name}" for name in names), *tags]
    steps, smooth = moving_average([run.scalars[tag] for run in runs for tag in wanted])
    return steps, smooth.reshape(len(runs), len(wanted), -1).mean(0).T


def _label(arm: str) -> str:
    return f" {arm}" if arm.startswith("_") else arm  # legends leave out what starts with an underscore


@AS_TEXT
def draw_front(runs: Sequence[Run], names: Sequence[str], reference: Sequence[float]) -> Figure:
    """A panel per pair of objectives: final rewards of each arm, 95 % intervals, filled if no arm dominates it."""
    pairs = [(a, b) for a in range(len(names)) for b in range(a + 1, len(names))]
    figure, panels = pyplot.subplots(1, len(pairs), figsize=(5 * len(pairs), 4.6), layout="constrained", squeeze=False)
    arms = by_arm(runs)
    points = {arm: ends(arm_runs, names) for arm, arm_runs in arms.items()}
    kept = nondominated(np.array([rewards.mean(0) for rewards in points.values()]))
    for (a, b), panel in zip(pairs, panels.flat):
        for index, (arm, rewards) in enumerate(points.items()):
            x, y = interval(rewards[:, a].tolist()), interval(rewards[:, b].tolist())
            bars = {"xerr": x.half, "yerr": y.half} if x.n > 1 else {}
            face = f"C{index % 10}" if kept[index] else "white"
            style = {"fmt": "os^Dv"[index // 10 % 5], "color": f"C{index % 10}", "mfc": face, "elinewidth": 0.8}
            panel.errorbar(x.mean, y.mean, **bars, **style, label=_label(arm))
        start = starts(runs, names)
        panel.plot(start[a], start[b], "k*", label="start")
        panel.plot(reference[a], reference[b], "k+", label="reference")
        panel.set_xlabel(names[a])
        panel.set_ylabel(names[b])
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure

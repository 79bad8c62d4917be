"""One policy with every preference: its held-out rewards with each of the weights, from the evaluations of a run."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import pyplot
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from pama_plugin.batch.keys import AT_PREFERENCE, FOLLOWED, label
from pama_plugin.errors import ConfigError
from pama_plugin.runs.logs import Run
from pama_plugin.runs.report.figures import AS_TEXT
from pama_plugin.runs.report.pareto import indicators, nondominated
from pama_plugin.runs.report.tables import Grid
from pama_plugin.runs.rollouts import SETTINGS
from pama_plugin.settings.load import load_config


class Steering(NamedTuple):
    """The mean rewards on held-out prompts with each of L preferences, in the first and the last evaluation of a run.

    Attributes:
        run: the name of the run.
        names: the trained objectives.
        steps: of the two evaluations.
        weights_LK: the preferences.
        means_2LK: the mean rewards.
        errors_LK: the standard errors of the last ones; NaN if they are not known.
        follows_K: Spearman's rank correlation of the last mean rewards with the weights; NaN if it is not known.
    """

    run: str
    names: tuple[str, ...]
    steps: tuple[int, int]
    weights_LK: np.ndarray
    means_2LK: np.ndarray
    errors_LK: np.ndarray
    follows_K: np.ndarray


def read_steering(run: Run) -> Steering | None:
    """What the evaluations of a run with --pama.preferences found; None if it has none.

    Raises:
        ConfigError: the settings of the run, which name the objectives in the order of the weights, cannot be read.
    """
    prefix = f"eval/{AT_PREFERENCE}"
    if not any(tag.startswith(prefix) for tag in run.scalars):
        return None
    files = sorted(run.folder.rglob(SETTINGS), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(f"{run.folder}: its evaluations have preferences, but there is no {SETTINGS} of the run")
    config = load_config(None, [], str(files[-1]), None, None, default_level="token")
    names, preferences = config.trained_names, config.evaluated_preferences

    def read(name: str, end: str, last: bool) -> list[float]:
        series = [run.scalars.get(f"{prefix}{label(each)}/{name}{end}", [(0, np.nan)]) for each in preferences]
        return [points[-1 if last else 0][1] for points in series]

    steps = sorted({step for tag, series in run.scalars.items() if tag.startswith(prefix) for step, _ in series})
    return Steering(
        run.name,
        names,
        (steps[0], steps[-1]),
        np.array(preferences),
        np.array([np.array([read(name, "", last) for name in names]).T for last in (False, True)]),
        np.array([read(name, "_se", True) for name in names]).T,
        np.array([run.scalars.get(f"eval/{FOLLOWED}{name}", [(0, np.nan)])[-1][1] for name in names]),
    )


def steering_tables(found: Sequence[Steering]) -> list[Grid]:
    """A table for all runs with the same objectives."""
    return [
        _table(names, [each for each in found if each.names == names])
        for names in dict.fromkeys(each.names for each in found)
    ]


def _table(names: tuple[str, ...], found: Sequence[Steering]) -> Grid:
    """Run × preference: the mean rewards; below them the rank correlations and the hypervolume of the whole front.

    The reference point of the hypervolume is the lowest mean of each objective in any first evaluation, so that of
    several runs the same.
    """
    reference = np.nanmin([np.nanmin(each.means_2LK[0], axis=0) for each in found], axis=0)
    rows = []
    for each in found:
        for weights, means, errors in zip(each.weights_LK, each.means_2LK[1], each.errors_LK):
            cells = [f"{m:.3f}" if np.isnan(e) else f"{m:.3f} ± {e:.3f}" for m, e in zip(means, errors)]
            rows.append([each.run, ", ".join(f"{weight:.3g}" for weight in weights), *cells, "–"])
        follows = ["–" if np.isnan(value) else f"{value:.2f}" for value in each.follows_K]
        fronts = [means[~np.isnan(means).any(1)] for means in each.means_2LK]
        volumes = [indicators(front, front, reference.tolist()).hypervolume if len(front) else 0.0 for front in fronts]
        rows.append([each.run, "follows its weight", *follows, " → ".join(f"{volume:.3g}" for volume in volumes)])
    return Grid(
        "preferences",
        ["run", f"weights of {', '.join(names)}", *names, "hypervolume"],
        rows,
        "Mean reward on held-out prompts in the last evaluation, ± standard error over prompts. Follows its weight: "
        "Spearman's rank correlation between weight and mean reward. Hypervolume: of the first and the last "
        f"evaluation, above {', '.join(f'{name} {value:.3f}' for name, value in zip(names, reference))}.",
    )


@AS_TEXT
def draw_steering(found: Sequence[Steering]) -> Figure:
    """A panel per run and pair of objectives: the mean rewards with each preference, coloured by the weight of one."""
    pairs = [(each, a, b) for each in found for a in range(len(each.names)) for b in range(a + 1, len(each.names))]
    columns = min(len(pairs), 3)
    rows = -(-len(pairs) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 4.2 * rows), layout="constrained", squeeze=False
    )
    colours = pyplot.get_cmap("viridis")
    for (each, a, b), panel in zip(pairs, panels.flat):
        first, last = each.means_2LK[..., [a, b]]
        shades = [colours(weight) for weight in each.weights_LK[:, a]]
        panel.plot(*first.T, "x", color="0.6", label=f"step {each.steps[0]}")
        known = last[~np.isnan(last).any(1)]
        front = known[nondominated(known)] if len(known) else known
        panel.plot(*front[front[:, 0].argsort()].T, color="0.8", lw=0.9, zorder=0)
        panel.errorbar(*last.T, *each.errors_LK[:, [b, a]].T, fmt="none", ecolor="0.7", elinewidth=0.8)
        panel.scatter(*last.T, c=shades, s=36, zorder=2, label=f"step {each.steps[1]}")
        panel.set_xlabel(each.names[a])
        panel.set_ylabel(each.names[b])
        panel.set_title(each.run)
        panel.legend(frameon=False)
        figure.colorbar(ScalarMappable(Normalize(0, 1), colours), ax=panel, label=f"weight of {each.names[a]}")
    for panel in panels.flat[len(pairs) :]:
        panel.remove()
    return figure

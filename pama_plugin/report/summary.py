"""What a run did to each objective: start against end with standard errors, and the curves."""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")  # no display on a cluster

from matplotlib import pyplot
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pama_plugin.errors import ConfigError

Series = list[tuple[int, float]]

# The start and the end of a run are its first and last tenth.
TENTH = 0.1


class Mean(NamedTuple):
    """Mean of per-step means over some steps, and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def mean_of(values: list[float]) -> Mean:
    """Mean and standard error, the sample standard deviation over √n; one value alone has no error to state.

    >>> print(mean_of([1.0, 2.0, 3.0]))
    2.000 ± 0.577
    """
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return Mean(statistics.fmean(values), spread / math.sqrt(len(values)))


def read_scalars(folder: Path) -> dict[str, Series]:
    """Every scalar of the newest run in a ``--logger.tensorboard_dir``, without the host's prefix ``train/``.

    Raises:
        ConfigError: the folder has no event file, or none of a run with objectives.
    """
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ConfigError(f"no TensorBoard events in {folder}: give the folder that --logger.tensorboard_dir named")
    events = EventAccumulator(str(files[-1]), size_guidance={"scalars": 0})  # 0: keep every step
    events.Reload()
    tags = events.Tags()["scalars"]
    if not any(tag.startswith("train/pama/coefficient/") for tag in tags):
        raise ConfigError(f"{files[-1]} is not the log of a run with --loss: it has no pama/coefficient/<name>")
    return {tag.removeprefix("train/"): [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def names_in(scalars: dict[str, Series]) -> list[str]:
    """The objectives, sorted: the host logs its metrics in an order of its own, another one in each run."""
    prefix = "pama/coefficient/"
    return sorted(tag.removeprefix(prefix) for tag in scalars if tag.startswith(prefix))


def start_and_end(series: Series) -> tuple[Mean, Mean]:
    """The first and the last tenth of the steps, at least one step each."""
    values = [value for _, value in series]
    count = max(1, math.floor(len(values) * TENTH))
    return mean_of(values[:count]), mean_of(values[-count:])


def table_of(scalars: dict[str, Series]) -> Table:
    """One row per objective: mean of its reward over the steps ± standard error, and run means of its share and gain.

    ``rise/s.e.`` is the difference of the two means over its own standard error.
    """
    steps = max(len(series) for series in scalars.values())
    table = Table(padding=(0, 0), title=f"{steps} steps, each a rollout batch")
    for heading in ("objective", "first 10 %", "last 10 %", "rise/s.e.", "coefficient", "gain"):
        table.add_column(heading, justify="left" if heading == "objective" else "right", no_wrap=True)
    for name in names_in(scalars):
        start, end = start_and_end(scalars[f"reward/{name}"])
        error = math.hypot(start.error, end.error)
        rise = f"{(end.value - start.value) / error:+.1f}" if error > 0 else "–"
        shares = [mean_of([value for _, value in scalars[f"pama/{key}/{name}"]]) for key in ("coefficient", "gain")]
        table.add_row(name, str(start), str(end), rise, *(f"{share.value:.3f}" for share in shares))
    whole_run = {
        key: mean_of([value for _, value in scalars[f"pama/{key}"]]).value
        for key in ("active_fraction", "conflict_rate", "rms")
    }
    table.caption = "over the run: " + ", ".join(
        f"{key.replace('_', ' ')} {value:.3f}" for key, value in whole_run.items()
    )
    return table


def draw(scalars: dict[str, Series], png: Path) -> None:
    """One panel per objective's reward, one for the coefficients, one for active fraction and conflict rate."""
    names = names_in(scalars)
    figure, panels = pyplot.subplots(1, len(names) + 2, figsize=(3.4 * (len(names) + 2), 3), layout="constrained")
    for name, panel in zip(names, panels):
        panel.plot(*zip(*scalars[f"reward/{name}"]), color="tab:blue")
        panel.set_title(f"reward/{name}")
    for name in names:
        panels[-2].plot(*zip(*scalars[f"pama/coefficient/{name}"]), label=name)
    for key in ("active_fraction", "conflict_rate"):
        panels[-1].plot(*zip(*scalars[f"pama/{key}"]), label=key.replace("_", " "))
    panels[-2].set_title("coefficients")
    panels[-1].set_title("share of tokens")
    for panel in panels:
        panel.set_xlabel("step")
    for panel in panels[-2:]:
        panel.set_ylim(0, 1)
        panel.legend()
    figure.savefig(png, dpi=120)
    pyplot.close(figure)


def report_run(folder: Path, png: Path | None = None) -> None:
    """Print the table, write the picture (``curves.png`` in the folder unless told) and say where it is."""
    scalars = read_scalars(folder)
    png = png or folder / "curves.png"
    draw(scalars, png)
    console = Console()
    console.print(table_of(scalars))
    console.print(f"curves  {png}\nlogs    {folder}", soft_wrap=True)

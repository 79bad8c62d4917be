"""What is each rule good for? Small policies, trained with every rule on rewards whose structure is known.

    pip install ".[report,gram]"
    python examples/toys.py                              all rules and tasks, two minutes on two cores
    python examples/toys.py --rules linear my_rule --tasks "K=4" exploit --seeds 20

A policy writes twelve words, each from a table of twelve logits of its own. A step has 64 responses, in groups of eight
that are compared as by OpenRLHF's reinforce_baseline: minus the mean of the group, whitened over the batch. Adam
updates the logits, 80 times. Rewards are sums over the words unless a task says otherwise, and rises are in standard
deviations of the reward at the start. The figures are for the objective that rises least: at six nats from the start,
where rules are at the same distance whatever the size of their steps, and after the last step.

Tasks: K=2, K=4 and K=8 have independent rewards, or, with ρ, rewards of which any two correlate. shares: the share of
the words of each objective's class; a quarter of the words has none. noise: the last of two rewards has noise of four
standard deviations, which rises do not count. scale: the last of two is multiplied by 20. exploit: one of the first
words adds ten standard deviations to the last reward and takes two from the other. concave: squared shares, so that
mixing loses. Rules with constraints maximise the first objective and must keep the others at their means at the start.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import tqdm

from pama_plugin import aggregate, available_rules
from pama_plugin.aggregation import get_rule
from pama_plugin.runs.report.pareto import interval
from pama_plugin.stationarity import estimate

PLACES, WORDS = 12, 12
GROUPS, SAMPLES = 8, 8
STEPS, EVERY = 80, 4  # evaluated every 4 steps
LR = 0.08
EVALUATED = 2048  # responses
NATS = 6.0
AT_NATS = f"rise of the objective that rose least, at {NATS:g} nats"

Score = Callable[[Tensor], Tensor]  # words (B, PLACES) → rewards (K, B), without noise


class Task(NamedTuple):
    """Rewards, and what spoils them.

    Attributes:
        objectives: K.
        make: draws the rewards of one seed.
        noise: of the last reward, in its standard deviations.
        scale: factor of the last reward.
        exploit: one of the twelve first words adds this number of standard deviations to the last reward, and takes two
            from each of the others.
    """

    objectives: int
    make: Callable[[int, torch.Generator], Score]
    noise: float = 0.0
    scale: float = 1.0
    exploit: float = 0.0


def correlated(rho: float) -> Callable[[int, torch.Generator], Score]:
    """Sums over the words of independent normal tables; the tables of any two objectives correlate by ``rho``."""

    def make(objectives: int, generator: torch.Generator) -> Score:
        wanted_KK = torch.eye(objectives).double() * (1 - rho) + rho
        values_K, vectors_KK = torch.linalg.eigh(wanted_KK)  # at the lowest possible rho, one value is 0
        root_KK = vectors_KK * values_K.clamp(min=0).sqrt()
        normal_KPV = torch.randn(objectives, PLACES, WORDS, generator=generator, dtype=torch.float64)
        table_KPV = torch.einsum("ij,jpv->ipv", root_KK, normal_KPV)
        return lambda words_BP: table_KPV[:, torch.arange(PLACES), words_BP].sum(-1)

    return make


def concave(objectives: int, generator: torch.Generator) -> Score:
    """The squared share of the words of each objective's class: mixing loses, so sums of rewards go to an end."""
    class_V = torch.randperm(WORDS, generator=generator) % objectives
    return lambda words_BP: torch.stack(
        [(class_V[words_BP] == k).double().mean(-1).square() for k in range(objectives)]
    )


def shares(objectives: int, generator: torch.Generator) -> Score:
    """The share of the words of each objective's class. A quarter of the words belongs to no class."""
    class_V = torch.randperm(WORDS, generator=generator) % (objectives + max(objectives // 3, 1))
    return lambda words_BP: torch.stack([(class_V[words_BP] == k).double().mean(-1) for k in range(objectives)])


TASKS = {
    "K=2": Task(2, correlated(0.0)),
    "K=2 ρ=−.9": Task(2, correlated(-0.9)),
    "K=4": Task(4, correlated(0.0)),
    "K=4 ρ=−.3": Task(4, correlated(-0.3)),
    "K=8": Task(8, correlated(0.0)),
    "K=8 ρ=−.13": Task(8, correlated(-0.13)),
    "K=4 shares": Task(4, shares),
    "noise": Task(2, correlated(0.0), noise=4.0),
    "scale": Task(2, correlated(0.0), scale=20.0),
    "exploit": Task(2, correlated(0.0), exploit=10.0),
    "concave": Task(2, concave),
}

# Rules with settings of their own, and settings of a rule that are a rule of their own here.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pama, Noon": ("pama", dict(noon=True)),
    "gdpo, as published": ("gdpo", dict(whiten_sum=True)),
    "gram:upgrad, balance=½": ("gram:upgrad", dict(balance=0.5)),
}


class Walk(NamedTuple):
    """One training run: at every evaluation, the distance from the start, the rises, and the share of exploits."""

    nats: list[float]
    rises: list[list[float]]
    exploits: list[float]

    def rises_at(self, nats: float) -> list[float]:
        """Interpolated where the run first reaches the distance, or as it ended."""
        for index in range(1, len(self.nats)):
            if self.nats[index] >= nats:
                share = (nats - self.nats[index - 1]) / (self.nats[index] - self.nats[index - 1])
                pairs = zip(self.rises[index - 1], self.rises[index])
                return [before + share * (after - before) for before, after in pairs]
        return self.rises[-1]


def train(task: Task, rule: str, options: dict[str, Any], seed: int) -> Walk:
    generator = torch.Generator().manual_seed(seed)
    score = task.make(task.objectives, generator)
    scale_K1 = torch.ones(task.objectives, 1, dtype=torch.float64)
    scale_K1[-1] = task.scale
    logits_PV = torch.zeros(PLACES, WORDS, dtype=torch.float64)
    optimizer = torch.optim.Adam([logits_PV], lr=LR, betas=(0.9, 0.95))
    groups_B = torch.arange(GROUPS * SAMPLES) // SAMPLES
    start_KB = score(draw(logits_PV, 4 * EVALUATED, generator))
    std_K = start_KB.std(-1)
    bonus_K = std_K * torch.tensor([-2.0] * (task.objectives - 1) + [task.exploit]) * (task.exploit > 0)
    mean_K = start_KB.mean(-1) + bonus_K / WORDS
    thresholds_K = mean_K  # of a rule with constraints: no lower than at the start
    memory_K: Sequence[dict[str, float]] = [{}] * task.objectives
    walk = Walk([], [], [])
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            log_PV = logits_PV.log_softmax(-1)
            walk.nats.append(float((log_PV.exp() * (log_PV + math.log(WORDS))).sum()))
            exploits = float(log_PV[0, 0].exp()) if task.exploit else 0.0
            means_K = score(draw(logits_PV, EVALUATED, generator)).mean(-1) + bonus_K * exploits
            walk.rises.append(((means_K - mean_K) / std_K).tolist())
            walk.exploits.append(exploits)
        if step == STEPS:
            break
        words_BP = draw(logits_PV, GROUPS * SAMPLES, generator)
        rewards_KB = score(words_BP) + bonus_K.unsqueeze(-1) * (words_BP[:, 0] == 0)
        noise_B = torch.randn(len(words_BP), generator=generator, dtype=torch.float64)
        rewards_KB[-1] += task.noise * std_K[-1] * noise_B
        rewards_KB = rewards_KB * scale_K1
        advantages_B, memory_K = combine(
            rule, options, rewards_KB, groups_B, memory_K, thresholds_K * scale_K1.squeeze(-1)
        )

        # ∇ of −mean(A log π): the same A at every place, and ∇ log π = onehot − π.
        onehot_BPV = one_hot(words_BP, WORDS) - logits_PV.softmax(-1)
        logits_PV.grad = -(advantages_B[:, None, None] * onehot_BPV).mean(0)
        optimizer.step()
    return walk


def draw(logits_PV: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, PLACES) words."""
    return torch.multinomial(logits_PV.softmax(-1), count, replacement=True, generator=generator).T


def combine(
    rule: str,
    options: dict[str, Any],
    rewards_KB: Tensor,
    groups_B: Tensor,
    memory_K: Sequence[dict[str, float]],
    thresholds_K: Tensor,
) -> tuple[Tensor, Sequence[dict[str, float]]]:
    """The advantages of a step, and the memory of the rule."""
    chosen, ones_B1 = get_rule(rule), torch.ones(len(groups_B), 1)
    context: dict[str, Any] = {}
    if "memory_K" in chosen.parameters:
        context["memory_K"] = memory_K
    if "rewards_KB" in chosen.parameters:
        context["rewards_KB"] = rewards_KB
    if chosen.constrained:
        violations_K = (thresholds_K - rewards_KB.mean(-1)) / rewards_KB.std(-1).clamp(min=1e-9)
        context["violations_K"] = [None, *violations_K[1:].tolist()]
    values_KB = rewards_KB if chosen.combines == "rewards" else estimate(rewards_KB, SAMPLES)
    result = aggregate(rule, values_KB.unsqueeze(-1), ones_B1, groups_B=groups_B, **context, **options)
    combined_1B = result.advantages.T
    if chosen.combines == "rewards":
        combined_1B = estimate(combined_1B, SAMPLES)
    return combined_1B.squeeze(0), result.memory_K


def run(task: str, rule: str, options: dict[str, Any], seeds: int) -> list[Walk]:
    torch.set_num_threads(1)
    return [train(TASKS[task], rule, options, seed) for seed in range(seeds)]


def main() -> None:
    arms = {rule: (rule, {}) for rule in available_rules()} | VARIANTS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=arms, default=list(arms), metavar="RULE", help=", ".join(arms))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--seeds", type=int, default=5, help="training runs of each rule and task (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/toys"), help="folder of toys.png and toys.json")
    chosen = parser.parse_args()
    walks: dict[tuple[str, str], list[Walk]] = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        waiting = {
            pool.submit(run, task, *arms[rule], chosen.seeds): (rule, task)
            for task in sorted(chosen.tasks, key=lambda task: -TASKS[task].objectives)
            for rule in chosen.rules
        }
        for future in tqdm(as_completed(waiting), total=len(waiting), desc="rules × tasks"):
            walks[waiting[future]] = future.result()
    console = Console()
    console.width = max(console.width, 132 if len(chosen.tasks) > 5 else 80)  # a log has no width
    for title, rises in (
        (AT_NATS, lambda walk: walk.rises_at(NATS)),
        (f"the same after {STEPS} steps", lambda walk: walk.rises[-1]),
    ):
        console.print(make_table(title, chosen.rules, chosen.tasks, walks, rises))
    chosen.out.mkdir(parents=True, exist_ok=True)
    if "exploit" in chosen.tasks:
        taken = {
            rule: sum(walk.exploits[-1] for walk in walks[rule, "exploit"]) / chosen.seeds for rule in chosen.rules
        }
        listed = ", ".join(f"{rule} {share:.0%}" for rule, share in sorted(taken.items(), key=lambda pair: pair[1]))
        console.print(f"exploit, share of responses with the trigger after {STEPS} steps (8% at the start): {listed}")
    draw_ways(walks, chosen.rules, chosen.tasks, chosen.out / "toys.png")
    content = [
        {"rule": rule, "task": task, "runs": [walk._asdict() for walk in found]}
        for (rule, task), found in walks.items()
    ]
    (chosen.out / "toys.json").write_text(json.dumps(content) + "\n")
    console.print(f"{chosen.out / 'toys.png'}   {chosen.out / 'toys.json'}")


def make_table(
    title: str,
    rules: Sequence[str],
    tasks: Sequence[str],
    walks: dict[tuple[str, str], list[Walk]],
    rises: Callable[[Walk], list[float]],
) -> Table:
    worst = {cell: [min(rises(walk)) for walk in found] for cell, found in walks.items()}
    below = {
        cell: sum(rise < 0 for walk in found for rise in rises(walk)) / len(found) for cell, found in walks.items()
    }
    table = Table(
        "rule",
        title=title,
        caption="In standard deviations at the start: mean over seeds, ± half of the 95 % interval; bold: the best "
        "rule, and those whose difference from it, seed by seed, does not exclude 0. ↓: objectives that ended below "
        "their start, mean over seeds. *: not all runs came that far from the start; these count as they ended.",
    )
    for task in tasks:
        table.add_column(task, justify="right")
    best = {task: max((worst[rule, task] for rule in rules), key=sum) for task in tasks}
    for rule in rules:
        cells = []
        for task in tasks:
            here = interval(worst[rule, task])
            behind = interval([other - own for own, other in zip(worst[rule, task], best[task])])
            style = "bold" if not behind.excludes_zero else "dim" if here.mean < 0 else "none"
            short = "*" if title is AT_NATS and any(walk.nats[-1] < NATS for walk in walks[rule, task]) else ""
            lost = f"↓{below[rule, task]:.1f}" if below[rule, task] else ""
            cells.append("\n".join(filter(None, [f"[{style}]{here.mean:.2f}[/]{short}", f"±{here.half:.2f}", lost])))
        table.add_row(rule, *cells)
    return table


def draw_ways(walks: dict[tuple[str, str], list[Walk]], rules: Sequence[str], tasks: Sequence[str], file: Path) -> None:
    """For every task, the rise of the worst objective against the distance."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = min(4, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows + 1), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    colours = pyplot.colormaps["tab20"].resampled(20)
    for axis, task in zip(axes.flat, tasks):
        for index, rule in enumerate(rules):
            points = [[(nats, min(rises)) for nats, rises, _ in zip(*walk)] for walk in walks[rule, task]]
            mean = [[sum(values) / len(points) for values in zip(*evaluation)] for evaluation in zip(*points)]
            line = "-" if index < 20 else "--"
            axis.plot(*zip(*mean), line, color=colours(index % 20), label=rule, linewidth=1.2)
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.axvline(NATS, color="grey", linewidth=0.5, linestyle=":")
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("nats from the start", fontsize=8)
        axis.set_ylabel("rise of the worst (sd)", fontsize=8)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()

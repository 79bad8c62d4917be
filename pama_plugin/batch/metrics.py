"""The metrics of a batch, by their keys in the trackers."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pama_plugin.aggregation import Aggregation
from pama_plugin.batch.gradient_gram import cosines, jackknife, min_norm, unbiased_gram
from pama_plugin.batch.keys import (
    ABSTAINED,
    COEFFICIENT,
    FAILURES,
    FOLLOWS,
    GRADIENT,
    GROUP_CORRELATION,
    PAMA,
    PREFERENCE,
    REWARD,
    SECONDS,
)
from pama_plugin.batch.table import RewardTable
from pama_plugin.settings.run import PamaConfig


def name_metrics(config: PamaConfig, result: Aggregation, steps_done: int) -> dict[str, float]:
    """Metrics of a combination by name: ``gain/1`` → ``pama/gain/<name>``, coefficients, weights with a schedule."""
    names = config.trained_names
    named = {f"{COEFFICIENT}{name}": float(c) for name, c in zip(names, result.coefficients)}
    for key, value in result.metrics.items():
        stem, _, index = key.partition("/")
        of_objective = index.isdecimal() and int(index) < len(names)
        named[f"{PAMA}{stem}/{names[int(index)]}" if of_objective else f"{PAMA}{key}"] = value
    scheduled = [objective for objective in config.trained if objective.weight.shape != "constant"]
    return named | {f"{PAMA}weight/{objective.name}": objective.weight.at(steps_done) for objective in scheduled}


def describe_preferences(
    config: PamaConfig, table: RewardTable, preferences: Sequence[Sequence[float]]
) -> dict[str, float]:
    """The mean preference of the batch, and how its rewards correlate with the preference for them; {} without any."""
    if not preferences:
        return {}
    preferences_KB = torch.tensor(preferences, dtype=torch.float64).T
    metrics = {f"{PREFERENCE}{name}": float(row.mean()) for name, row in zip(config.trained_names, preferences_KB)}
    for name, preference_B in zip(config.trained_names, preferences_KB):
        follows = correlate(preference_B, table.row(name))
        metrics |= {} if math.isnan(follows) else {f"{FOLLOWS}{name}": follows}
    return metrics


def reduce_columns(columns: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    """Reduce each column of a rollout batch to one number, and add the correlations of the rewards of ``names``.

    Failures and abstentions are summed. All other columns are averaged over the responses that have a number. An
    objective that applies to no response has no mean reward, and took no time.
    """
    metrics = {}
    for one, other in itertools.combinations(names, 2):
        correlation = correlate(columns[f"{REWARD}{one}"], columns[f"{REWARD}{other}"])
        if not math.isnan(correlation):
            metrics[f"{PAMA}correlation/{one}/{other}"] = correlation
    for key, column in columns.items():
        if key.startswith((FAILURES, ABSTAINED)):
            metrics[key] = column.sum().item()
        elif not (key.startswith((REWARD, SECONDS)) and column.isnan().all()):
            metrics[key] = column.nanmean().item()
    return metrics


def group_correlations(table: RewardTable, names: Sequence[str]) -> dict[str, float]:
    """Correlations of the rewards of ``names`` within the responses to a prompt, whatever the prompts differ in.

    >>> values_KB = torch.tensor([[1.0, 2.0, 5.0, 7.0], [4.0, 3.0, 9.0, 7.0]])
    >>> table = RewardTable(("a", "b"), values_KB, {}, torch.arange(4), 2, (4,))
    >>> group_correlations(table, ["a", "b"])
    {'pama/group_correlation/a/b': -1.0}
    """
    centred = {name: table.centred(table.row(name)) for name in names}
    pairs = itertools.combinations(names, 2)
    found = {f"{GROUP_CORRELATION}{a}/{b}": correlate(centred[a], centred[b]) for a, b in pairs}
    return {key: correlation for key, correlation in found.items() if not math.isnan(correlation)}


def share_at_best(rewards_B: Tensor) -> float:
    """The share of the responses that have the highest reward of the batch; NaN if all rewards are equal.

    >>> share_at_best(torch.tensor([1.0, 0.5, 1.0, torch.nan]))
    0.6666666666666666
    """
    rewards_B = rewards_B[rewards_B.isfinite()]
    at_best_B = rewards_B == rewards_B.max() if len(rewards_B) else rewards_B
    return math.nan if bool(at_best_B.all()) else float(at_best_B.double().mean())


def correlate(one_B: Tensor, other_B: Tensor) -> float:
    """Pearson correlation over the responses that have both rewards; NaN if one of them is constant.

    >>> round(correlate(torch.tensor([1.0, 2.0, 3.0, torch.nan]), torch.tensor([2.0, 4.0, 3.0, 0.0])), 6)
    0.5
    """
    pairs_2N = torch.stack([one_B, other_B]).double()
    pairs_2N = pairs_2N[:, pairs_2N.isfinite().all(0)]
    if pairs_2N.shape[1] < 2 or (pairs_2N.amin(1) == pairs_2N.amax(1)).any():
        return math.nan
    return float(torch.corrcoef(pairs_2N)[0, 1])


def spearman(one_N: Tensor, other_N: Tensor) -> float:
    """Spearman's rank correlation over the entries that both have, with mean ranks for ties; NaN if one is constant.

    >>> round(spearman(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([3.0, 1.0, 9.0])), 6)
    0.5
    """
    both_N = one_N.isfinite() & other_N.isfinite()
    return correlate(*(_ranks(values_N[both_N]) for values_N in (one_N, other_N)))


def _ranks(values_N: Tensor) -> Tensor:
    below_N = (values_N.unsqueeze(0) < values_N.unsqueeze(1)).sum(1)
    return below_N + ((values_N.unsqueeze(0) == values_N.unsqueeze(1)).sum(1) - 1) / 2


def describe_gradients(products_MJMJ: Tensor, names: Sequence[str]) -> dict[str, float]:
    """What ``--pama.probe_gradients`` logs: see "What it logs" in runs/README.md. What is undefined is left out.

    Args:
        products_MJMJ: products of gradients in M blocks; gradient 0 of J = K + 1 is that of the combination.
        names: of the K objectives.
    """
    found: dict[str, float] = {}
    for name, cosine in zip(names, jackknife(products_MJMJ, cosines), strict=True):
        found |= {f"cosine/{name}": cosine.value, f"cosine_error/{name}": cosine.error}
    gram_JJ = unbiased_gram(products_MJMJ)
    for (i, one), (j, other) in itertools.combinations_with_replacement(enumerate(names, 1), 2):
        found[f"gram/{one}" if i == j else f"gram/{one}/{other}"] = float(gram_JJ[i, j])
    least = min_norm(products_MJMJ[:, 1:, :, 1:], draws=0)
    found |= {"min_norm": least.value, "min_norm_floor": least.floor}
    return {f"{GRADIENT}{key}": value for key, value in found.items() if not math.isnan(value)}


def explained_variance(returns_N: Tensor, values_N: Tensor) -> float:
    """``1 − Var(R − V) / Var(R)`` over tokens; NaN if the returns are constant.

    >>> explained_variance(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]))
    1.0
    """
    returns_N, values_N = returns_N.double(), values_N.double()
    if len(returns_N) < 2 or returns_N.std() <= 1e-6 * returns_N.abs().max():  # constant up to rounding
        return math.nan
    return float(1 - (returns_N - values_N).var() / returns_N.var())

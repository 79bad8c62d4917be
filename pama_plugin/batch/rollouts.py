"""The log of rollouts: what the policy wrote in a step, and what every reward said of it; and one line per step."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from pama_plugin.aggregation import Aggregation
from pama_plugin.batch.keys import (
    ACTIVE,
    ALL,
    AT_PREFERENCE,
    COEFFICIENT,
    CONFLICT,
    FOLLOWED,
    KL,
    OVER_ALL,
    REFERENCE_NLL,
    REWARD,
    label,
)
from pama_plugin.batch.table import RewardTable
from pama_plugin.settings.run import PamaConfig

Row = dict[str, Any]


def choose_responses(prompts: Sequence[str], order: Sequence[int], count: int | Literal["all"]) -> list[int]:
    """Positions of the responses to log, all of one prompt after the other.

    Prompts are ordered by a hash, so that a prompt that is chosen is chosen again when it returns in another epoch.

    Args:
        prompts: the prompt of each response.
        order: position of each response in the rollout.
        count: number of responses, or ``all``.

    >>> choose_responses(["x", "y", "x", "y"], [0, 2, 1, 3], 3)
    [0, 2, 1]
    """
    hashes = {prompt: hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest() for prompt in set(prompts)}
    ranked = sorted(range(len(prompts)), key=lambda response: (hashes[prompts[response]], order[response]))
    return ranked if count == "all" else ranked[:count]


def describe_responses(
    config: PamaConfig,
    table: RewardTable,
    result: Aggregation,
    mask_BA: Tensor,
    distances: Mapping[str, Tensor],
    chosen: Sequence[int],
    steps_done: int,
    preferences: Sequence[Sequence[float]] = (),
) -> list[Row]:
    """One JSON object per chosen response, without its texts.

    Args:
        config: the objectives and their weights.
        table: the rewards and the reasons for missing ones.
        result: the combination, with the advantage of every token.
        mask_BA: true at tokens of the responses.
        distances: (B,) nats from the reference and its mean negative log-likelihood per token, if there is one.
        chosen: positions of the responses.
        steps_done: number of steps before this one.
        preferences: of each response, if prompts have them.
    """
    weights_KB = config.weights_with(preferences, steps_done)
    coefficients = dict(zip(config.trained_names, map(_number, result.coefficients.tolist())))
    advantages_B = (result.advantages * mask_BA).sum(1) / mask_BA.sum(1)
    rows = describe_rewards(config, table, chosen, weights_KB)
    for row, response in zip(rows, chosen):
        row |= {
            "step": steps_done + 1,
            "coefficients": coefficients,
            "advantage": _number(float(advantages_B[response])),
            "tokens": int(mask_BA[response].sum()),
        } | {key: _number(float(values_B[response])) for key, values_B in distances.items()}
    return rows


def describe_rewards(config: PamaConfig, table: RewardTable, chosen: Sequence[int], weights_KB: Tensor) -> list[Row]:
    """The rewards of each chosen response, the reasons for missing ones, and its weights (K, 1) or (K, B)."""
    weights_KB = weights_KB.expand(-1, len(table.order_B))
    rows = []
    for response in chosen:
        rewards = dict(zip(table.names, table.values_KB[:, response].tolist()))
        problems = {name: table.problems[name, response] for name in rewards if (name, response) in table.problems}
        rows.append(
            {
                "sample": int(table.order_B[response]),
                "rewards": {name: _number(reward) for name, reward in rewards.items()},
                "problems": problems,
                "weights": dict(zip(config.trained_names, map(_number, weights_KB[:, response].tolist()))),
            }
        )
    return rows


def _number(value: float) -> float | None:
    """Six digits; None for what JSON cannot represent."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def evaluation_table(config: PamaConfig, step: int, metrics: Mapping[str, float]) -> str:
    """Mean ± standard error of every objective on held-out prompts, with each preference if prompts have them."""
    places = {ALL: OVER_ALL}
    if config.preferences is not None:
        places = {label(each): f"{AT_PREFERENCE}{label(each)}/" for each in config.evaluated_preferences}
    rows = [["weights of " + ", ".join(config.trained_names) if config.preferences else "data sets", *config.names]]
    for place, prefix in places.items():
        cells = [(metrics.get(f"{prefix}{name}"), metrics.get(f"{prefix}{name}_se")) for name in config.names]
        rows.append([place.replace("_", ", "), *("–" if mean is None else _with_error(mean, se) for mean, se in cells)])
    if config.preferences is not None:
        follows = [metrics.get(f"{FOLLOWED}{name}") for name in config.names]
        rows.append(["rank correlation with weight", *("–" if rho is None else f"{rho:.2f}" for rho in follows)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(f"PAMA evaluation, step {step}  {line}" for line in lines)


def _with_error(mean: float, error: float | None) -> str:
    return f"{mean:.3g}" if error is None or math.isnan(error) else f"{mean:.3g} ± {error:.2g}"


def step_line(config: PamaConfig, step: int, steps: int | None, metrics: Mapping[str, float], *, colours: bool) -> str:
    """One line about a step, for people: rewards with the shares of the objectives, conflict, distance.

    >>> from pama_plugin.settings.load import load_config
    >>> config = load_config("pama", ["a=builtin:length"], None, None, None, default_level="token")
    >>> metrics = {"reward/a": 1.25, "pama/coefficient/a": 1.0, "pama/kl_response": 0.5, "pama/reference_nll": 3.125}
    >>> step_line(config, 3, 50, metrics, colours=False)
    'PAMA step 3/50  a 1.25 (100 %)  0.5 nats  reference nll 3.12'
    """
    bold, dim, plain = ("\x1b[1m", "\x1b[2m", "\x1b[0m") if colours else ("", "", "")
    parts = [f"{dim}PAMA step {step}{plain}" if steps is None else f"{dim}PAMA step {step}/{steps}{plain}"]
    for objective in config.objectives:
        reward, share = metrics.get(f"{REWARD}{objective.name}"), metrics.get(f"{COEFFICIENT}{objective.name}")
        shown = "–" if reward is None or math.isnan(reward) else f"{reward:.3g}"
        part = "monitor" if objective.role == "monitor" else "–" if share is None else f"{100 * share:.0f} %"
        parts.append(f"{objective.name} {bold}{shown}{plain} ({part})")
    if len(config.trained) > 1:
        for word, key in (("conflict", CONFLICT), ("active", ACTIVE)):
            if key in metrics:
                parts.append(f"{word} {100 * metrics[key]:.0f} %")
    for form, key in (("{:.2g} nats", KL), ("reference nll {:.3g}", REFERENCE_NLL)):
        if key in metrics:
            parts.append(form.format(metrics[key]))
    return "  ".join(parts)

"""Warnings after the first rollout: rules that are known to do badly with such rewards, and what to use instead."""

import itertools
import math

from pama_plugin.aggregation import get_rule
from pama_plugin.batch.metrics import group_correlations
from pama_plugin.batch.table import RewardTable
from pama_plugin.settings.run import MANY_OBJECTIVES, PamaConfig

APART = 10.0  # of two spreads


def advise(config: PamaConfig, table: RewardTable) -> list[str]:
    """Sentences about the rule, given the rewards of one batch.

    >>> import torch
    >>> from pama_plugin.settings.load import load_config
    >>> objectives = ["a=builtin:length", "b=builtin:repetition"]
    >>> config = load_config("morlhf", objectives, None, None, None, default_level="token")
    >>> values_KB = torch.tensor([[10.0, 90.0, 40.0, 80.0], [0.1, 0.2, 0.3, 0.1]])
    >>> (sentence,) = advise(config, RewardTable(("a", "b"), values_KB, {}, torch.arange(4), 4, (4,)))
    >>> print(sentence.partition(":")[0])
    --loss morlhf follows 'a', whose rewards times weight spread 386 times as much as those of 'b'
    """
    found = []
    rule = get_rule(config.loss)
    if rule.combines == "rewards" or config.loss == "dvao":
        spreads = {}
        for objective in config.trained:
            rewards_B = table.row(objective.name)
            rewards_B = rewards_B[rewards_B.isfinite()]
            if objective.normalize == "none" and len(rewards_B) > 1 and float(rewards_B.std()) > 0:
                spreads[objective.name] = objective.weight.at(0) * float(rewards_B.std())
        if spreads:
            most, least = (choose(spreads, key=spreads.__getitem__) for choose in (max, min))
            if (ratio := spreads[most] / spreads[least]) >= APART:
                found.append(
                    f"--loss {config.loss} follows {most!r}, whose rewards times weight spread {ratio:.3g} times as "
                    f"much as those of {least!r}: set normalize=running for both, or use --loss linear with an "
                    "estimator that whitens each objective"
                )
    correlations = [*group_correlations(table, config.trained_names).values()] if table.group_size > 1 else []
    if config.loss == "pama" and len(config.trained) >= MANY_OBJECTIVES and correlations:
        mean = math.fsum(correlations) / len(correlations)
        if mean <= 0:
            pairs = len([*itertools.combinations(config.trained, 2)])
            found.append(
                f"--loss pama with {len(config.trained)} objectives, whose rewards do not correlate (mean of {pairs} "
                f"pairs within the responses to a prompt: {mean:.2f}): they agree on few responses, and little is "
                "learned; use --loss min_norm"
            )
    return found

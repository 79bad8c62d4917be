"""The flags that the plugin adds to OpenRLHF's command. A misspelt one is found without torch or pydantic."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from pama_plugin.errors import ConfigError
from pama_plugin.rewards import KINDS, RewardKind, available_rewards
from pama_plugin.settings.names import BEST_RULES, COMMON_OPTIONS, PROBE_MODES, STOCK

if TYPE_CHECKING:
    from pama_plugin.settings.run import PamaConfig


def add_objective_flags(group: argparse._ActionsContainer) -> None:
    """The two ways to name objectives."""
    kinds = _loadable_kinds()
    takes = [f"{name} {_keys(kind.options)}" for name, kind in kinds.items() if kind.options]
    group.add_argument(
        "--pama.objective",
        action="append",
        default=[],
        metavar="NAME=KIND:LOCATION[,key=value...]",
        help="a reward, once per objective. KIND and LOCATION: "
        + "; ".join(f"{name}: {kind.summary}" for name, kind in kinds.items())
        + f". Options of every kind: {_keys(COMMON_OPTIONS)}; of one kind: {'; '.join(takes)}. "
        f"Builtin rewards: {', '.join(available_rewards())}. pama_plugin/rewards/README.md explains them all",
    )
    group.add_argument("--pama.config", metavar="FILE.yaml", help="the same settings as YAML; flags win over it")


def _keys(options: Iterable[str]) -> str:
    return ", ".join(f"{key}=" for key in options)


def _loadable_kinds() -> dict[str, RewardKind]:
    """Without those of other packages that cannot be loaded: an objective of such a kind is told so."""
    kinds = {}
    for name in KINDS.names():
        with suppress(ValueError):
            kinds[name] = KINDS[name]
    return kinds


def _options_of_rules() -> dict[str, list[str]]:
    """Rule → the options that ``--pama.option`` sets. Imports torch."""
    from pama_plugin.aggregation import available_rules, get_rule
    from pama_plugin.aggregation.registry import CONTEXT_PARAMETERS

    options = {}
    for name in available_rules():
        with suppress(ValueError):  # a rule of another package that cannot be loaded; a run with it is told so
            options[name] = [key for key in get_rule(name).parameters if key not in CONTEXT_PARAMETERS]
    return options


def add_flags(parser: argparse.ArgumentParser, rules: Mapping[str, Sequence[str]] | None = None) -> None:
    """Add the plugin's group to a parser, OpenRLHF's or our own.

    Args:
        parser: gets the group.
        rules: the names of the rules and their options, for ``--help``; None: import the rules and list them all.
    """
    rules = _options_of_rules() if rules is None else rules
    group = parser.add_argument_group(
        "PAMA",
        "Multi-objective alignment (arXiv 2508.07768). One --pama.objective per reward; without --loss, or with "
        f"--loss {STOCK}, the host runs as it is.",
    )
    group.add_argument(
        "--loss",
        dest="pama.loss",
        metavar="RULE",
        help=f"how the advantages are combined: {STOCK} (stock, one reward), {', '.join(rules)}",
    )
    add_objective_flags(group)
    group.add_argument(
        "--pama.level",
        metavar="LEVEL",
        help="what pama projects: token, sequence, batch (default: token with gae, sequence with any other estimator)",
    )
    noon = group.add_mutually_exclusive_group()
    noon.add_argument(
        "--pama.noon",
        action="store_const",
        const=True,
        help="pama and min_norm: keep positive advantages alone, 'No Negative', Eq. 5 of the paper (the default of "
        "pama with --pama.level batch)",
    )
    noon.add_argument(
        "--pama.no_noon",
        dest="pama.noon",
        action="store_const",
        const=False,
        help="keep negative advantages too (the default of min_norm, and of pama by token or sequence)",
    )
    group.add_argument(
        "--pama.whiten",
        action="store_const",
        const=True,
        help="whiten each objective's advantages over the batch before they are combined, where the estimator does not",
    )
    group.add_argument(
        "--pama.option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the rule, once per option: "
        + "; ".join(f"{name}: {_keys(options)}" for name, options in rules.items() if options),
    )
    group.add_argument(
        "--pama.best",
        metavar="RULE",
        help=f"which evaluation's checkpoint is kept as the best: {', '.join(BEST_RULES)} (min, the default: the "
        "objective that rose least; weighted: the sum of mean rewards times weights)",
    )
    group.add_argument(
        "--pama.probe",
        metavar="MODE",
        help="let every objective score pairs of a good and a bad response before the first step, and look at the "
        f"first rollout: {', '.join(PROBE_MODES)} (strict ends the run where a reward is broken; default: warn)",
    )
    group.add_argument(
        "--pama.probe_gradients",
        metavar="N",
        help="every N steps, log the cosine between the gradients of the policy's update and of each objective's own, "
        "over a few responses: where they disagree, advantages mislead. It costs a backward pass per objective and one",
    )
    group.add_argument(
        "--pama.stop_at_front",
        metavar="SHARE[:STEPS]",
        help="end the run, saved, once fewer than SHARE of the tokens had an advantage in each of the last STEPS steps "
        "(default: 5) and most were in conflict: what is left to agree on is then noise. Off by default; try 0.1",
    )
    group.add_argument(
        "--pama.allow_other_objectives",
        action="store_true",
        help="resume from a checkpoint of other objectives: the new ones start anew (not with gae, whose critic has a "
        "value head for each)",
    )
    group.add_argument(
        "--pama.allow_unsupported_host",
        action="store_true",
        help="run on an OpenRLHF release that this version of the plugin was not tested with",
    )
    group.add_argument(
        "--pama.plan",
        metavar="NODESxGPUS",
        help="print which model takes which GPUs of such a cluster (1x8: one node with 8) and the resolved settings as "
        "YAML, and start nothing",
    )
    group.add_argument(
        "--pama.allow_waiting",
        action="store_true",
        help="start although the cluster has too few GPUs now, and wait for them: for one that grows on demand",
    )


def load_flags(arguments: Sequence[str]) -> "PamaConfig | None":
    """The configuration that our flags among the arguments of OpenRLHF's command ask for.

    None if they do not ask for the plugin, or are abbreviated, which only OpenRLHF's parser resolves.

    Raises:
        ConfigError: the first setting that cannot be run, or a misspelt flag of ours. Misspelt flags and rules are
            found before anything is imported that takes a second.
    """
    parser = argparse.ArgumentParser(prog="pama", add_help=False, allow_abbrev=False, exit_on_error=False)
    add_flags(parser, rules={})
    try:
        namespace, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    flags_of_ours = [option for action in parser._actions for option in action.option_strings]
    unread = [word.partition("=")[0] for word in others if word.startswith(("--pama.", "--los"))]
    for flag in unread:
        if not any(option.startswith(flag) for option in flags_of_ours):
            hint = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(flag, flags_of_ours, n=1))
            raise ConfigError(f"there is no flag {flag}{hint}")
    if unread:  # abbreviations, which the host's parser takes: it is left to that
        return None
    flags = vars(namespace)
    loss, file = flags["pama.loss"], flags["pama.config"]
    if loss == STOCK or not (loss or file):
        return None
    names = _names_of_rules()
    if loss is not None and loss.partition(":")[0] not in names:
        known = ", ".join(sorted(names))
        raise ConfigError(f"--loss must be one of {known}, or {STOCK} without objectives, found {loss!r}")
    from pama_plugin.settings.run import load_config

    keys = ("level", "noon", "best", "probe", "whiten", "option", "probe_gradients", "stop_at_front")
    settings = {key: flags[f"pama.{key}"] for key in keys}
    return load_config(loss, flags["pama.objective"], file, **settings, default_level="token")


def _names_of_rules() -> set[str]:
    """Names up to a colon, without importing the rules: the file of a rule has its name."""
    files = {path.stem for path in (Path(__file__).parents[1] / "aggregation" / "rules").glob("[!_]*.py")}
    registry = sys.modules.get("pama_plugin.aggregation.registry")  # has rules that a script registered itself
    registered = {name.partition(":")[0] for name in registry.available_rules()} if registry else set()
    return files | registered | entry_points(group="pama_plugin.rules").names

"""The flags that the plugin adds to the host's command; ``config`` makes sense of them."""

import argparse
import difflib
from collections.abc import Iterable, Sequence

from pama_plugin.aggregation import LEVELS, available_rules, get_rule
from pama_plugin.aggregation.registry import CONTEXT_PARAMETERS
from pama_plugin.errors import ConfigError
from pama_plugin.rewards import available_rewards
from pama_plugin.rewards.kinds import OPTIONS
from pama_plugin.settings.objective import COMMON_OPTIONS
from pama_plugin.settings.run import PROBE_MODES, STOCK, PamaConfig, load_config


def add_objective_flags(group: argparse._ActionsContainer) -> None:
    """The two ways to name objectives."""
    takes = [f"{kind} {_keys(model.model_fields)}" for kind, model in OPTIONS.items() if model.model_fields]
    group.add_argument(
        "--pama.objective",
        action="append",
        default=[],
        metavar="NAME=KIND:LOCATION[,key=value...]",
        help="a reward, once per objective. KIND: rm (a value-head reward model of the host, folder or hub name), hf "
        "(any sequence classifier with a tokenizer of its own), py (FILE.py:FUNCTION with the host's reward_func "
        "signature), http (a reward server's URL, replicas separated by |), builtin "
        f"({', '.join(available_rewards())}), agent (what --train.agent_func_path returns: a key of extra_logs, reward "
        "or scores). "
        f"Every kind takes {_keys(COMMON_OPTIONS)}; {'; '.join(takes)}; "
        "the README says what a builtin takes, and what all of them mean.",
    )
    group.add_argument("--pama.config", metavar="FILE.yaml", help="the same settings as YAML; flags win over it")


def _keys(options: Iterable[str]) -> str:
    return ", ".join(f"{key}=" for key in options)


def _options_of_rules() -> dict[str, list[str]]:
    found = {}
    for name in available_rules():
        try:
            found[name] = [key for key in get_rule(name).parameters if key not in CONTEXT_PARAMETERS]
        except ValueError:  # a rule of another package that cannot be loaded; whoever asks for it is told
            continue
    return {name: keys for name, keys in found.items() if keys}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the plugin's group to a parser, the host's or our own."""
    group = parser.add_argument_group(
        "PAMA",
        "Multi-objective alignment (arXiv 2508.07768). One --pama.objective per reward; without --loss, or with "
        f"--loss {STOCK}, the host runs as it is.",
    )
    group.add_argument(
        "--loss",
        dest="pama.loss",
        metavar="RULE",
        help=f"how the advantages are combined: {STOCK} (stock, one reward), {', '.join(available_rules())}",
    )
    add_objective_flags(group)
    group.add_argument(
        "--pama.level",
        metavar="LEVEL",
        help=f"what pama projects: {', '.join(LEVELS)} (default: token with gae, sequence with any other estimator)",
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
        + "; ".join(f"{name}: {_keys(check)}" for name, check in _options_of_rules().items()),
    )
    group.add_argument(
        "--pama.best",
        metavar="RULE",
        help="which evaluation's checkpoint is kept as the best: min (the objective that rose least; the default), "
        "weighted (the sum of mean rewards times weights) or hypervolume",
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


def load_flags(arguments: Sequence[str]) -> PamaConfig | None:
    """What our flags among the arguments of the host's command say.

    None if they leave the host as it is, or are abbreviated, so that the host's own parser alone can tell.

    Raises:
        ConfigError: the first thing that cannot be run, a misspelt flag of ours included.
    """
    parser = argparse.ArgumentParser(prog="pama", add_help=False, allow_abbrev=False, exit_on_error=False)
    add_flags(parser)
    try:
        known, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    own = [option for action in parser._actions for option in action.option_strings]
    unread = [word.partition("=")[0] for word in others if word.startswith(("--pama.", "--los"))]
    for flag in unread:
        if not any(option.startswith(flag) for option in own):
            hint = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(flag, own, n=1))
            raise ConfigError(f"there is no flag {flag}{hint}")
    if unread:  # abbreviations, which the host's parser takes: it is left to that
        return None
    flags = vars(known)
    loss, file = flags["pama.loss"], flags["pama.config"]
    if loss == STOCK or not (loss or file):
        return None
    names = ("level", "noon", "best", "probe", "whiten", "option", "probe_gradients", "stop_at_front")
    given = {name: flags[f"pama.{name}"] for name in names}
    return load_config(loss, flags["pama.objective"], file, **given, default_level="token")

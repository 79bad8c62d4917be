"""The flags that the plugin adds to OpenRLHF's command. Misspelt flags are detected without torch or pydantic."""

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
    """Add ``--pama.objective`` and ``--pama.config``."""
    kinds = _loadable_kinds()
    options = [f"{name} {_keys(kind.options)}" for name, kind in kinds.items() if kind.options]
    group.add_argument(
        "--pama.objective",
        action="append",
        default=[],
        metavar="NAME=KIND:LOCATION[,key=value...]",
        help="a reward; repeat the flag for every objective. Kinds and their LOCATION: "
        + "; ".join(f"{name}: {kind.summary}" for name, kind in kinds.items())
        + f". Options of every kind: {_keys(COMMON_OPTIONS)}. Options of one kind: {'; '.join(options)}. "
        f"Builtin rewards: {', '.join(available_rewards())}. See pama_plugin/rewards/README.md",
    )
    group.add_argument("--pama.config", metavar="FILE.yaml", help="settings as a YAML file; flags take precedence")


def _keys(options: Iterable[str]) -> str:
    return ", ".join(f"{key}=" for key in options)


def _loadable_kinds() -> dict[str, RewardKind]:
    """All kinds except those of other packages that fail to load. An objective of such a kind raises the error."""
    kinds = {}
    for name in KINDS.names():
        with suppress(ValueError):
            kinds[name] = KINDS[name]
    return kinds


def _options_of_rules() -> dict[str, list[str]]:
    """Rule → names of its options for ``--pama.option``. Imports torch."""
    from pama_plugin.aggregation import available_rules, get_rule
    from pama_plugin.aggregation.registry import CONTEXT_PARAMETERS

    options = {}
    for name in available_rules():
        with suppress(ValueError):  # a rule of another package fails to load; a run with the rule raises the error
            options[name] = [key for key in get_rule(name).parameters if key not in CONTEXT_PARAMETERS]
    return options


def add_flags(parser: argparse.ArgumentParser, rules: Mapping[str, Sequence[str]] | None = None) -> None:
    """Add the flags of the plugin to a parser.

    Args:
        parser: OpenRLHF's parser, or one of the plugin.
        rules: names of the rules and their options, for ``--help``. Default: all rules, which imports torch.
    """
    rules = _options_of_rules() if rules is None else rules
    group = parser.add_argument_group(
        "PAMA",
        "Multi-objective alignment (arXiv 2508.07768). Set --loss, and one --pama.objective per reward. Without "
        f"--loss, or with --loss {STOCK}, OpenRLHF runs unchanged.",
    )
    group.add_argument(
        "--loss",
        dest="pama.loss",
        metavar="RULE",
        help=f"rule that combines the objectives: {', '.join(rules)}; or {STOCK} for stock OpenRLHF (default)",
    )
    add_objective_flags(group)
    group.add_argument(
        "--pama.level",
        metavar="LEVEL",
        help="what the rule combines: the advantages of every token, their means over each response (sequence), or, "
        "with pama, one mean of the batch (default: token; for pama without gae, and for rules that compare the "
        "responses to a prompt, sequence)",
    )
    group.add_argument(
        "--pama.rescale",
        metavar="MODE",
        help="auto, none or unit. unit: divide the result by a constant that depends on the rule, the weights and the "
        "number of objectives, so that independent whitened objectives give advantages of root mean square 1; those "
        "that agree give more, those that conflict less. none: the rule as its source has it (default, auto: unit, but "
        "none with --pama.level batch and for rules that combine rewards)",
    )
    noon = group.add_mutually_exclusive_group()
    noon.add_argument(
        "--pama.noon",
        action="store_const",
        const=True,
        help="for pama and min_norm: keep only positive advantages ('No Negative', Eq. 5 of the paper; default for "
        "pama with --pama.level batch)",
    )
    noon.add_argument(
        "--pama.no_noon",
        dest="pama.noon",
        action="store_const",
        const=False,
        help="keep negative advantages (default for min_norm, and for pama with --pama.level token or sequence)",
    )
    group.add_argument(
        "--pama.whiten",
        action="store_const",
        const=True,
        help="whiten the advantages of each objective over the batch before combining, for estimators that do not",
    )
    group.add_argument(
        "--pama.inactive_below",
        metavar="SHARE",
        help="leave an objective out of the combination in steps in which the standard deviation of its rewards is "
        "below SHARE of its mean over the steps so far: whitening would amplify its noise (default: 0.05; 0: only if "
        "all its rewards are equal)",
    )
    group.add_argument(
        "--pama.option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the rule; repeat the flag for every option. "
        + "; ".join(f"{name}: {_keys(options)}" for name, options in rules.items() if options),
    )
    group.add_argument(
        "--pama.preferences",
        metavar="SOURCE",
        help="train one policy for every trade-off: each prompt has weights of its own, which sum to 1, multiply those "
        "of the objectives, and are written into the prompt. dirichlet:ALPHA draws them (1: uniformly; below 1: more "
        "near single objectives), grid:N takes those with N values per pair of objectives in turn, column:NAME reads "
        "them from the data set (a list in the order of the objectives, or a mapping). 0: the objective does not apply",
    )
    group.add_argument(
        "--pama.preference_template",
        metavar="TEXT",
        help="how --pama.preferences are written: a field {NAME} or {NAME:FORMAT} for every objective and {prompt}, "
        "the text of the user; without {prompt} TEXT is the system message (default: '[NAME {NAME}, NAME {NAME}]', a "
        "line above the user's text). Rewards judge the prompt without it",
    )
    group.add_argument(
        "--pama.eval_preferences",
        metavar="N",
        help="with --pama.preferences and --eval.dataset: answer each held-out prompt with each of the weights that "
        "have N values per pair of objectives (default: 5 with two objectives, else 3)",
    )
    group.add_argument(
        "--pama.best",
        metavar="RULE",
        help=f"rating of evaluations, by which the best checkpoint is kept: {', '.join(BEST_RULES)}. min: rise of the "
        "objective that rose least; weighted: sum of mean rewards times weights; hypervolume: product of 1 + rise over "
        "the objectives, or with --pama.preferences the volume that their front dominates (default: min; with "
        "--pama.preferences hypervolume)",
    )
    group.add_argument(
        "--pama.probe",
        metavar="MODE",
        help="score pairs of a good and a bad response with every objective before the first step, and check the first "
        f"rollout: {', '.join(PROBE_MODES)}. strict ends the run if a reward is broken (default: warn)",
    )
    group.add_argument(
        "--pama.probe_gradients",
        metavar="N",
        help="every N steps, log the cosine between the policy gradients of the combined advantages and of each "
        "objective, over 64 responses or more; it shows whether pama/gain can be trusted. Costs K + 1 extra forward "
        "and backward passes over these",
    )
    group.add_argument(
        "--pama.stop_at_front",
        metavar="SHARE[:STEPS]",
        help="save the model and end the run once, in each of the last STEPS steps (default: 5), fewer than SHARE of "
        "the tokens had an advantage and most were in conflict: the objectives then agree only on noise (default: "
        "off; try 0.1 with two or three objectives, 0.05 with four)",
    )
    group.add_argument(
        "--pama.stop_at_kl",
        metavar="NATS",
        help="save the model and end the run once the responses of a step are on average more than NATS from the "
        "reference (pama/kl_response; needs a reference model)",
    )
    group.add_argument(
        "--pama.log_rollouts",
        metavar="N",
        help="responses of every step to write, with their rewards, to the trackers and to rollouts.jsonl, beside the "
        "TensorBoard logs or in --ckpt.output_dir; 0 for none, or all. `pama rollouts` shows them (default: 8)",
    )
    group.add_argument(
        "--pama.filter_by",
        metavar="NAME",
        help="with --algo.dynamic_filtering_enable: the objective, or monitor, whose mean reward over the responses to "
        "a prompt must lie within --algo.dynamic_filtering_range; or sum, the weighted sum of all rewards. Required "
        "with several objectives (default: the only one)",
    )
    group.add_argument(
        "--pama.allow_other_objectives",
        action="store_true",
        help="resume from a checkpoint with other objectives; new objectives start without statistics. Not with gae, "
        "whose critic has one value head per objective",
    )
    group.add_argument(
        "--pama.allow_other_rule",
        action="store_true",
        help="resume from a checkpoint that was trained with another rule, or other settings of it; the memory of "
        "another rule, such as the multipliers of constraints, starts anew",
    )
    group.add_argument(
        "--pama.allow_unsupported_host",
        action="store_true",
        help="run on an OpenRLHF release with which this version of the plugin was not tested",
    )
    group.add_argument(
        "--pama.evaluate_only",
        action="store_const",
        const=True,
        help="evaluate the policy, or the one of the checkpoint with --ckpt.load_enable, on --eval.dataset, and end "
        "without a training step and without saving a model",
    )
    group.add_argument(
        "--pama.plan",
        metavar="NODESxGPUS",
        help="print the placement of all models on a cluster of this size (1x8: one node with 8 GPUs) and the resolved "
        "settings as YAML, then exit",
    )
    group.add_argument(
        "--pama.allow_waiting",
        action="store_true",
        help="if the cluster has too few GPUs, wait for them instead of refusing to start; for clusters that scale on "
        "demand",
    )


def load_flags(arguments: Sequence[str]) -> "PamaConfig | None":
    """Load the configuration from the arguments of OpenRLHF's command.

    Returns None if they do not enable the plugin, or if they abbreviate its flags, because only OpenRLHF's parser can
    resolve abbreviations.

    Raises:
        ConfigError: a setting is invalid, or a flag of the plugin is misspelt. Misspelt flags and rules are detected
            before any import that takes a second.
    """
    parser = argparse.ArgumentParser(prog="pama", add_help=False, allow_abbrev=False, exit_on_error=False)
    add_flags(parser, rules={})
    try:
        namespace, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    known = [option for action in parser._actions for option in action.option_strings]
    unread = [word.partition("=")[0] for word in others if word.startswith(("--pama.", "--los"))]
    for flag in unread:
        if not any(option.startswith(flag) for option in known):
            hint = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(flag, known, n=1))
            raise ConfigError(f"there is no flag {flag}{hint}")
    if unread:  # abbreviations, which only OpenRLHF's parser resolves
        return None
    flags = vars(namespace)
    loss, file = flags["pama.loss"], flags["pama.config"]
    if loss == STOCK or not (loss or file):
        return None
    names = _names_of_rules()
    if loss is not None and loss.partition(":")[0] not in names:
        rules = ", ".join(sorted(names))
        raise ConfigError(f"--loss must be one of {rules}, or {STOCK} without objectives, found {loss!r}")
    from pama_plugin.settings.load import load_config

    keys = ["level", "noon", "best", "probe", "whiten", "option", "probe_gradients", "stop_at_front", "filter_by"]
    keys += ["log_rollouts", "stop_at_kl", "rescale", "inactive_below", "preferences", "preference_template"]
    keys += ["eval_preferences"]
    settings = {key: flags[f"pama.{key}"] for key in keys}
    return load_config(loss, flags["pama.objective"], file, **settings, default_level="token")


def _names_of_rules() -> set[str]:
    """Names of the rules up to a colon, without importing them: a rule has the name of its file."""
    files = {path.stem for path in (Path(__file__).parents[1] / "aggregation" / "rules").glob("[!_]*.py")}
    registry = sys.modules.get("pama_plugin.aggregation.registry")  # includes rules that a script registered
    registered = {name.partition(":")[0] for name in registry.available_rules()} if registry else set()
    return files | registered | entry_points(group="pama_plugin.rules").names

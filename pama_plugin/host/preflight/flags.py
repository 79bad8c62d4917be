"""Checks OpenRLHF's flags and the models that they name against the configuration, before Ray starts."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from pama_plugin.aggregation import get_rule
from pama_plugin.errors import ConfigError
from pama_plugin.host.preflight.tokenizers import check_vocabularies
from pama_plugin.host.preflight.weights import check_code, check_value_head
from pama_plugin.settings.preferences import simplex_grid
from pama_plugin.settings.run import WEIGHTED_SUM, PamaConfig

# The flags of OpenRLHF's single reward, which objectives replace.
STOCK_REWARD_FLAGS = ("reward.model_name_or_path", "reward.remote_url")

# Flags that must be left out.
REFUSED = {
    "data.max_images_per_prompt": "rewards would read the text alone, and a policy that reads images was never run",
}

# What a policy with LoRA adapters needs.
WITH_LORA = {
    "ds.tensor_parallel_size": (1, "DeepSpeed would split the base and not its adapters"),
    "train.enable_ema": (False, "OpenRLHF's averaged model has no adapters"),
    "actor.optim": ("adam", "Muon orthogonalises updates of whole matrices, and was never run on adapters"),
}

# The gradient probe needs these values; reentrant checkpoints do not support ``torch.autograd.grad``.
WHOLE_POLICY = {
    "ds.ring_attn_size": 1,
    "ds.tensor_parallel_size": 1,
    "actor.gradient_checkpointing_reentrant": False,
}


def check_flags(args: argparse.Namespace, config: PamaConfig) -> PamaConfig:
    """Refuse flags of OpenRLHF that do not work with the configuration.

    Args:
        args: OpenRLHF's flags, flat.
        config: the configuration of the run.

    Returns:
        The configuration, with what dynamic filtering rates responses by.

    Raises:
        ConfigError: names the flag, the requirement and the value.
    """
    stock = [f"--{flag} {value}" for flag in STOCK_REWARD_FLAGS if (value := getattr(args, flag))]
    if stock:
        raise ConfigError(f"with objectives, every reward must be a --pama.objective, found {', '.join(stock)}")
    for flag, why in REFUSED.items():
        if getattr(args, flag):
            raise ConfigError(f"--{flag} must be left out: {why}; found {getattr(args, flag)}")
    if getattr(args, "ds.lora.rank"):
        for flag, (needed, why) in WITH_LORA.items():
            if getattr(args, flag) != needed:
                raise ConfigError(f"--{flag} must be {needed} with --ds.lora.rank: {why}; found {getattr(args, flag)}")
        if getattr(args, "ds.lora.target_modules") == ["all-linear"]:
            raise ConfigError(
                "--ds.lora.target_modules must be left out for all linear layers: as a flag, all-linear is the name of "
                "a module, found all-linear"
            )
    if getattr(args, "ds.load_in_4bit"):
        _check_4_bits(args)
    if not getattr(args, "vllm.num_engines"):
        raise ConfigError(
            "--vllm.num_engines must be at least 1, because OpenRLHF's PPO generates with vLLM, found none"
        )
    _check_agent(getattr(args, "train.agent_func_path"), config)
    if (blind := [each.name for each in config.objectives if each.needs_label]) and not getattr(args, "data.label_key"):
        raise ConfigError(
            f"--data.label_key must name the column of the label, which the rubric of {blind[0]!r} contains, found none"
        )
    with_heads = getattr(args, "algo.advantage.estimator") == "gae" and len(config.trained) > 1
    if with_heads and getattr(args, "ds.tensor_parallel_size") > 1:
        raise ConfigError(
            "--ds.tensor_parallel_size must be 1 with gae and several objectives (value heads split over ranks are "
            f"untested), found {getattr(args, 'ds.tensor_parallel_size')}: use another estimator or ZeRO-3"
        )
    rule = get_rule(config.loss)
    if rule.combines == "rewards" and not rule.linear and getattr(args, "algo.advantage.estimator") == "gae":
        raise ConfigError(
            f"--loss {config.loss} makes one reward of all, whose value no value head predicts: "
            "--algo.advantage.estimator must be one without a critic, found gae"
        )
    fewest = 4 if config.loss == "pareto_rank" else 2  # of fewer responses nearly all have the first rank
    if "groups_B" in rule.parameters and getattr(args, "rollout.n_samples_per_prompt") < fewest:
        raise ConfigError(
            f"--rollout.n_samples_per_prompt must be at least {fewest} with --loss {config.loss}, which compares the "
            f"responses to one prompt, found {getattr(args, 'rollout.n_samples_per_prompt')}"
        )
    grouped = [objective.name for objective in config.objectives if objective.normalize == "group"]
    if grouped and getattr(args, "rollout.n_samples_per_prompt") == 1:
        raise ConfigError(
            f"--rollout.n_samples_per_prompt must be at least 2 with normalize=group ({', '.join(grouped)}), found 1"
        )
    if config.stop_at_kl is not None and getattr(args, "algo.kl.init_coef") == 0:
        raise ConfigError(
            "--pama.stop_at_kl needs a reference model, so --algo.kl.init_coef must be above 0 (1e-6 will do), found 0"
        )
    has_ratio = getattr(args, "algo.kl.use_loss") or getattr(args, "algo.kl.estimator") == "k1"
    if config.options.get("reference_clip") and not (getattr(args, "algo.kl.init_coef") > 0 and has_ratio):
        raise ConfigError(
            "--pama.option reference_clip needs a reference model (--algo.kl.init_coef above 0) and "
            f"--algo.kl.use_loss or --algo.kl.estimator k1, found {getattr(args, 'algo.kl.init_coef')} and "
            f"{getattr(args, 'algo.kl.estimator')}"
        )
    if config.probe_gradients is not None:
        for flag, whole in WHOLE_POLICY.items():
            if getattr(args, flag) != whole:
                raise ConfigError(
                    f"--{flag} must be {whole} with --pama.probe_gradients, which runs the policy on each rank by "
                    f"itself, found {getattr(args, flag)}"
                )
    ranks_in_step = getattr(args, "ds.ring_attn_size") * getattr(args, "ds.tensor_parallel_size")
    evaluates = getattr(args, "train.async_enable") and getattr(args, "eval.dataset")
    if evaluates and config.scored_in("ranks") and ranks_in_step > 1:
        raise ConfigError(
            "--ds.ring_attn_size × --ds.tensor_parallel_size must be 1 with both --eval.dataset and "
            "--train.async_enable, where two processes score at once and would mix the batches of rm objectives, "
            f"found {ranks_in_step}"
        )
    if getattr(args, "ckpt.best_metric_key") and config.best is not None:
        raise ConfigError(
            f"only one of --pama.best and --ckpt.best_metric_key may be given, found {config.best} and "
            f"{getattr(args, 'ckpt.best_metric_key')}"
        )
    return _choose_filter(args, config)


def _choose_filter(args: argparse.Namespace, config: PamaConfig) -> PamaConfig:
    """Set by what dynamic filtering rates prompts; refuse a rating that is not known in time or fits no prompt."""
    if not getattr(args, "algo.dynamic_filtering_enable"):
        if config.filter_by is not None:
            raise ConfigError(f"--pama.filter_by needs --algo.dynamic_filtering_enable, found {config.filter_by} only")
        return config
    default = config.names[0] if len(config.names) == 1 else None
    config = config.model_copy(update={"filter_by": config.filter_by or default})
    smallest, largest = getattr(args, "algo.dynamic_filtering_range")
    between = f"--algo.dynamic_filtering_range {smallest:g} {largest:g}"
    if config.filter_by is None:
        raise ConfigError(
            "--pama.filter_by must say what --algo.dynamic_filtering_enable rates prompts by, the objective whose mean "
            f"reward lies within {between}, or {WEIGHTED_SUM}; found none with {', '.join(config.names)}"
        )
    rated = config.filtered_by
    is_default = isinstance(getattr(args, "algo.dynamic_filtering_range"), tuple)  # a flag gives a list
    if config.filter_by not in config.names and is_default:
        raise ConfigError(
            f"--pama.filter_by {WEIGHTED_SUM} needs a --algo.dynamic_filtering_range for the weighted sum of "
            f"{', '.join(objective.name for objective in rated)}, found the default"
        )
    if late := [each for each in rated if each in config.scored_in("ranks", "replicas")]:
        raise ConfigError(
            f"--pama.filter_by {config.filter_by} must be scored in the rollout, found "
            f"{', '.join(f'{objective.name} of kind {objective.kind}' for objective in late)}, scored after it"
        )
    if partial := [each.name for each in rated if each.name == config.filter_by and (each.when or each.abstain)]:
        raise ConfigError(
            f"--pama.filter_by must be an objective that applies to every prompt, or {WEIGHTED_SUM}, found "
            f"{partial[0]}, which has when= or abstain="
        )
    # Filtering comes before failures are handled: a prompt whose responses have no reward has no rating.
    if tolerant := [objective.name for objective in rated if objective.on_failure.action != "fail"]:
        raise ConfigError(
            "--algo.dynamic_filtering_enable rates prompts by their rewards: on_failure must be fail, found another "
            f"policy for {', '.join(tolerant)}"
        )
    always = [objective for objective in rated if not (objective.when or objective.abstain)]
    ranges = {objective.name: objective.range for objective in always if objective.range is not None}
    if len(ranges) == len(rated):
        corners = simplex_grid(len(config.trained), 2) if config.preferences is not None else [()]
        low, high = (
            extreme(
                config.rate({name: getattr(bounds, end) for name, bounds in ranges.items()}, 0, each)
                for each in corners
            )
            for extreme, end in ((min, "low"), (max, "high"))
        )
        if high <= smallest or low >= largest:
            raise ConfigError(
                f"{between} must contain rewards between {low:g} and {high:g}, as range= says of "
                f"{config.filter_by}, found none: every prompt would be filtered out"
            )
    return config


def _check_4_bits(args: argparse.Namespace) -> None:
    rank, dtype, stage = (getattr(args, f"ds.{flag}") for flag in ("lora.rank", "param_dtype", "zero_stage"))
    if not rank:
        raise ConfigError(
            "--ds.lora.rank must be above 0 with --ds.load_in_4bit, whose weights no step changes; found 0"
        )
    if dtype != "bf16":
        raise ConfigError(f"--ds.param_dtype must be bf16 with --ds.load_in_4bit, as OpenRLHF demands, found {dtype}")
    if stage == 3:
        raise ConfigError(
            "--ds.zero_stage must be at most 2 with --ds.load_in_4bit: ZeRO-3 was never run with it, found 3"
        )


def _check_agent(agent: str | None, config: PamaConfig) -> None:
    names = ", ".join(objective.name for objective in config.scored_in("agent"))
    if names and not agent:
        raise ConfigError(f"objectives of kind agent need --train.agent_func_path, found none with {names}")
    if agent and not Path(agent).is_file():
        raise ConfigError(f"--train.agent_func_path must be a file, found {agent}")


def check_evaluation(args: argparse.Namespace) -> None:
    """Refuse --pama.evaluate_only where there is nothing to evaluate. Raises ``ConfigError``."""
    if not getattr(args, "eval.dataset"):
        raise ConfigError("--pama.evaluate_only needs --eval.dataset, found none")
    if getattr(args, "train.async_enable"):
        raise ConfigError("--pama.evaluate_only needs synchronous training, found --train.async_enable")
    setattr(args, "critic.save_value_network", False)


def check_models(args: argparse.Namespace, config: PamaConfig) -> list[str]:
    """Return warnings of likely mistakes; raise ``ConfigError`` if a model cannot read the policy's token ids."""
    warnings = []
    for objective in config.objectives:
        warnings += [f"objective {objective.name!r}: {line}" for line in objective.check()]
    if getattr(args, "train.agent_func_path") and not config.scored_in("agent"):
        warnings.append(
            "--train.agent_func_path: the agent's reward is no objective; --pama.objective NAME=agent:reward adds it"
        )
    if getattr(args, "ds.load_in_4bit") and find_spec("bitsandbytes") is None:
        raise ConfigError("--ds.load_in_4bit needs the package bitsandbytes, found none: pip install bitsandbytes")
    if args.use_ms:  # OpenRLHF switches to another hub only after its flags are parsed
        return warnings
    readers = {f"--pama.objective {objective.name}": objective.location for objective in config.scored_in("ranks")}
    critic = getattr(args, "critic.model_name_or_path")
    if critic and getattr(args, "algo.advantage.estimator") == "gae":
        readers["--critic.model_name_or_path"] = critic
    warnings += check_vocabularies(getattr(args, "actor.model_name_or_path"), readers)
    for objective in config.scored_in("ranks"):
        flag, options = f"--pama.objective {objective.name}", objective.settings
        check_code(flag, objective.location, trusted=options.trust_remote_code)
        check_value_head(flag, objective.location, options.value_head_prefix)
    return warnings

"""Replaces OpenRLHF's classes with ours, and refuses runs that cannot work.

The plugin relies on (``fingerprints`` guards it, ``tests/contract/test_seam.py`` checks it against the real wheels):

- ``openrlhf.cli.train_ppo_ray`` as ``__main__``: calls ``parse_args`` once. ``train`` looks up ``RayActorGroup``,
  ``PolicyModelActor``, ``CriticModelActor`` and ``RewardModelActor`` in its globals, builds one group of reward models
  unless ``args.reward.remote_url`` is set, imports ``PPOTrainer`` or ``PPOTrainerAsync`` in its body, and calls
  ``get_strategy``, another global, after Ray has started and before it reserves what ``placement`` computes;
- ``openrlhf.trainer.ppo_trainer_async``: ``PPOTrainerAsync`` looks up its two halves in its module's globals;
- ``openrlhf.trainer.ray.vllm_engine``: ``create_vllm_engines`` looks up ``RolloutRayActor`` in its module's globals;
- the classes that ``critic``, ``evaluation``, ``experience``, ``reward_groups``, ``rollout`` and the trainers subclass.

Ray sends an importable class to its actors by reference, so a method patched here would be lost there. An actor class
travels by value, with the globals that it refers to. So this module replaces actor classes only, and the driver's
``get_strategy`` and ``RayActorGroup``.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from pama_plugin.aggregation import get_rule
from pama_plugin.errors import ConfigError
from pama_plugin.host.preflight.fingerprints import check_host
from pama_plugin.host.preflight.nodes import ask_nodes
from pama_plugin.host.preflight.placement import Node, Plan, check_cluster, format_plan, make_plan, parse_cluster
from pama_plugin.host.preflight.resume import Resume, prepare_resume
from pama_plugin.host.preflight.tokenizers import check_vocabularies
from pama_plugin.host.preflight.weights import check_code, check_value_head
from pama_plugin.host.protocols import Command, Strategy
from pama_plugin.settings.names import STOCK
from pama_plugin.settings.run import WEIGHTED_SUM, PamaConfig, dump_config, load_config, warn_of_many_objectives

logger = logging.getLogger(__name__)

# The flags of OpenRLHF's single reward, which objectives replace.
STOCK_REWARD_FLAGS = ("reward.model_name_or_path", "reward.remote_url")

# Seen with LoRA: OpenRLHF sends the policy's parameters to vLLM under the names of the adapted model, which vLLM does
# not know, and the run dies at its first weight sync. Remove an entry when OpenRLHF supports it.
BROKEN_IN_THE_HOST = {
    "ds.lora.rank": "OpenRLHF's PPO cannot send a policy with LoRA adapters to vLLM",
    "ds.load_in_4bit": "it trains LoRA adapters only, which OpenRLHF's PPO cannot send to vLLM",
}

# The gradient probe needs these values; reentrant checkpoints do not support ``torch.autograd.grad``.
WHOLE_POLICY = {
    "ds.ring_attn_size": 1,
    "ds.tensor_parallel_size": 1,
    "actor.gradient_checkpointing_reentrant": False,
}


def install(args: argparse.Namespace) -> argparse.Namespace:
    """Turn the parsed flags into a ``PamaConfig`` at ``args.pama`` and replace OpenRLHF's classes with ours.

    With ``--pama.plan``, print the plan and the settings, and end the command.

    Raises:
        ConfigError: the run cannot work; nothing has been replaced.
    """
    flags = {key.removeprefix("pama."): vars(args).pop(key) for key in list(vars(args)) if key.startswith("pama.")}
    allowed = {name: flags.pop(f"allow_{name}") for name in ("unsupported_host", "other_objectives", "waiting")}
    objectives, file, loss, plan_for = (flags.pop(name) for name in ("objective", "config", "loss", "plan"))
    any_flag = objectives or file or plan_for is not None or any(value not in (None, []) for value in flags.values())
    if loss == STOCK or not (loss or file):
        if any_flag:
            raise ConfigError(f"--pama.* flags need --loss RULE other than {STOCK}, found --loss {loss}")
        return args

    estimator = getattr(args, "algo.advantage.estimator")
    level = "token" if estimator == "gae" else "sequence"
    config = load_config(loss, objectives, file, **flags, default_level=level)
    warnings = check_host(allowed["unsupported_host"])
    _check_host_flags(args, config)
    config = _choose_filter(args, config)
    plan = make_plan(args, config)
    if plan_for is not None:
        cluster = parse_cluster(plan_for)
        print(f"{format_plan(plan, cluster)}\n\n{dump_config(config)}", end="")
        check_cluster(plan, cluster)
        sys.exit()
    for warning in warnings + warn_of_many_objectives(config) + _check_models(args, config):
        logger.warning("PAMA: %s", warning)
    config, resume = prepare_resume(args, config, allow_other_objectives=allowed["other_objectives"])

    args.pama = config
    if scored_by_models := config.scored_in("ranks", "replicas"):
        # Truthy, so that OpenRLHF initialises the reward groups.
        setattr(args, "reward.model_name_or_path", scored_by_models[0].location)
    models = [objective for objective in config.scored_in("ranks") if objective in config.trained]
    if models and estimator == "gae" and getattr(args, "critic.model_name_or_path") is None:
        setattr(args, "critic.model_name_or_path", models[0].location)  # as in OpenRLHF
    critic = getattr(args, "critic.model_name_or_path") or getattr(args, "actor.model_name_or_path")
    if estimator == "gae" and critic:
        from pama_plugin.host.actors.critic import load_value_heads  # late: imports DeepSpeed

        load_value_heads(critic, config.trained_names)  # refuses the heads of other objectives
    # Truthy, so that OpenRLHF's validation accepts --eval.dataset. ``_ready`` resets it where OpenRLHF must build
    # reward-model groups; our rollout actor does not pass it on.
    setattr(args, "reward.remote_url", "pama")
    _swap(args, config, plan, resume, allow_waiting=allowed["waiting"])
    return args


def _check_host_flags(args: argparse.Namespace, config: PamaConfig) -> None:
    stock = [f"--{flag} {value}" for flag in STOCK_REWARD_FLAGS if (value := getattr(args, flag))]
    if stock:
        raise ConfigError(f"with objectives, every reward must be a --pama.objective, found {', '.join(stock)}")
    for flag, why in BROKEN_IN_THE_HOST.items():
        if getattr(args, flag):
            raise ConfigError(f"--{flag} must be left out: {why}; found {getattr(args, flag)}")
    if not getattr(args, "vllm.num_engines"):
        raise ConfigError(
            "--vllm.num_engines must be at least 1, because OpenRLHF's PPO generates with vLLM, found none"
        )
    _check_agent(getattr(args, "train.agent_func_path"), config)
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
    needs_groups = "groups_B" in rule.parameters
    if needs_groups and getattr(args, "rollout.n_samples_per_prompt") == 1:
        raise ConfigError(
            f"--rollout.n_samples_per_prompt must be at least 2 with --loss {config.loss}, which compares the "
            "responses to one prompt, found 1"
        )
    grouped = [objective.name for objective in config.objectives if objective.normalize == "group"]
    if grouped and getattr(args, "rollout.n_samples_per_prompt") == 1:
        raise ConfigError(
            f"--rollout.n_samples_per_prompt must be at least 2 with normalize=group ({', '.join(grouped)}), found 1"
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
    is_default = isinstance(getattr(args, "algo.dynamic_filtering_range"), tuple)  # a flag gives a list
    if config.filter_by == WEIGHTED_SUM and is_default:
        raise ConfigError(
            f"--pama.filter_by {WEIGHTED_SUM} needs a --algo.dynamic_filtering_range for the weighted sum of "
            f"{', '.join(config.trained_names)}, found the default"
        )
    rated = config.filtered_by
    if late := [each for each in rated if each in config.scored_in("ranks", "replicas")]:
        raise ConfigError(
            f"--pama.filter_by {config.filter_by} must be scored in the rollout, found "
            f"{', '.join(f'{objective.name} of kind {objective.kind}' for objective in late)}, scored after it"
        )
    # Filtering comes before failures are handled: a prompt whose responses have no reward has no rating.
    if tolerant := [objective.name for objective in rated if objective.on_failure.action != "fail"]:
        raise ConfigError(
            "--algo.dynamic_filtering_enable rates prompts by their rewards: on_failure must be fail, found another "
            f"policy for {', '.join(tolerant)}"
        )
    ranges = [objective.range for objective in rated if objective.range is not None]
    if len(ranges) == len(rated):
        weights = [objective.weight.at(0) if config.filter_by == WEIGHTED_SUM else 1.0 for objective in rated]
        low = sum(weight * bounds.low for weight, bounds in zip(weights, ranges))
        high = sum(weight * bounds.high for weight, bounds in zip(weights, ranges))
        if high <= smallest or low >= largest:
            raise ConfigError(
                f"{between} must contain rewards between {low:g} and {high:g}, as range= says of "
                f"{config.filter_by}, found none: every prompt would be filtered out"
            )
    return config


def _check_agent(agent: str | None, config: PamaConfig) -> None:
    names = ", ".join(objective.name for objective in config.scored_in("agent"))
    if names and not agent:
        raise ConfigError(f"objectives of kind agent need --train.agent_func_path, found none with {names}")
    if agent and not Path(agent).is_file():
        raise ConfigError(f"--train.agent_func_path must be a file, found {agent}")


def _check_models(args: argparse.Namespace, config: PamaConfig) -> list[str]:
    """Return warnings of likely mistakes; raise ``ConfigError`` if a model cannot read the policy's token ids."""
    warnings = []
    for objective in config.objectives:
        warnings += [f"objective {objective.name!r}: {line}" for line in objective.check()]
    if getattr(args, "train.agent_func_path") and not config.scored_in("agent"):
        warnings.append(
            "--train.agent_func_path: the agent's reward is no objective; --pama.objective NAME=agent:reward adds it"
        )
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


def _swap(
    args: argparse.Namespace, config: PamaConfig, plan: Plan, resume: Resume | None, *, allow_waiting: bool
) -> None:
    import openrlhf.trainer.ray.vllm_engine as vllm_engine  # first: importing deepspeed before vLLM breaks vLLM
    from openrlhf.trainer import ppo_trainer, ppo_trainer_async

    from pama_plugin.host.actors import critic, reward_groups, rollout, trainer, trainer_async

    seed = getattr(args, "train.seed") if getattr(args, "train.full_determinism_enable") else None
    vllm_engine.RolloutRayActor = rollout.rollout_actor(config, seed)
    ppo_trainer.PPOTrainer = trainer.PPOTrainer
    ppo_trainer_async.PPOTrainerAsync = trainer_async.PPOTrainerAsync
    ppo_trainer_async.TrainingActor = trainer_async.TrainingActor
    ppo_trainer_async.GenerateSamplesActor = trainer_async.GenerateSamplesActor
    main = cast(Command, sys.modules["__main__"])
    main.CriticModelActor = critic.CriticModelActor
    main.RayActorGroup = reward_groups.group_builder(
        config, plan, main.RayActorGroup, main.RewardModelActor, main.PolicyModelActor
    )
    main.get_strategy = _ready(main.get_strategy, config, plan, resume, allow_waiting=allow_waiting)


def _ready(
    stock: Callable[[Any], Strategy], config: PamaConfig, plan: Plan, resume: Resume | None, *, allow_waiting: bool
) -> Callable[[Any], Strategy]:
    """Wrap ``get_strategy``, the first call in ``train``: Ray is up, the arguments are validated, no GPU is reserved.

    It prints the plan, compares it with the nodes that Ray has, and asks them for the plugin.
    """

    def get_strategy(args: Any) -> Strategy:
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        cluster = [
            Node(node["NodeManagerAddress"], int(node["Resources"].get("GPU", 0)), node["Resources"].get("CPU", 0))
            for node in nodes
        ]
        print(format_plan(plan, cluster), flush=True)
        try:
            check_cluster(plan, cluster)
        except ConfigError as error:
            if not allow_waiting:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)
            print(f"[Warning] {error}", flush=True)
        try:
            for warning in ask_nodes(config, nodes):
                print(f"[Warning] PAMA: {warning}", flush=True)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        if resume is not None:
            resume.point()
        if config.scored_in("ranks", "replicas"):
            args.reward.remote_url = None  # so that OpenRLHF builds the reward-model groups
        return stock(args)

    return get_strategy

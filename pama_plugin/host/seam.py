"""Replaces OpenRLHF's classes with ours, and refuses runs that cannot work.

The plugin relies on (``fingerprints`` guards it, ``tests/contract/test_seam.py`` checks it against the real wheels):

- ``openrlhf.cli.train_ppo_ray`` as ``__main__``: calls ``parse_args`` once. ``train`` looks up ``RayActorGroup``,
  ``PolicyModelActor``, ``ReferenceModelActor``, ``CriticModelActor`` and ``RewardModelActor`` in its globals, builds
  the policy's group before the reference's and one group of reward models unless ``args.reward.remote_url`` is set,
  imports ``PPOTrainer`` or ``PPOTrainerAsync`` in its body, and calls ``get_strategy``, another global, after Ray has
  started and before it reserves what ``placement`` computes;
- ``openrlhf.trainer.ppo_trainer``: ``prepare_datasets`` looks up ``PromptDataset`` in its module's globals, where our
  trainers replace it in their own processes;
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
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, cast

from pama_plugin.errors import ConfigError
from pama_plugin.host.preflight.columns import check_columns
from pama_plugin.host.preflight.fingerprints import check_host
from pama_plugin.host.preflight.flags import check_evaluation, check_flags, check_models
from pama_plugin.host.preflight.memory import estimate
from pama_plugin.host.preflight.nodes import ask_nodes
from pama_plugin.host.preflight.placement import Node, Plan, check_cluster, format_plan, make_plan, parse_cluster
from pama_plugin.host.preflight.resume import Resume, adapters_of, prepare_resume
from pama_plugin.host.protocols import Command, Strategy
from pama_plugin.host.sigterm import end_on_sigterm
from pama_plugin.settings.load import dump_config, load_config
from pama_plugin.settings.names import STOCK
from pama_plugin.settings.run import PamaConfig, warn_of_many_objectives

logger = logging.getLogger(__name__)

PERMISSIONS = ("unsupported_host", "other_objectives", "other_rule", "waiting")  # --pama.allow_…


def install(args: argparse.Namespace) -> argparse.Namespace:
    """Turn the parsed flags into a ``PamaConfig`` at ``args.pama`` and replace OpenRLHF's classes with ours.

    With ``--pama.plan``, print the plan and the settings, and end the command.

    Raises:
        ConfigError: the run cannot work; nothing has been replaced.
    """
    flags = {key.removeprefix("pama."): vars(args).pop(key) for key in list(vars(args)) if key.startswith("pama.")}
    allowed = {name: flags.pop(f"allow_{name}") for name in PERMISSIONS}
    objectives, file, loss, plan_for = (flags.pop(name) for name in ("objective", "config", "loss", "plan"))
    evaluate_only = bool(flags.pop("evaluate_only"))
    given = [objectives, file, plan_for, evaluate_only or None, *flags.values()]
    any_flag = any(value not in (None, []) for value in given)
    if loss == STOCK or not (loss or file):
        if any_flag:
            raise ConfigError(f"--pama.* flags need --loss RULE other than {STOCK}, found --loss {loss}")
        return args

    estimator = getattr(args, "algo.advantage.estimator")
    level = "token" if estimator == "gae" else "sequence"
    config = load_config(loss, objectives, file, **flags, default_level=level)
    warnings = check_host(allowed["unsupported_host"]) + warn_of_many_objectives(config)
    config = check_flags(args, config)
    if evaluate_only:
        check_evaluation(args)
    plan = make_plan(args, config)
    if plan_for is None:  # a plan is made anywhere, also where the models are not
        warnings += check_models(args, config)
        warnings += check_columns(args, config)
    for warning in warnings:
        logger.warning("PAMA: %s", warning)
    if plan_for is not None:
        cluster = parse_cluster(plan_for)
        print(_describe(args, config, plan, cluster), dump_config(config), sep="\n\n", end="")
        check_cluster(plan, cluster)
        sys.exit()
    asked_to_resume = getattr(args, "ckpt.load_enable")
    config, resume = prepare_resume(
        args,
        config,
        allow_other_objectives=allowed["other_objectives"],
        allow_other_rule=allowed["other_rule"],
    )

    if evaluate_only and asked_to_resume and resume is None:
        place = getattr(args, "ckpt.path")
        raise ConfigError(
            f"--pama.evaluate_only with --ckpt.load_enable needs a whole checkpoint in {place}, found none"
        )
    args.pama, args.pama_adapters, args.pama_terminal = config, adapters_of(vars(args)), sys.stdout.isatty()
    args.pama_evaluate_only = evaluate_only
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


def _describe(args: argparse.Namespace, config: PamaConfig, plan: Plan, cluster: Sequence[Node]) -> str:
    """The plan with the memory of its models, and what the numbers leave out."""
    memory = estimate(args, config, plan)
    lines = [format_plan(plan, cluster, memory.by_role)]
    if memory.by_role:
        lines.append(
            "GiB each: weights, gradients and optimizer, with what its step needs, without activations and buffers. "
            f"vLLM takes {getattr(args, 'vllm.gpu_memory_utilization'):g} of each of its GPUs."
        )
    for reason in dict.fromkeys(memory.unknown.values()):
        roles = ", ".join(role for role, why in memory.unknown.items() if why == reason)
        lines.append(f"GiB of {roles} not known: {textwrap.shorten(reason, 100)}")
    return "\n".join(lines)


def _swap(
    args: argparse.Namespace, config: PamaConfig, plan: Plan, resume: Resume | None, *, allow_waiting: bool
) -> None:
    import openrlhf.trainer.ray.vllm_engine as vllm_engine  # first: importing deepspeed before vLLM breaks vLLM
    from openrlhf.trainer import ppo_trainer, ppo_trainer_async

    from pama_plugin.host.actors import critic, reward_groups, rollout, trainer, trainer_async

    seed = getattr(args, "train.seed") if getattr(args, "train.full_determinism_enable") else None
    vllm_engine.RolloutRayActor = rollout.rollout_actor(config, seed, compare=_may_compare(args))
    ppo_trainer.PPOTrainer = trainer.PPOTrainer
    ppo_trainer_async.PPOTrainerAsync = trainer_async.PPOTrainerAsync
    ppo_trainer_async.TrainingActor = trainer_async.TrainingActor
    ppo_trainer_async.GenerateSamplesActor = trainer_async.GenerateSamplesActor
    main = cast(Command, sys.modules["__main__"])
    main.CriticModelActor = critic.CriticModelActor
    inside = None
    if getattr(args, "ds.lora.rank"):
        from pama_plugin.host.actors import policy  # imports PEFT

        main.PolicyModelActor, inside = policy.PolicyModelActor, main.ReferenceModelActor
    main.RayActorGroup = reward_groups.group_builder(
        config,
        plan,
        main.RayActorGroup,
        main.RewardModelActor,
        main.PolicyModelActor,
        reference_in_policy=inside,
        saves=not args.pama_evaluate_only,
    )
    main.get_strategy = _ready(main.get_strategy, config, plan, resume, allow_waiting=allow_waiting)


def _may_compare(args: argparse.Namespace) -> bool:
    """Whether vLLM's log-probabilities of its first rollouts can be compared with the policy's.

    vLLM's are those before temperature and top_p, unless OpenRLHF asks for them itself; the policy's have the
    temperature. In asynchronous training and with dynamic filtering one batch may have responses of several rollouts,
    some of them without the column.
    """
    plain = getattr(args, "rollout.temperature") == 1 and getattr(args, "rollout.top_p") == 1
    return plain and not getattr(args, "train.async_enable") and not getattr(args, "algo.dynamic_filtering_enable")


def _ready(
    stock: Callable[[Any], Strategy], config: PamaConfig, plan: Plan, resume: Resume | None, *, allow_waiting: bool
) -> Callable[[Any], Strategy]:
    """Wrap ``get_strategy``, the first call in ``train``: Ray is up, the arguments are validated, no GPU is reserved.

    It prints the plan, compares it with the nodes that Ray has, and asks them for the plugin.
    """

    def get_strategy(args: Any) -> Strategy:
        import ray

        end_on_sigterm(args)
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

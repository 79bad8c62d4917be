"""What of OpenRLHF is swapped, and when the plugin refuses to run.

Relied on (``tests/contract/test_seam.py`` checks it against the real wheel):

- ``openrlhf.cli.train_ppo_ray`` as ``__main__``: calls ``parse_args`` once, looks ``RayActorGroup`` up in its own
  globals, builds one group of ``RewardModelActor`` unless ``args.reward.remote_url`` is set, and imports ``PPOTrainer``
  from ``openrlhf.trainer.ppo_trainer`` inside ``train``;
- ``openrlhf.trainer.ray.vllm_engine``: ``create_vllm_engines`` looks ``RolloutRayActor`` up in its module's globals;
- the classes that ``trainer``, ``experience``, ``rewards`` and ``rollout`` of this package subclass.

Ray sends an importable class to its actors by reference, so patching a method here would be lost there. What arrives is
an actor class replaced by a subclass: that is all this module does, and all of it in the driver.
"""

import argparse
import sys
from importlib.metadata import version

from pama_plugin.config import STOCK, PamaConfig, load_config
from pama_plugin.errors import ConfigError

SUPPORTED_HOSTS = ("0.11.2",)

# Each of these gives the host its one reward; with objectives there is no place for it.
STOCK_REWARD_FLAGS = ("reward.model_name_or_path", "reward.remote_url", "train.agent_func_path")

# Evaluation and dynamic filtering look at one number per response before any reward model has seen it.
READ_IN_THE_ROLLOUT = ("eval.dataset", "algo.dynamic_filtering_enable")


def install(args: argparse.Namespace) -> argparse.Namespace:
    """Turn the parsed flags into a ``PamaConfig`` at ``args.pama`` and put our classes in the host's place.

    Raises:
        ConfigError: the run cannot work; nothing has been swapped.
    """
    flags = {key.removeprefix("pama."): vars(args).pop(key) for key in list(vars(args)) if key.startswith("pama.")}
    allow_unsupported_host = flags.pop("allow_unsupported_host")
    objectives, file, loss = flags.pop("objective"), flags.pop("config"), flags.pop("loss")
    asked = objectives or file or any(value is not None for value in flags.values())
    if loss == STOCK or not (loss or file):
        if asked:
            raise ConfigError(f"--pama.* flags need --loss RULE other than {STOCK}, found --loss {loss}")
        return args

    estimator = getattr(args, "algo.advantage.estimator")
    level = "token" if estimator == "gae" else "sequence"
    config = load_config(loss, objectives, file, **flags, default_level=level)
    _check_release(allow_unsupported_host)
    _check_host_flags(args, config)
    # Only these two read a reward in the rollout; without one, a stock trainer could not train on it by accident.
    _swap(config, scalar_reward=any(getattr(args, flag) for flag in READ_IN_THE_ROLLOUT))

    args.pama = config
    models = config.of_kind("rm")
    if models:
        # Truthy, so that the host initialises the reward groups, and takes the first as the critic's default.
        setattr(args, "reward.model_name_or_path", models[0].location)
        if estimator == "gae" and "value_head_prefix" in models[0].options:
            # The critic starts as that model, with its head.
            setattr(args, "ds.value_head_prefix", models[0].options["value_head_prefix"])
    else:
        # Truthy, so that the host builds no reward-model group; our rollout actor does not pass it on.
        setattr(args, "reward.remote_url", "pama")
    return args


def _check_release(allow_unsupported_host: bool) -> None:
    found = version("openrlhf")
    if found.partition("+")[0] not in SUPPORTED_HOSTS and not allow_unsupported_host:
        raise ConfigError(
            f"OpenRLHF must be one of {', '.join(SUPPORTED_HOSTS)}, found {found}; "
            "--pama.allow_unsupported_host runs it all the same"
        )


def _check_host_flags(args: argparse.Namespace, config: PamaConfig) -> None:
    given = [f"--{flag} {value}" for flag in STOCK_REWARD_FLAGS if (value := getattr(args, flag))]
    if given:
        raise ConfigError(f"with objectives, every reward is a --pama.objective, found the stock {', '.join(given)}")
    if getattr(args, "algo.advantage.estimator") == "gae" and len(config.objectives) > 1:
        raise ConfigError(
            f"--algo.advantage.estimator gae needs one value head per objective, which this version does not have yet: "
            f"use one objective or another estimator, found {len(config.objectives)} objectives"
        )
    if getattr(args, "train.async_enable"):
        raise ConfigError("--train.async_enable is not supported with objectives yet: leave it out")
    for flag in READ_IN_THE_ROLLOUT:
        if getattr(args, flag) and config.of_kind("rm"):
            raise ConfigError(
                f"--{flag} needs every reward in the rollout, where an rm objective cannot be scored yet, "
                f"found {', '.join(objective.name for objective in config.of_kind('rm'))}"
            )


def _swap(config: PamaConfig, *, scalar_reward: bool) -> None:
    import openrlhf.trainer.ray.vllm_engine as vllm_engine  # first: importing deepspeed before vLLM spoils its set-up
    from openrlhf.trainer import ppo_trainer

    from pama_plugin.host import rewards, rollout, trainer

    vllm_engine.RolloutRayActor = rollout.rollout_actor(config, scalar_reward)
    ppo_trainer.PPOTrainer = trainer.PPOTrainer
    main = sys.modules["__main__"]
    main.RayActorGroup = rewards.group_builder(config, main.RayActorGroup, main.RewardModelActor)

"""Makes a ``PamaConfig`` of flags and of YAML, and writes it as YAML. Flags take precedence:

--loss pama --pama.objective "sentiment=rm:./reward-model" --pama.objective "length=builtin:length,scale=140"

loss: pama
objectives:
  sentiment: rm:./reward-model
  length: {kind: builtin, location: length, scale: 140}
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from pama_plugin.aggregation import available_rules, get_rule
from pama_plugin.errors import ConfigError
from pama_plugin.settings.objective import Objective, describe_error, make_objective, parse_objective
from pama_plugin.settings.run import PamaConfig
from pama_plugin.settings.source import group_by_source
from pama_plugin.settings.yaml_text import load_yaml


def load_config(
    loss: str | None,
    objectives: Iterable[str],
    file: str | None,
    level: str | None,
    noon: bool | None,
    best: str | None = None,
    probe: str | None = None,
    whiten: bool | None = None,
    option: Iterable[str] = (),
    probe_gradients: str | None = None,
    stop_at_front: str | None = None,
    filter_by: str | None = None,
    log_rollouts: int | str | None = None,
    stop_at_kl: float | str | None = None,
    rescale: str | None = None,
    inactive_below: float | str | None = None,
    preferences: str | None = None,
    preference_template: str | None = None,
    eval_preferences: int | str | None = None,
    *,
    default_level: str,
) -> PamaConfig:
    """Merge flags and file. A flag replaces the setting of the file, an objective the one of the same name.

    ``rescale`` is resolved: ``auto`` becomes ``unit`` or ``none``, so that what is saved does not depend on defaults.

    ``default_level`` is that of ``pama``. Rules that compare the responses to a prompt have one level, ``sequence``;
    the default of all others is ``token``.

    Raises:
        ConfigError: a setting is invalid. The message names the flag or file, the requirement and the value.
    """
    content = _read(file) if file else {}
    flags = {
        "loss": loss,
        "level": level,
        "noon": noon,
        "whiten": whiten,
        "best": best,
        "probe": probe,
        "probe_gradients": probe_gradients,
        "stop_at_front": stop_at_front,
        "filter_by": filter_by,
        "log_rollouts": log_rollouts,
        "stop_at_kl": stop_at_kl,
        "rescale": rescale,
        "inactive_below": inactive_below,
        "preferences": preferences,
        "preference_template": preference_template,
        "eval_preferences": eval_preferences,
    }
    listed = {key: value for key, value in content.items() if value is not None or key == "probe"}
    settings = listed | {key: value for key, value in flags.items() if value is not None}
    settings["objectives"] = _merge(objectives, content, file)
    settings["options"] = _read_options(content.get("options", {}), option)
    if not settings.get("probe", True):  # YAML reads off as false, and an empty value as None
        settings["probe"] = "off"
    if (name := settings.setdefault("loss", "")) in available_rules():
        rule = get_rule(name)
        if settings.get("level") is not None and rule.combines == "rewards":  # PamaConfig always has a level
            raise ConfigError(f"--pama.level has no effect with --loss {name}, which combines rewards: remove it")
        if "groups_B" in rule.parameters:
            default_level = "sequence"
        elif "level" not in rule.parameters:
            default_level = "token"
    settings.setdefault("level", default_level)
    try:
        config = PamaConfig.model_validate(settings)
        scaled = "scale" in config.rehearse(torch.zeros(len(config.trained), 2, 1)).metrics
        return config.model_copy(update={"rescale": "unit" if scaled else "none"})
    except ValidationError as error:
        raise ConfigError(describe_error(error)) from error


def load_objectives(objectives: Iterable[str], file: str | None) -> tuple[Objective, ...]:
    """The objectives of flags and file, without a rule. Raises ``ConfigError`` as ``load_config``."""
    loaded = _merge(objectives, _read(file) if file else {}, file)
    try:
        group_by_source(loaded)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return loaded


def as_settings(config: PamaConfig) -> dict[str, Any]:
    """The configuration as plain values."""
    rule = get_rule(config.loss)  # the loader refuses what has no effect
    without_effect = {"noon"} - set(rule.parameters) | ({"level"} if rule.combines == "rewards" else set())
    settings = config.model_dump(exclude={"objectives", *without_effect}, exclude_none=True)
    settings["objectives"] = {objective.name: objective.dump() for objective in config.objectives}
    return settings


def dump_config(config: PamaConfig) -> str:
    """The configuration as YAML; ``--pama.config`` loads it as an equal configuration."""
    return yaml.safe_dump(as_settings(config), sort_keys=False, allow_unicode=True)


def _merge(objectives: Iterable[str], content: dict[str, Any], file: str | None) -> tuple[Objective, ...]:
    merged = {name: make_objective(name, spec, f"{file}: objective {name!r}") for name, spec in _listed(content, file)}
    flagged: dict[str, Objective] = {}
    for text in objectives:
        objective = parse_objective(text)
        if objective.name in flagged:
            raise ConfigError(f"--pama.objective {text!r}: objective names must differ, found {objective.name!r} twice")
        flagged[objective.name] = objective
    merged |= flagged
    if not merged:
        raise ConfigError("at least one --pama.objective NAME=KIND:LOCATION is needed, found none")
    return tuple(merged.values())


def _read_options(listed: Any, flagged: Iterable[str]) -> dict[str, Any]:
    """Merge the options of a file with ``KEY=VALUE`` flags, whose values are YAML."""
    if not isinstance(listed, dict) or not all(isinstance(key, str) for key in listed):
        raise ConfigError(f"options must map names to values, found {listed!r}")
    options: dict[str, Any] = {}
    for text in flagged:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--pama.option must be KEY=VALUE, found {text!r}")
        if key in options:
            raise ConfigError(f"--pama.option {text!r}: options must differ, found {key!r} twice")
        try:
            options[key] = load_yaml(value)
        except ValueError as error:
            raise ConfigError(f"--pama.option {text!r}: {error}") from error
    return listed | options


def _read(file: str) -> dict[str, Any]:
    try:
        content = load_yaml(Path(file).read_bytes())
    except OSError as error:
        raise ConfigError(f"--pama.config: cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--pama.config: {file}: {error}") from error
    known = sorted(PamaConfig.model_fields)
    if not isinstance(content, dict) or set(content) - set(known):
        unknown = [str(key) for key in content if key not in known] if isinstance(content, dict) else []
        problem = ", ".join(unknown) or type(content).__name__
        raise ConfigError(f"--pama.config: {file} must be a mapping with the keys {', '.join(known)}, found {problem}")
    return content


def _listed(content: dict[str, Any], file: str | None) -> Iterable[tuple[str, Any]]:
    listed = content.get("objectives", {})
    if not isinstance(listed, dict):
        raise ConfigError(
            f"--pama.config: {file}: objectives must map names to specifications, found {type(listed).__name__}"
        )
    return listed.items()

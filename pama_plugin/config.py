"""What the user asked for: parsed and validated once, before Ray starts, then frozen.

The same settings come from flags or from YAML, and flags win:

    --loss pama --pama.objective "sentiment=rm:./reward-model" --pama.objective "length=builtin:length,scale=140"

    loss: pama
    objectives:
      sentiment: rm:./reward-model
      length: {kind: builtin, location: length, scale: 140}
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict

from pama_plugin.aggregation import LEVELS, available_rules
from pama_plugin.errors import ConfigError
from pama_plugin.kinds import Kind
from pama_plugin.objective import Objective, make_objective, parse_objective

STOCK = "ppo"
BestRule = Literal["min", "weighted", "hypervolume"]
BEST_RULES = get_args(BestRule)
ProbeMode = Literal["off", "warn", "strict"]
PROBE_MODES = get_args(ProbeMode)


class PamaConfig(BaseModel):
    """The whole run: which rule combines which objectives, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: str
    objectives: tuple[Objective, ...]
    level: Literal["token", "sequence", "batch"] = "token"
    noon: bool = True
    best: BestRule | None = None
    probe: ProbeMode = "warn"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(objective.name for objective in self.objectives)

    @property
    def trained(self) -> tuple[Objective, ...]:
        """The objectives that the aggregation combines, and the critic has a head for; all others are only logged."""
        return tuple(objective for objective in self.objectives if objective.role == "train")

    @property
    def trained_names(self) -> tuple[str, ...]:
        return tuple(objective.name for objective in self.trained)

    def weights_at(self, steps_done: int) -> tuple[float, ...]:
        """Those of the trained objectives, in the step that follows ``steps_done`` others."""
        return tuple(objective.weight.at(steps_done) for objective in self.trained)

    def of_kind(self, *kinds: Kind) -> tuple[Objective, ...]:
        return tuple(objective for objective in self.objectives if objective.kind in kinds)


def load_config(
    loss: str | None,
    objectives: Iterable[str],
    file: str | None,
    level: str | None,
    noon: bool | None,
    best: str | None = None,
    probe: str | None = None,
    *,
    default_level: str,
) -> PamaConfig:
    """Merge flags and file. A flag replaces what the file says of the same setting, an objective the same name's.

    Raises:
        ConfigError: the first thing that cannot be run, with the flag or file, the rule and what was found.
    """
    content = _read(file) if file else {}
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

    roles = [objective.role for objective in merged.values()]
    if "constraint" in roles:
        name = next(name for name, objective in merged.items() if objective.role == "constraint")
        raise ConfigError(f"role=constraint needs a rule that knows constraints, which no --loss does, found {name!r}")
    if "train" not in roles:
        raise ConfigError(f"at least one objective must have role=train, found none among {', '.join(merged)}")

    loss = loss or str(content.get("loss", ""))
    if loss not in available_rules():
        known = ", ".join(available_rules())
        raise ConfigError(f"--loss must be one of {known}, or {STOCK} without objectives, found {loss!r}")
    level = level or content.get("level")
    noon = content.get("noon") if noon is None else noon
    if level is not None and level not in LEVELS:
        raise ConfigError(f"--pama.level must be one of {', '.join(LEVELS)}, found {level!r}")
    best = best or content.get("best")
    if best is not None and best not in BEST_RULES:
        raise ConfigError(f"--pama.best must be one of {', '.join(BEST_RULES)}, found {best!r}")
    probe = probe or content.get("probe", "warn") or "off"  # which YAML takes for false
    if probe not in PROBE_MODES:
        raise ConfigError(f"--pama.probe must be one of {', '.join(PROBE_MODES)}, found {probe!r}")
    if not isinstance(noon, bool | None):
        raise ConfigError(f"{file}: noon must be true or false, found {noon!r}")
    if loss == "linear" and (level is not None or noon is not None):
        raise ConfigError("--pama.level and --pama.no_noon have no meaning with --loss linear: leave them out")
    return PamaConfig.model_validate(
        {
            "loss": loss,
            "objectives": tuple(merged.values()),
            "level": level or default_level,
            "noon": True if noon is None else noon,
            "best": best,
            "probe": probe,
        }
    )


def dump_config(config: PamaConfig) -> str:
    """The configuration as YAML that ``--pama.config`` takes, and makes the same configuration of."""
    # A weighted sum projects nothing, so the loader refuses both with it.
    meaningless = {"level", "noon"} if config.loss == "linear" else set()
    settings = config.model_dump(exclude={"objectives", *meaningless})
    settings["objectives"] = {objective.name: objective.dump() for objective in config.objectives}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML as SafeLoader reads it, except that a repeated key is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"keys must differ, found {', '.join(repeated)} twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _read(file: str) -> dict[str, Any]:
    try:
        content = yaml.load(Path(file).read_text(), _UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"--pama.config: cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, too deep a nesting
        raise ConfigError(f"--pama.config: {file} is not valid YAML: {error}") from error
    known = sorted(PamaConfig.model_fields)
    if not isinstance(content, dict) or set(content) - set(known):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"--pama.config: {file} must be a mapping of {', '.join(known)}, found {found}")
    return content


def _listed(content: dict[str, Any], file: str | None) -> Iterable[tuple[str, Any]]:
    listed = content.get("objectives", {})
    if not isinstance(listed, dict):
        raise ConfigError(
            f"--pama.config: {file}: objectives must map names to specifications, found {type(listed).__name__}"
        )
    return listed.items()

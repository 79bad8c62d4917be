"""What the user asked for: parsed and validated once, before Ray starts, then frozen.

The same settings come from flags or from YAML, and flags win:

    --loss pama --pama.objective "sentiment=rm:./reward-model" --pama.objective "length=builtin:length,scale=140"

    loss: pama
    objectives:
      sentiment: rm:./reward-model
      length: {kind: builtin, location: length, scale: 140}
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pama_plugin.aggregation import LEVELS, available_rules
from pama_plugin.errors import ConfigError
from pama_plugin.rewards import check_location, load_builtin, split_location

Kind = Literal["rm", "py", "builtin"]

# A name becomes a part of metric keys such as reward/NAME, which trackers split at "/".
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
STOCK = "ppo"
BestRule = Literal["min", "weighted", "hypervolume"]
BEST_RULES = get_args(BestRule)


class Placement(BaseModel):
    """Where the ranks of an ``rm`` objective run, from its options of the same names; None is what ``--reward.*`` says.

    Args:
        gpus: ranks per node, or a fraction of one GPU for a single rank that shares it with other such objectives.
        nodes: how many times ``gpus``.
        offload: whether the parameters wait in the memory of the CPU.

    >>> Placement.model_validate({"gpus": "0.5", "offload": "true"})
    Placement(gpus=0.5, nodes=None, offload=True)
    """

    model_config = ConfigDict(frozen=True)

    gpus: float | None = None
    nodes: int | None = Field(None, ge=1)
    offload: bool | None = None

    @field_validator("gpus", "nodes", mode="before")
    @classmethod
    def _is_a_number(cls, number: Any) -> Any:
        return _refuse_bool(number)

    @field_validator("gpus")
    @classmethod
    def _is_whole_or_a_fraction(cls, gpus: float | None) -> float | None:
        if gpus is None or gpus >= 1 and gpus.is_integer() or 0 < gpus < 1 and round(gpus, 4) == gpus:
            return gpus
        raise ValueError("must be a whole number of ranks per node, or a fraction of one GPU with up to 4 decimals")

    @model_validator(mode="after")
    def _is_one_rank_if_a_fraction(self) -> "Placement":
        if self.gpus is not None and self.gpus < 1 and (self.nodes or 1) > 1:
            raise ValueError(f"gpus={self.gpus} is one rank that shares a GPU, so nodes must be 1, found {self.nodes}")
        return self


class Objective(BaseModel):
    """One named reward: ``NAME=KIND:LOCATION[,key=value…]``.

    >>> objective = parse_objective("polite=builtin:length,weight=0.5,scale=140")
    >>> objective.name, objective.weight, objective.options
    ('polite', 0.5, {'scale': '140'})
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Kind
    location: str = Field(min_length=1)
    weight: float = Field(1.0, gt=0, lt=math.inf)
    options: dict[str, Any] = {}

    @field_validator("name")
    @classmethod
    def _is_a_metric_key(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("must be a letter followed by letters, digits, '_', '.' or '-': it becomes a metric key")
        return name

    @field_validator("weight", mode="before")
    @classmethod
    def _is_a_number(cls, weight: Any) -> Any:
        return _refuse_bool(weight)

    @field_validator("kind", mode="before")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind not in get_args(Kind):
            raise ValueError(f"unknown kind {kind!r}; known: {', '.join(get_args(Kind))}")
        return kind

    @model_validator(mode="after")
    def _can_be_scored(self) -> "Objective":
        if self.kind == "builtin":
            load_builtin(self.location, self.options)
        elif self.kind == "py":
            check_location(self.location)
            self._take_options()
        else:
            _check_model(self.location)
            self._take_options("value_head_prefix", *Placement.model_fields)
            Placement.model_validate(self.options)
        return self

    @property
    def placement(self) -> Placement:
        """What an ``rm`` objective's own options say of its ranks."""
        return Placement.model_validate(self.options)

    def _take_options(self, *known: str) -> None:
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            takes = f"it takes {', '.join(('weight', *known))}"
            raise ValueError(f"kind {self.kind!r} has no option {', '.join(unknown)}; {takes}")

    def absolute(self) -> "Objective":
        """The same objective with local paths made absolute: workers need not share the driver's folder."""
        if self.kind == "py":
            path, function = split_location(self.location)
            return self.model_copy(update={"location": f"{path}:{function}"})
        if self.kind == "rm" and (folder := Path(self.location).expanduser()).exists():
            return self.model_copy(update={"location": str(folder.absolute())})
        return self


class PamaConfig(BaseModel):
    """The whole run: which rule combines which objectives, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: str
    objectives: tuple[Objective, ...]
    level: Literal["token", "sequence", "batch"] = "token"
    noon: bool = True
    best: BestRule | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(objective.name for objective in self.objectives)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(objective.weight for objective in self.objectives)

    def of_kind(self, *kinds: Kind) -> tuple[Objective, ...]:
        return tuple(objective for objective in self.objectives if objective.kind in kinds)


def parse_objective(text: str) -> Objective:
    """Parse ``NAME=KIND:LOCATION[,key=value…]``; anything else raises ``ConfigError``."""
    name, equals, rest = text.partition("=")
    return _objective(name, rest if equals else "", f"--pama.objective {text!r}")


def load_config(
    loss: str | None,
    objectives: Iterable[str],
    file: str | None,
    level: str | None,
    noon: bool | None,
    best: str | None = None,
    *,
    default_level: str,
) -> PamaConfig:
    """Merge flags and file. A flag replaces what the file says of the same setting, an objective the same name's.

    Raises:
        ConfigError: the first thing that cannot be run, with the flag or file, the rule and what was found.
    """
    content = _read(file) if file else {}
    merged = {name: _objective(name, spec, f"{file}: objective {name!r}") for name, spec in _listed(content, file)}
    flagged: dict[str, Objective] = {}
    for text in objectives:
        objective = parse_objective(text)
        if objective.name in flagged:
            raise ConfigError(f"--pama.objective {text!r}: objective names must differ, found {objective.name!r} twice")
        flagged[objective.name] = objective
    merged |= flagged
    if not merged:
        raise ConfigError("at least one --pama.objective NAME=KIND:LOCATION is needed, found none")

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
        }
    )


def dump_config(config: PamaConfig) -> str:
    """The configuration as YAML that ``--pama.config`` takes, and makes the same configuration of."""
    # A weighted sum projects nothing, so the loader refuses both with it.
    meaningless = {"level", "noon"} if config.loss == "linear" else set()
    settings = config.model_dump(exclude={"objectives", *meaningless})
    settings["objectives"] = {
        objective.name: objective.model_dump(include={"kind", "location", "weight"}) | objective.options
        for objective in config.objectives
    }
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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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


def _objective(name: str, spec: Any, source: str) -> Objective:
    """Build one objective from its name and either the rest of a flag or a mapping; errors name their ``source``."""
    if isinstance(spec, str):
        kind, colon, rest = spec.partition(":")
        location, *pairs = rest.split(",")
        options = dict(pair.partition("=")[::2] for pair in pairs)
        broken = [pair for pair in pairs if "=" not in pair]
        if not colon or broken or len(options) < len(pairs):
            found = f"{broken[0]!r} without '='" if broken else "an option twice" if colon else repr(spec)
            raise ConfigError(f"{source}: expected NAME=KIND:LOCATION[,key=value…], found {found}")
        fields: dict[str, Any] = options | {"kind": kind, "location": location}
    elif isinstance(spec, dict):
        fields = {str(key): value for key, value in spec.items()}
    else:
        raise ConfigError(f"{source}: expected NAME=KIND:LOCATION[,key=value…], found {spec!r}")
    shared = {key: fields.pop(key) for key in ("kind", "location", "weight") if key in fields}
    try:
        return Objective.model_validate(shared | {"name": name, "options": fields}).absolute()
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        found = f", found {first['input']!r}" if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{source}: {where}{message}{found}") from error


def _refuse_bool(number: Any) -> Any:
    if isinstance(number, bool):  # which Python, and so pydantic, takes for 0 or 1
        raise ValueError("must be a number")
    return number


def _check_model(location: str) -> None:
    """A folder must hold a model; what is no folder must read like a name on the hub, which the host resolves."""
    folder = Path(location).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"no reward model in {location}: it has no config.json")
    if not folder.exists() and (location.startswith((".", "/", "~")) or location.count("/") > 1):
        raise ValueError(f"no such folder: {location}")

"""``Objective``: a named reward and its options. Parsed and validated before Ray starts, then frozen.

The module contains, in this order: ``Objective`` with its validators, what it asks its kind, and its identity; and the
parsers, which keep secrets out of errors.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from pama_plugin.errors import ConfigError
from pama_plugin.rewards.kinds import KINDS, RewardKind
from pama_plugin.rewards.options import RejectBool
from pama_plugin.rewards.probes import PAIRS
from pama_plugin.settings.condition import Condition, parse_condition
from pama_plugin.settings.names import COMMON_OPTIONS
from pama_plugin.settings.values import (
    UNIT_WEIGHT,
    Bounds,
    OnFailure,
    Weight,
    parse_bounds,
    parse_on_failure,
    parse_weight,
)

Role = Literal["train", "monitor", "constraint"]
# What may be secret in an http objective: user info, all after the first question mark or hash, and a token in place of
# the name of its variable.
SECRET = re.compile(r"(?<=://).*@|(?<=[?#]).*|(?<=token_env=)[^,]*", re.DOTALL)
# A name is part of metric keys such as reward/NAME, which trackers split at "/".
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_MIB = 2**20


class Objective(BaseModel):
    """One named reward: ``NAME=KIND:LOCATION[,key=value…]``.

    Args:
        name: part of the metric keys.
        kind: the kind of reward, a name in ``KINDS``.
        location: the model, function, server or builtin that computes the reward.
        weight: weight in the aggregation; logged rewards are not weighted.
        role: ``monitor`` is scored and logged, never combined; ``constraint`` needs a rule with constraints.
        threshold: lower bound of the mean reward of a constraint.
        normalize: subtract the mean and divide by the standard deviation of the rollout batch, of the group of
            responses to one prompt, or of all rewards so far, before OpenRLHF's estimator.
        freeze_after: number of steps after which ``running`` statistics are fixed.
        clip: bounds of the reward that the estimator receives, applied after ``normalize``.
        range: bounds outside which a reward is a failure.
        on_failure: failure policy for a response without a reward.
        max_failures: maximum share of a step's responses without a reward; a larger share ends the run.
        abstain: whether None instead of a reward means that the objective does not apply to the response.
        when: the prompts to which the objective applies; responses to others are not scored.
        probe: name of the pairs of a good and a bad response that the reward must rank correctly at start.
        options: options of the kind.

    >>> objective = parse_objective("polite=builtin:length,weight=0.5,scale=140")
    >>> objective.name, objective.weight.start, objective.options
    ('polite', 0.5, {'scale': '140'})
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    location: str = Field(min_length=1)
    weight: Annotated[Weight, BeforeValidator(parse_weight)] = UNIT_WEIGHT
    role: Role = "train"
    threshold: Annotated[Annotated[float, Field(allow_inf_nan=False)] | None, RejectBool] = None
    normalize: Literal["none", "batch", "group", "running"] = "none"
    freeze_after: Annotated[Annotated[int, Field(ge=1)] | None, RejectBool] = None
    clip: Annotated[Bounds | None, BeforeValidator(parse_bounds)] = None
    range: Annotated[Bounds | None, BeforeValidator(parse_bounds)] = None
    on_failure: Annotated[OnFailure, BeforeValidator(parse_on_failure)] = OnFailure("fail")
    max_failures: Annotated[float, RejectBool, Field(ge=0, le=1)] = 1.0
    abstain: bool = False
    when: Annotated[Condition | None, BeforeValidator(parse_condition)] = None
    probe: str | None = None
    options: dict[str, Any] = {}

    @field_validator("name")
    @classmethod
    def _is_a_metric_key(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(
                "must be a letter followed by letters, digits, '_', '.' or '-', because it is part of metric keys"
            )
        return name

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind not in KINDS.names():
            raise ValueError(f"must be one of {', '.join(KINDS.names())}")
        KINDS[kind]  # an entry point that cannot be loaded raises ValueError
        return kind

    @model_validator(mode="after")
    def _fits_together(self) -> "Objective":
        if (self.role == "constraint") != (self.threshold is not None):
            raise ValueError("role=constraint and threshold=NUMBER must be set together")
        if self.freeze_after is not None and self.normalize != "running":
            raise ValueError(f"freeze_after needs normalize=running, found normalize={self.normalize}")
        shaped = (self.weight, self.normalize, self.clip) != (UNIT_WEIGHT, "none", None)
        if self.role == "monitor" and shaped:
            raise ValueError("weight, normalize and clip have no effect with role=monitor: remove them")
        if self.max_failures < 1 and self.on_failure.action == "fail":
            raise ValueError(
                "max_failures needs on_failure=mask or impute, found on_failure=fail, which ends the run at once"
            )
        if self.abstain and not self.reward_kind.abstains:
            raise ValueError(
                "abstain needs a kind whose reward may be None, such as py, http, judge or agent, found "
                f"{self.kind}, which scores every response; when= leaves out prompts"
            )
        return self

    @field_validator("probe")
    @classmethod
    def _is_an_aspect(cls, probe: str | None) -> str | None:
        if probe is not None and probe not in PAIRS:
            raise ValueError(f"must be one of {', '.join(PAIRS)}")
        return probe

    @model_validator(mode="after")
    def _can_be_scored(self) -> "Objective":
        if missing := self.reward_kind.missing_packages():
            raise ValueError(f"kind {self.kind!r} needs pip install 'pama_plugin[rewards]', found no {missing[0]}")
        self.check()
        return self

    @property
    def reward_kind(self) -> RewardKind:
        """The ``RewardKind`` of the objective."""
        return KINDS[self.kind]

    @property
    def settings(self) -> Any:
        """The options, validated by the model of the kind, or as a dict if the kind has no model."""
        model = self.reward_kind.resolve("model")
        if model is None:
            return self.options
        unknown = sorted(set(self.options) - set(self.reward_kind.options))
        if unknown:
            known = ", ".join((*COMMON_OPTIONS, *self.reward_kind.options))
            raise ValueError(f"kind {self.kind!r} has no option {', '.join(unknown)}; it takes {known}")
        return model.model_validate(self.options)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data set that the objective needs."""
        conditions = () if self.when is None else (self.when.column,)
        return tuple(dict.fromkeys((*conditions, *getattr(self.settings, "columns", ()))))

    def applies_to(self, columns: Mapping[str, Any]) -> bool:
        """Whether the objective applies to a prompt, by its columns."""
        return self.when is None or self.when.holds(columns)

    def check(self) -> list[str]:
        """Run the check of the kind: return its warnings; raise ``ValueError`` if the reward cannot be computed."""
        settings, check = self.settings, self.reward_kind.resolve("check")
        return list(check(self.location, settings) or ()) if check else []

    @property
    def needs_label(self) -> bool:
        """Whether the reward cannot be computed without the label of the prompt."""
        needs = self.reward_kind.resolve("needs_label")
        return bool(needs and needs(self.settings))

    def absolute(self) -> "Objective":
        """A copy with absolute paths, because workers may run in another folder than the driver."""
        kind = self.reward_kind
        absolute, named = kind.resolve("absolute"), kind.file_options
        options = {
            key: str(Path(value).expanduser().absolute()) if key in named and value else value
            for key, value in self.options.items()
        }
        location = absolute(self.location) if absolute else self.location
        return self.model_copy(update={"location": location, "options": options})

    def files(self) -> list[Path]:
        """The files that determine the reward."""
        files, named = self.reward_kind.resolve("files"), self.reward_kind.file_options
        found = files(self.location) if files else []
        return [Path(file) for file in (*found, *(self.options[key] for key in named if self.options.get(key)))]

    def identity(self, agent: str | None = None) -> str:
        """Kind, location, options and a hash of local files. Objectives with equal identities give equal rewards.

        The hash covers the size and the first and last MiB of each file. Options that do not change rewards are
        excluded.

        Args:
            agent: file of the user's agent.

        >>> parse_objective("length=builtin:length,scale=140,weight=2").identity()
        'builtin:length scale=140'
        """
        kind = self.reward_kind
        options = [f" {key}={value}" for key, value in self.options.items() if key not in kind.runtime_options]
        options += [] if self.when is None else [f" when={self.when}"]
        text = f"{self.kind}:{self.location}{''.join(sorted(options))}"
        paths = self.files()
        if kind.scored_in == "agent" and agent is not None:
            paths = [Path(agent)]
        return f"{text} sha256:{digest(paths)}" if paths else text

    def dump(self) -> dict[str, Any]:
        """The objective as a mapping for a configuration file, without defaults."""
        fields = self.model_dump(include={"kind", "location"})
        for key in COMMON_OPTIONS:
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                fields[key] = str(value) if isinstance(value, tuple) else value
        if self.when is not None:  # a value may contain a bar
            fields["when"] = {self.when.column: [*self.when.values]}
        if "weight" in fields and self.weight.shape == "constant":
            fields["weight"] = self.weight.start
        return fields | self.options


def digest(paths: Iterable[Path]) -> str:
    """A hash of name, size, and first and last MiB of each file."""
    return hashlib.sha256(b"".join(map(_sample, paths))).hexdigest()[:16]


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_MIB)
        file.seek(max(size - _MIB, 0))
        return f"{path.name} {size}".encode() + start + file.read(_MIB)


def parse_objective(text: str) -> Objective:
    """Parse ``NAME=KIND:LOCATION[,key=value…]``; raise ``ConfigError`` for anything else."""
    name, equals, rest = text.partition("=")
    shown = SECRET.sub("…", text) if _may_have_secrets(rest) else text
    where = f"--pama.objective {shown!r}"
    if not equals:
        raise ConfigError(f"{where}: expected NAME=KIND:LOCATION[,key=value…], found no '='")
    return make_objective(name, rest, where)


def make_objective(name: str, spec: Any, where: str) -> Objective:
    """Build an objective from its name and either ``KIND:LOCATION[,key=value…]`` or a mapping.

    Errors start with ``where``.
    """
    try:
        return _make_objective(name, spec, where)
    except ConfigError as error:
        raise ConfigError(_without_secrets(str(error), spec)) from None


def _may_have_secrets(spec: str) -> bool:
    """Whether the reward is a server; a regular expression may contain the same characters."""
    return spec.startswith("http:") or "://" in spec


def _without_secrets(message: str, spec: Any) -> str:
    """The message without parts of a user info or query, which a comma turns into options."""
    if not isinstance(spec, str) or not _may_have_secrets(spec):
        return message
    options = {*COMMON_OPTIONS, *KINDS["http"].options, *KINDS["judge"].options}
    parts = {part for secret in SECRET.findall(spec) for part in re.split("[,=&|:@]", secret)} - options
    for part in sorted(parts, key=len, reverse=True):
        message = message.replace(part, "…") if len(part) > 3 else message
    return message


def _make_objective(name: str, spec: Any, where: str) -> Objective:
    if isinstance(spec, str):
        kind, colon, rest = spec.partition(":")
        location, *pairs = _with_listed_columns(rest.split(","))
        options = dict(pair.partition("=")[::2] for pair in pairs)
        broken = [pair for pair in pairs if "=" not in pair]
        if not colon or broken or len(options) < len(pairs):
            problem = "an option twice" if colon else repr(spec)
            if broken:
                problem = f"{broken[0]!r} without '=' (a value with a comma needs a file)"
            raise ConfigError(f"{where}: expected NAME=KIND:LOCATION[,key=value…], found {problem}")
        fields: dict[str, Any] = options | {"kind": kind, "location": location}
    elif isinstance(spec, Mapping):
        fields = {str(key): value for key, value in spec.items()}
    else:
        raise ConfigError(f"{where}: expected NAME=KIND:LOCATION[,key=value…], found {spec!r}")
    shared = {key: fields.pop(key) for key in ("kind", "location", *COMMON_OPTIONS) if key in fields}
    if isinstance(shared.get("location"), list):  # a file may list replicas
        shared["location"] = "|".join(map(str, shared["location"]))
    try:
        return Objective.model_validate(shared | {"name": name, "options": fields}).absolute()
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe_error(error)}") from error
    except (OSError, RuntimeError) as error:  # from a path: unknown user, no permission, name too long
        raise ConfigError(f"{where}: {error}") from error


def _with_listed_columns(parts: list[str]) -> list[str]:
    """Join ``columns=a``, ``b`` to ``columns=a|b``."""
    joined = parts[:1]
    for part in parts[1:]:
        if joined[-1].startswith("columns=") and "=" not in part:
            joined[-1] += f"|{part}"
        else:
            joined.append(part)
    return joined


def describe_error(error: ValidationError) -> str:
    """The first error of pydantic in one line: location, rule and value. A message that starts with a flag is kept."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if message.startswith("--"):
        return message
    where = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
    value = f", found {first['input']!r}" if first["loc"] and first["type"] != "missing" else ""
    return f"{where}{message}{value}"

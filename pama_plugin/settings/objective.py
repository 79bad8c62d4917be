"""One objective: a named reward, and what is done with it. Parsed and validated before Ray starts, then frozen."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from pama_plugin.errors import ConfigError
from pama_plugin.rewards.kinds import KINDS, RewardKind
from pama_plugin.rewards.options import RejectBool
from pama_plugin.rewards.probes import PAIRS
from pama_plugin.rewards.response import Scorer
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
# A name becomes a part of metric keys such as reward/NAME, which trackers split at "/".
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_MIB = 2**20


class Objective(BaseModel):
    """One named reward: ``NAME=KIND:LOCATION[,key=value…]``.

    Args:
        name: a part of the metric keys.
        kind: what scores.
        location: which one of that kind.
        weight: its weight in the aggregation; logged rewards stay raw.
        role: ``monitor`` is scored and logged, never aggregated; ``constraint`` needs a rule that knows constraints.
        threshold: of a constraint.
        normalize: subtract the mean and divide by the standard deviation of the rollout batch, of the prompt's group of
            responses, or of all rewards so far, before the host's estimator.
        freeze_after: steps after which ``running`` statistics stay as they are.
        clip: bounds of the reward that the estimator sees, after ``normalize``.
        range: bounds outside which a reward is a failure.
        on_failure: what becomes of a response without a reward.
        max_failures: share of a step's responses that may be without a reward; more end the run.
        probe: pairs of a good and a bad response that the reward must tell apart when the run starts.
        options: what the kind takes besides.

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
    probe: str | None = None
    options: dict[str, Any] = {}

    @field_validator("name")
    @classmethod
    def _is_a_metric_key(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("must be a letter followed by letters, digits, '_', '.' or '-': it becomes a metric key")
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
            raise ValueError("role=constraint and threshold= need each other")
        if self.freeze_after is not None and self.normalize != "running":
            raise ValueError(f"freeze_after has a meaning with normalize=running alone, found {self.normalize}")
        shaped = (self.weight, self.normalize, self.clip) != (UNIT_WEIGHT, "none", None)
        if self.role == "monitor" and shaped:
            raise ValueError("role=monitor takes no weight, normalize or clip: nothing is made of its rewards")
        if self.max_failures < 1 and self.on_failure.action == "fail":
            raise ValueError("max_failures has no meaning with on_failure=fail, where one failure ends the run")
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
        """The record of its kind."""
        return KINDS[self.kind]

    @property
    def settings(self) -> Any:
        """The options as the kind's own model; as a dict of a kind that has no model."""
        model = self.reward_kind.resolve("model")
        if model is None:
            return self.options
        unknown = sorted(set(self.options) - set(self.reward_kind.options))
        if unknown:
            takes = ", ".join((*COMMON_OPTIONS, *self.reward_kind.options))
            raise ValueError(f"kind {self.kind!r} has no option {', '.join(unknown)}; it takes {takes}")
        return model.model_validate(self.options)

    def check(self) -> list[str]:
        """Warnings about the reward, from the check of its kind; ``ValueError`` if it cannot be computed."""
        settings, check = self.settings, self.reward_kind.resolve("check")
        return list(check(self.location, settings) or ()) if check else []

    def load_scorer(self, *, patient: bool) -> Scorer:
        """The scorer of an objective that is scored in the rollout; ``patient`` asks it to wait for a server."""
        scorer: Scorer = self.reward_kind.resolve("load")(self.location, self.settings, patient=patient)
        return scorer

    def absolute(self) -> "Objective":
        """The same objective with local paths made absolute: workers need not share the driver's folder."""
        absolute = self.reward_kind.resolve("absolute")
        return self.model_copy(update={"location": absolute(self.location)}) if absolute else self

    def identity(self, agent: str | None = None) -> str:
        """Kind, location and options, with a hash of local files: equal texts mean that equal responses score the same.

        Of each file the hash covers the size, and the first and the last MiB. Options that do not change the reward of
        a response are left out, and what a URL has after its "?" is hashed: it may hold a key.

        Args:
            agent: the file of the user's agent.

        >>> parse_objective("length=builtin:length,scale=140,weight=2").identity()
        'builtin:length scale=140'
        """
        kind = self.reward_kind
        options = [f" {key}={value}" for key, value in self.options.items() if key not in kind.runtime_options]
        location = self.location
        if re.match("https?://", location):
            location = re.sub(r"(?<=\?)[^|]+", lambda query: _digest(query[0].encode()), location)
        text = f"{self.kind}:{location}{''.join(sorted(options))}"
        files = kind.resolve("files")
        paths = files(self.location) if files else []
        if kind.scored_in == "agent" and agent is not None:
            paths = [Path(agent)]
        return f"{text} sha256:{_digest(*map(_sample, paths))}" if paths else text

    def dump(self) -> dict[str, Any]:
        """What a configuration file says of it, without the defaults."""
        given = self.model_dump(include={"kind", "location"})
        for key in COMMON_OPTIONS:
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                given[key] = str(value) if isinstance(value, tuple) else value
        if "weight" in given and self.weight.shape == "constant":
            given["weight"] = self.weight.start
        return given | self.options


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_MIB)
        file.seek(max(size - _MIB, 0))
        return f"{path.name} {size}".encode() + start + file.read(_MIB)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def parse_objective(text: str) -> Objective:
    """Parse ``NAME=KIND:LOCATION[,key=value…]``; anything else raises ``ConfigError``."""
    name, equals, rest = text.partition("=")
    # What stands before an @ in a URL, or after its ?, may be a secret.
    shown = re.sub(r"(?<=\?)[^,|#]+", "…", re.sub(r"(?<=://)[^|]*@", "…@", text))
    source = f"--pama.objective {shown!r}"
    if not equals:
        raise ConfigError(f"{source}: expected NAME=KIND:LOCATION[,key=value…], found no '='")
    return make_objective(name, rest, source)


def make_objective(name: str, spec: Any, source: str) -> Objective:
    """Build one objective from its name and either the rest of a flag or a mapping; errors name their ``source``."""
    if isinstance(spec, str):
        kind, colon, rest = spec.partition(":")
        location, *pairs = rest.split(",")
        options = dict(pair.partition("=")[::2] for pair in pairs)
        broken = [pair for pair in pairs if "=" not in pair]
        if not colon or broken or len(options) < len(pairs):
            found = "an option twice" if colon else repr(spec)
            if broken:
                found = f"{broken[0]!r} without '=' (a value with a comma needs a file)"
            raise ConfigError(f"{source}: expected NAME=KIND:LOCATION[,key=value…], found {found}")
        fields: dict[str, Any] = options | {"kind": kind, "location": location}
    elif isinstance(spec, Mapping):
        fields = {str(key): value for key, value in spec.items()}
    else:
        raise ConfigError(f"{source}: expected NAME=KIND:LOCATION[,key=value…], found {spec!r}")
    shared = {key: fields.pop(key) for key in ("kind", "location", *COMMON_OPTIONS) if key in fields}
    if isinstance(shared.get("location"), list):  # replicas, as a file may list them
        shared["location"] = "|".join(map(str, shared["location"]))
    try:
        return Objective.model_validate(shared | {"name": name, "options": fields}).absolute()
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe_error(error)}") from error
    except (OSError, RuntimeError) as error:  # of a path: no such user, no right to look, too long a name
        raise ConfigError(f"{source}: {error}") from error


def describe_error(error: ValidationError) -> str:
    """The first of pydantic's findings in one line: where, the rule, and what was found.

    A sentence of ours that begins with a flag is left as it is.
    """
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if message.startswith("--"):
        return message
    where = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
    found = f", found {first['input']!r}" if first["loc"] and first["type"] != "missing" else ""
    return f"{where}{message}{found}"

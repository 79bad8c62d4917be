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

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pama_plugin.aggregation import LEVELS, Aggregation, aggregate, available_rules, check_options, get_rule
from pama_plugin.errors import ConfigError
from pama_plugin.kinds import Kind
from pama_plugin.objective import Objective, make_objective, parse_objective

STOCK = "ppo"
BestRule = Literal["min", "weighted", "hypervolume"]
BEST_RULES = get_args(BestRule)
ProbeMode = Literal["off", "warn", "strict"]
PROBE_MODES = get_args(ProbeMode)

# From so many objectives on, pama warns: independent ones agree on a share of 2^(1−K), 3 % of six.
MANY_OBJECTIVES = 6


class StopAtFront(BaseModel):
    """End the run once fewer than ``share`` of the tokens had an advantage in each of so many steps.

    >>> StopAtFront.model_validate("0.1:3")
    StopAtFront(share=0.1, steps=3)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(gt=0, le=1)
    steps: int = Field(default=5, ge=1)  # of a batch the share is a noisy number

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, given: Any) -> Any:
        if isinstance(given, str | int | float) and not isinstance(given, bool):
            share, colon, steps = str(given).partition(":")
            return {"share": share, "steps": steps} if colon else {"share": share}
        return given


class PamaConfig(BaseModel):
    """The whole run: which rule combines which objectives, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: str
    objectives: tuple[Objective, ...]
    level: Literal["token", "sequence", "batch"] = "token"
    noon: bool | None = None
    whiten: bool = False
    options: dict[str, Any] = {}
    best: BestRule | None = None
    probe: ProbeMode = "warn"
    probe_gradients: int | None = None
    stop_at_front: StopAtFront | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(objective.name for objective in self.objectives)

    @property
    def trained(self) -> tuple[Objective, ...]:
        """The objectives that the aggregation combines, and the critic has a head for; all others are only logged."""
        return tuple(objective for objective in self.objectives if objective.role != "monitor")

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
    whiten: bool | None = None,
    option: Iterable[str] = (),
    probe_gradients: str | None = None,
    stop_at_front: str | None = None,
    *,
    default_level: str,
) -> PamaConfig:
    """Merge flags and file. A flag replaces what the file says of the same setting, an objective the same name's.

    Raises:
        ConfigError: the first thing that cannot be run, with the flag or file, the rule and what was found.
    """
    content = _read(file) if file else {}
    merged = _merge(objectives, content, file)
    roles = [objective.role for objective in merged]
    if "train" not in roles:
        names = ", ".join(objective.name for objective in merged)
        raise ConfigError(f"at least one objective must have role=train, found none among {names}")

    loss = loss or str(content.get("loss", ""))
    if loss not in available_rules():
        known = ", ".join(available_rules())
        raise ConfigError(f"--loss must be one of {known}, or {STOCK} without objectives, found {loss!r}")
    rule = get_rule(loss)
    constraints = ", ".join(objective.name for objective in merged if objective.role == "constraint")
    if rule.constrained and not constraints:
        raise ConfigError(f"--loss {loss} needs an objective with role=constraint,threshold=NUMBER, found none")
    if constraints and not rule.constrained:
        raise ConfigError(
            f"role=constraint needs a rule that knows constraints, found {constraints} with --loss {loss}"
        )
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
    for flag, given in (("level", level), ("noon", noon)):
        if given is not None and flag not in rule.parameters:
            flag = "no_noon" if given is False else flag
            raise ConfigError(f"--pama.{flag} has no meaning with --loss {loss}: leave it out")
    whiten = content.get("whiten", False) if whiten is None else whiten
    if not isinstance(whiten, bool):
        raise ConfigError(f"{file}: whiten must be true or false, found {whiten!r}")
    if whiten and rule.of == "rewards":
        raise ConfigError(f"--pama.whiten is of advantages, and --loss {loss} combines rewards: leave it out")
    options = _read_options(content.get("options", {}), option)
    try:
        options = check_options(loss, options)
    except ValueError as error:
        raise ConfigError(f"--pama.option: {error}") from error
    every = content.get("probe_gradients") if probe_gradients is None else probe_gradients
    if every is not None and not (str(every).isdecimal() and int(every) > 0):
        raise ConfigError(f"--pama.probe_gradients must be a whole number of steps, at least 1, found {every!r}")
    stop = content.get("stop_at_front") if stop_at_front is None else stop_at_front
    try:
        stop = stop if stop is None else StopAtFront.model_validate(stop)
    except ValidationError as error:
        raise ConfigError(
            "--pama.stop_at_front must be SHARE[:STEPS], a share above 0 and up to 1 and a whole number of steps, "
            f"found {stop!r}"
        ) from error
    config = PamaConfig.model_validate(
        {
            "loss": loss,
            "objectives": merged,
            "level": level or default_level,
            "noon": rule.parameters["noon"].default if noon is None and "noon" in rule.parameters else noon,
            "whiten": whiten,
            "options": options,
            "best": best,
            "probe": probe,
            "probe_gradients": every and int(every),
            "stop_at_front": stop,
        }
    )
    _rehearse(config)
    if config.stop_at_front is not None:
        _check_stop_at_front(config, config.stop_at_front)
    return config


def _rehearse(config: PamaConfig) -> None:
    """Call the rule once, on zeros: options that do not fit each other, or the objectives, are refused here."""
    try:
        _combine(config, torch.zeros(len(config.trained), 2, 1))
    except ValueError as error:
        raise ConfigError(f"--loss {config.loss}: {error}") from error


def _check_stop_at_front(config: PamaConfig, stop: StopAtFront) -> None:
    """Refuse a rule that trains on responses over which objectives disagree, and a share that chance falls below."""
    count = len(config.trained)
    if count < 2:
        raise ConfigError("--pama.stop_at_front needs at least two objectives that train, found one")
    disagreeing_KB1 = torch.tensor([[2.0, -1.0, 1.0, -1e-3]] + [[-1.0, 3.0, -1e-3, 1.0]] * (count - 1)).unsqueeze(-1)
    if _combine(config, disagreeing_KB1).metrics["active_fraction"] > 0:
        how = f" --pama.level {config.level}" if "level" in get_rule(config.loss).parameters else ""
        raise ConfigError(
            "--pama.stop_at_front needs a rule that gives no advantage where objectives disagree, such as pama by "
            f"token or by sequence without soft, found --loss {config.loss}{how}"
        )
    if stop.share > _share_by_chance(config) / 2:
        raise ConfigError(
            f"--pama.stop_at_front: {count} independent objectives already leave {_share_by_chance(config):.3g} of the "
            f"tokens an advantage, so SHARE must be at most half of that, found {stop.share:g}"
        )


def _share_by_chance(config: PamaConfig) -> float:
    """On how much all objectives agree if they are independent: 2^(1−K), or 2^(−K) where only rises are kept."""
    only_rises = config.noon is True and not config.options.get("leak")
    return 2.0 ** (-len(config.trained) if only_rises else 1 - len(config.trained))


def warn_of_many_objectives(config: PamaConfig) -> list[str]:
    """What to say at start of a projection over so many objectives that hardly anything is agreed on."""
    count = len(config.trained)
    if config.loss != "pama" or config.level == "batch" or count < MANY_OBJECTIVES:
        return []
    scale = _combine(config, torch.zeros(count, 2, 1)).metrics.get("scale")
    scaled = "" if scale is None else f", on which their advantages are multiplied by {scale:.4g}"
    return [
        f"--loss pama has {count} objectives: independent ones agree on {_share_by_chance(config):.1%} of the "
        f"{'tokens' if config.level == 'token' else 'responses'}{scaled}; see pama/active_fraction, and compare with "
        "--loss min_norm"
    ]


def _combine(config: PamaConfig, advantages_KBA: torch.Tensor) -> Aggregation:
    """What the rule makes of responses to one prompt, of a token each."""
    duals: dict[str, Any] = {}
    if get_rule(config.loss).constrained:
        violations = [0.0 if objective.role == "constraint" else None for objective in config.trained]
        duals = {"violations_K": violations, "multipliers_K": [None] * len(violations)}
    return aggregate(
        config.loss,
        advantages_KBA,
        torch.ones(advantages_KBA.shape[1:]),
        level=config.level,
        noon=config.noon,
        weights=config.weights_at(0),
        groups_B=torch.zeros(advantages_KBA.shape[1], dtype=torch.long),
        **config.options,
        **duals,
    )


def load_objectives(objectives: Iterable[str], file: str | None) -> tuple[Objective, ...]:
    """The objectives alone, of flags and file, without a rule that combines them; ``ConfigError`` as above."""
    return _merge(objectives, _read(file) if file else {}, file)


def dump_config(config: PamaConfig) -> str:
    """The configuration as YAML that ``--pama.config`` takes, and makes the same configuration of."""
    # The loader refuses what the rule does not take.
    meaningless = {"level", "noon"} - set(get_rule(config.loss).parameters)
    settings = config.model_dump(exclude={"objectives", *meaningless}, exclude_none=True)
    settings["objectives"] = {objective.name: objective.dump() for objective in config.objectives}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


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
    """Of a file's mapping and of ``KEY=VALUE`` flags, whose values are YAML."""
    if not isinstance(listed, dict) or not all(isinstance(key, str) for key in listed):
        raise ConfigError(f"options must map names to values, found {listed!r}")
    given: dict[str, Any] = {}
    for text in flagged:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--pama.option must be KEY=VALUE, found {text!r}")
        if key in given:
            raise ConfigError(f"--pama.option {text!r}: options must differ, found {key!r} twice")
        try:
            given[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"--pama.option {text!r}: the value is not valid YAML: {error}") from error
    return listed | given


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
        unknown = [str(key) for key in content if key not in known] if isinstance(content, dict) else []
        found = ", ".join(unknown) or type(content).__name__
        raise ConfigError(f"--pama.config: {file} must be a mapping of {', '.join(known)}, found {found}")
    return content


def _listed(content: dict[str, Any], file: str | None) -> Iterable[tuple[str, Any]]:
    listed = content.get("objectives", {})
    if not isinstance(listed, dict):
        raise ConfigError(
            f"--pama.config: {file}: objectives must map names to specifications, found {type(listed).__name__}"
        )
    return listed.items()

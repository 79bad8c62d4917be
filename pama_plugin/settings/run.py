"""``PamaConfig``: the settings of a run, validated once, before Ray starts, then frozen. ``load`` makes it.

The module contains, in this order: ``PamaConfig`` with its validators, its properties and its one call of a rule
(``combine``, before a run through ``rehearse``); and the checks that call the rule before a run.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pama_plugin.aggregation import LEVELS, RESCALES, Aggregation, aggregate, available_rules, check_options, get_rule
from pama_plugin.settings.names import BEST_RULES, PROBE_MODES, STOCK
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.preferences import (
    Preferences,
    Template,
    default_template,
    fill_slots,
    parse_preferences,
    parse_template,
    simplex_grid,
)
from pama_plugin.settings.source import Source, group_by_source

CHOICES: dict[str, tuple[str, ...]] = {
    "level": LEVELS,
    "rescale": RESCALES,
    "best": BEST_RULES,
    "probe": PROBE_MODES,
}

# The value of --pama.filter_by that stands for the sum of rewards times weights.
WEIGHTED_SUM = "sum"

# Share of its usual spread below which an objective is inactive. Whitening then amplifies its noise twentyfold. For
# comparison: if one of 64 rewards of 0 or 1 differs, they spread over a quarter of the most, if one of 1,600, over 5 %.
INACTIVE_BELOW = 0.05

# Number of objectives from which pama warns: independent objectives agree on a share of 2^(1−K), 3 % for six.
MANY_OBJECTIVES = 6


class StopAtFront(BaseModel):
    """End the run once fewer than ``share`` of the tokens had an advantage in each of the last ``steps`` steps.

    >>> StopAtFront.model_validate("0.1:3")
    StopAtFront(share=0.1, steps=3)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(gt=0, le=1)
    steps: int = Field(default=5, ge=1)  # the share of one batch is noisy

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            share, colon, steps = str(value).partition(":")
            return {"share": share, "steps": steps} if colon else {"share": share}
        return value


class PamaConfig(BaseModel):
    """The settings of a run: the objectives, the rule that combines them, and its options.

    Raises:
        ValidationError: a setting is invalid. The message names the flag, the requirement and the value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: str
    objectives: tuple[Objective, ...]
    level: Literal["token", "sequence", "batch"] = "token"
    rescale: Literal["auto", "none", "unit"] = "auto"
    noon: bool | None = None  # None becomes the default of the rule, if the rule has Noon
    whiten: bool = False
    inactive_below: float = INACTIVE_BELOW
    options: dict[str, Any] = {}
    best: Literal["min", "weighted", "hypervolume"] | None = None
    probe: Literal["off", "warn", "strict"] = "warn"
    probe_gradients: int | None = None
    stop_at_front: StopAtFront | None = None
    filter_by: str | None = None
    log_rollouts: int | Literal["all"] = 8
    stop_at_kl: float | None = None
    preferences: str | None = None
    preference_template: str | None = None
    eval_preferences: int | None = None

    @field_validator(*CHOICES, mode="before")
    @classmethod
    def _is_a_choice(cls, value: Any, info: ValidationInfo) -> Any:
        choices = CHOICES[str(info.field_name)]
        if value is not None and value not in choices:
            raise ValueError(f"--pama.{info.field_name} must be one of {', '.join(choices)}, found {value!r}")
        return value

    @field_validator("noon", "whiten", mode="before")
    @classmethod
    def _is_true_or_false(cls, value: Any) -> Any:
        if not isinstance(value, bool | None):
            raise ValueError("must be true or false")
        return value

    @field_validator("probe_gradients", mode="before")
    @classmethod
    def _is_a_number_of_steps(cls, every: Any) -> Any:
        if every is not None and not (str(every).isdecimal() and int(every) > 0):
            raise ValueError(f"--pama.probe_gradients must be a whole number of steps, at least 1, found {every!r}")
        return every

    @field_validator("log_rollouts", mode="before")
    @classmethod
    def _is_a_number_of_responses(cls, count: Any) -> Any:
        if count != "all" and (isinstance(count, bool) or not str(count).isdecimal()):
            raise ValueError(f"--pama.log_rollouts must be a number of responses per step, or all, found {count!r}")
        return count if count == "all" else int(count)

    @field_validator("inactive_below", mode="before")
    @classmethod
    def _is_a_share(cls, share: Any) -> Any:
        with suppress(TypeError, ValueError):
            if not isinstance(share, bool) and 0 <= float(share) < 1:
                return share
        raise ValueError(f"--pama.inactive_below must be a share, 0 or more and below 1, found {share!r}")

    @field_validator("stop_at_kl", mode="before")
    @classmethod
    def _is_a_distance(cls, nats: Any) -> Any:
        with suppress(TypeError, ValueError):
            if nats is None or not isinstance(nats, bool) and 0 < float(nats) < math.inf:
                return nats
        raise ValueError(f"--pama.stop_at_kl must be a positive number of nats per response, found {nats!r}")

    @field_validator("preferences")
    @classmethod
    def _are_preferences(cls, text: str | None) -> str | None:
        try:
            return text if text is None else parse_preferences(text) and text
        except ValueError as error:
            raise ValueError(f"--pama.preferences {error}") from None

    @field_validator("eval_preferences", mode="before")
    @classmethod
    def _is_a_number_of_points(cls, points: Any) -> Any:
        if points is not None and not (str(points).isdecimal() and int(points) > 1):
            raise ValueError(f"--pama.eval_preferences must be a number of points, at least 2, found {points!r}")
        return points

    @field_validator("stop_at_front", mode="before")
    @classmethod
    def _is_a_share_and_steps(cls, stop: Any) -> Any:
        try:
            return stop if stop is None else StopAtFront.model_validate(stop)
        except ValidationError:
            raise ValueError(
                "--pama.stop_at_front must be SHARE[:STEPS] with 0 < SHARE ≤ 1 and a whole number STEPS, at least 1, "
                f"found {stop!r}"
            ) from None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, settings: Any) -> Any:
        """Convert the options to the types of the rule, and replace ``noon=None`` by the default of the rule."""
        if not isinstance(settings, dict) or settings.get("loss") not in available_rules():
            return settings
        rule, noon = get_rule(settings["loss"]), settings.get("noon")
        if "rescale" in settings.get("options", {}) and "rescale" not in rule.parameters:
            raise ValueError("--pama.option rescale=false is now --pama.rescale none, and rescale=true is unit")
        try:
            options = check_options(settings["loss"], settings.get("options", {}))
        except ValueError as error:
            raise ValueError(f"--pama.option: {error}") from error
        if noon is None and "noon" in rule.parameters:
            noon = rule.parameters["noon"].default
        return settings | {"options": options, "noon": noon} | _complete_preferences(settings)

    @model_validator(mode="after")
    def _can_run(self) -> "PamaConfig":
        if self.loss not in available_rules():
            known = ", ".join(available_rules())
            raise ValueError(f"--loss must be one of {known}, or {STOCK} without objectives, found {self.loss!r}")
        rule = get_rule(self.loss)
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"objective names must differ, found {', '.join(repeated)} twice")
        self.sources()  # refuses options that conflict
        if "train" not in [objective.role for objective in self.objectives]:
            names = ", ".join(self.names) or "no objective"
            raise ValueError(f"at least one objective must have role=train, found none among {names}")
        constraints = ", ".join(objective.name for objective in self.objectives if objective.role == "constraint")
        if rule.constrained and not constraints:
            raise ValueError(f"--loss {self.loss} needs an objective with role=constraint,threshold=NUMBER, found none")
        if constraints and not rule.constrained:
            raise ValueError(
                f"role=constraint needs a rule with constraints, such as lagrangian, found {constraints} with --loss "
                f"{self.loss}"
            )
        if self.level == "token" and "groups_B" in rule.parameters:
            raise ValueError(
                f"--pama.level must be sequence with --loss {self.loss}, which compares the responses to a prompt, "
                "found token"
            )
        if self.noon is not None and "noon" not in rule.parameters:
            flag = "noon" if self.noon else "no_noon"
            raise ValueError(f"--pama.{flag} has no effect with --loss {self.loss}: remove it")
        if self.whiten and rule.combines == "rewards":
            raise ValueError(
                f"--pama.whiten needs a rule that combines advantages, found --loss {self.loss}, which combines rewards"
            )
        if self.filter_by not in (None, WEIGHTED_SUM, *self.names):
            raise ValueError(
                f"--pama.filter_by must be {WEIGHTED_SUM} or an objective ({', '.join(self.names)}), found "
                f"{self.filter_by!r}"
            )
        _rehearse(self)
        _check_preferences(self)
        if self.stop_at_front is not None:
            _check_stop_at_front(self, self.stop_at_front)
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(objective.name for objective in self.objectives)

    @property
    def trained(self) -> tuple[Objective, ...]:
        """The objectives that the rule combines, one critic head each. The others are only logged."""
        return tuple(objective for objective in self.objectives if objective.role != "monitor")

    @property
    def trained_names(self) -> tuple[str, ...]:
        return tuple(objective.name for objective in self.trained)

    @property
    def filtered_by(self) -> tuple[Objective, ...]:
        """The objectives by which dynamic filtering rates a response; an objective may have the name ``sum``."""
        if self.filter_by in self.names:
            return tuple(objective for objective in self.objectives if objective.name == self.filter_by)
        return tuple(objective for objective in self.objectives if objective.role == "train")

    def rate(self, rewards: Mapping[str, float], steps_done: int, preference: Sequence[float] = ()) -> float:
        """The rating of a response for dynamic filtering: a reward as it is, or the sum of rewards times weights.

        Args:
            rewards: of the objectives that apply to the response.
            steps_done: number of steps done, for the weights.
            preference: that of the prompt, if prompts have one.
        """
        if self.filter_by in self.names:
            return rewards[self.filter_by]
        weights = dict(zip(self.trained_names, self.weights_with([preference] if preference else [], steps_done)))
        applying = [objective.name for objective in self.filtered_by if objective.name in rewards]
        return sum(float(weights[name]) * rewards[name] for name in applying)

    def weights_at(self, steps_done: int) -> tuple[float, ...]:
        """The weights of the trained objectives for the next step, after ``steps_done`` steps."""
        return tuple(objective.weight.at(steps_done) for objective in self.trained)

    def final_weights(self, preferences: Sequence[Sequence[float]] = ()) -> torch.Tensor:
        """``weights_with`` at the end of all schedules; (K, 1) without preferences."""
        ends_K = torch.tensor([objective.weight.end for objective in self.trained], dtype=torch.float64)
        return _times_preferences(ends_K, preferences) if preferences else ends_K.unsqueeze(-1)

    def weights_with(self, preferences: Sequence[Sequence[float]], steps_done: int) -> torch.Tensor:
        """(K, B) the weights of the trained objectives for responses with these preferences; (K,) without preferences.

        A preference multiplies the weight of the objective by K times its share, so that equal shares change nothing.
        """
        weights_K = torch.tensor(self.weights_at(steps_done), dtype=torch.float64)
        return _times_preferences(weights_K, preferences) if preferences else weights_K

    @property
    def preference_source(self) -> Preferences | None:
        return None if self.preferences is None else parse_preferences(self.preferences)

    @property
    def template(self) -> Template:
        """How preferences are written into prompts."""
        return parse_template(str(self.preference_template), self.trained_names)

    @property
    def evaluated_preferences(self) -> tuple[tuple[float, ...], ...]:
        """The preferences with which each held-out prompt is answered; none if prompts have none."""
        return () if self.eval_preferences is None else simplex_grid(len(self.trained), self.eval_preferences)

    def rule_settings(self) -> dict[str, Any]:
        """What the combined advantages depend on besides the objectives, as JSON has it."""
        included = {"loss", "level", "rescale", "noon", "whiten", "inactive_below", "options"}
        if self.preferences is not None:
            included |= {"preferences", "preference_template"}
        settings: dict[str, Any] = json.loads(self.model_dump_json(include=included))
        if self.noon is None and "noon" in get_rule(self.loss).parameters:
            settings["noon"] = self.level == "batch"
        return settings

    def combine(
        self,
        values_KBA: torch.Tensor,
        mask_BA: torch.Tensor,
        *,
        steps_done: int,
        groups_B: torch.Tensor,
        violations: Sequence[float | None],
        memory: Sequence[Mapping[str, float]],
        rewards_KB: torch.Tensor | None = None,
        log_ratio_BA: torch.Tensor | None = None,
        active: list[bool] | None = None,
        present_KB: torch.Tensor | None = None,
        preferences: Sequence[Sequence[float]] = (),
    ) -> Aggregation:
        """Call the rule with the settings of the run and the context that it uses, in training and at start."""
        context: dict[str, Any] = {"rewards_KB": rewards_KB, "violations_K": violations, "memory_K": memory}
        context["log_ratio_BA"] = log_ratio_BA
        return aggregate(
            self.loss,
            values_KBA,
            mask_BA,
            level=self.level,
            rescale=self.rescale,
            noon=self.noon,
            weights=self.weights_with(preferences, steps_done),
            whiten=self.whiten,
            active=active,
            present_KB=present_KB,
            groups_B=groups_B,
            **self.options,
            **{key: values for key, values in context.items() if key in get_rule(self.loss).parameters},
        )

    def rehearse(self, values_KB1: torch.Tensor, preferences: Sequence[Sequence[float]] = ()) -> Aggregation:
        """Call the rule on responses of one token to a single prompt, before a run."""
        return self.combine(
            values_KB1,
            torch.ones(values_KB1.shape[1:]),
            steps_done=0,
            groups_B=torch.zeros(values_KB1.shape[1], dtype=torch.long),
            violations=[0.0 if objective.role == "constraint" else None for objective in self.trained],
            rewards_KB=values_KB1.squeeze(-1),
            log_ratio_BA=torch.zeros(values_KB1.shape[1:]),
            memory=[{}] * len(self.trained),
            preferences=preferences,
        )

    def scored_in(self, *places: str) -> tuple[Objective, ...]:
        """The objectives with ``RewardKind.scored_in`` in ``places``."""
        return tuple(objective for objective in self.objectives if objective.reward_kind.scored_in in places)

    def sources(self, *places: str) -> tuple[Source, ...]:
        """What scores the objectives that are scored in ``places``, or all of them."""
        return group_by_source(self.scored_in(*places) if places else self.objectives)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data set that objectives need."""
        return tuple(dict.fromkeys(name for objective in self.objectives for name in objective.columns))


def _times_preferences(weights_K: torch.Tensor, preferences: Sequence[Sequence[float]]) -> torch.Tensor:
    return weights_K.unsqueeze(-1) * torch.tensor(preferences, dtype=torch.float64).T * len(weights_K)


def _rehearse(config: PamaConfig) -> None:
    """Call the rule on zeros, so that it refuses options that conflict with each other or with the objectives."""
    try:
        config.rehearse(torch.zeros(len(config.trained), 2, 1))
    except ValueError as error:
        raise ValueError(f"--loss {config.loss}: {error}") from error


def _complete_preferences(settings: dict[str, Any]) -> dict[str, Any]:
    """With preferences, the defaults of what belongs to them."""
    if settings.get("preferences") is None:
        return {}
    names = [objective.name for objective in settings["objectives"] if objective.role != "monitor"]
    chosen = {key: value for key, value in settings.items() if value is not None}
    return {
        "preference_template": default_template(names),
        "eval_preferences": 5 if len(names) == 2 else 3,
    } | {key: chosen[key] for key in ("preference_template", "eval_preferences") if key in chosen}


def _check_preferences(config: PamaConfig) -> None:
    """Refuse preferences that nothing would follow, and templates and grids that do not fit the objectives."""
    if config.preferences is None:
        for name in ("preference_template", "eval_preferences"):
            if getattr(config, name) is not None:
                raise ValueError(f"--pama.{name} needs --pama.preferences, found none")
        return
    flag, count = f"--pama.preferences {config.preferences}", len(config.trained)
    if count < 2:
        raise ValueError(f"{flag} needs at least 2 trained objectives, found {count}")
    if get_rule(config.loss).constrained:
        raise ValueError(f"{flag} needs a rule without constraints, found --loss {config.loss}: it sets the weights")
    if config.level == "batch":
        raise ValueError(f"{flag} needs --pama.level token or sequence, found batch: its c is the same for all prompts")
    if config.best not in (None, "hypervolume"):
        raise ValueError(
            f"--pama.best must be hypervolume with --pama.preferences, found {config.best}: an evaluation has a front"
        )
    try:
        template = parse_template(str(config.preference_template), config.trained_names)
    except ValueError as error:
        raise ValueError(f"--pama.preference_template {error}, in {config.preference_template!r}") from None
    grids = {"preferences": config.preference_source.points if config.preference_source else 2}
    for name, points in (grids | {"eval_preferences": config.eval_preferences or 2}).items():
        try:
            simplex_grid(count, points)
        except ValueError as error:
            raise ValueError(f"--pama.{name}: {error}") from None
    texts = [fill_slots(template.with_slots(), template, each) for each in config.evaluated_preferences]
    if len(set(texts)) < len(texts):
        alike = next(text for text in texts if texts.count(text) > 1)
        raise ValueError(
            f"--pama.preference_template must write each of the {len(texts)} evaluated preferences in its own way, "
            f"found {alike!r} for {texts.count(alike)} of them"
        )
    # All objectives agree on each response, and differ in how much, so that every rule gives it an advantage.
    generator = torch.Generator().manual_seed(0)
    signs_B1 = torch.tensor([1.0, -1.0]).repeat(8).unsqueeze(-1)
    values_KB1 = torch.rand(count, 16, 1, generator=generator).add(0.5) * signs_B1
    for_one = (0.7, *[0.3 / (count - 1)] * (count - 1))
    one, other = (config.rehearse(values_KB1, [each] * 16).advantages for each in (for_one, for_one[::-1]))
    if torch.allclose(one / one.norm(), other / other.norm(), atol=1e-4):
        raise ValueError(f"{flag} needs a rule that follows weights, found --loss {config.loss}")


def _check_stop_at_front(config: PamaConfig, stop: StopAtFront) -> None:
    """Refuse rules that give an advantage where objectives disagree, and shares near that of independent objectives."""
    count = len(config.trained)
    if count < 2:
        raise ValueError("--pama.stop_at_front needs at least 2 trained objectives, found 1")
    disagreeing_KB1 = torch.tensor([[2.0, -1.0, 1.0, -1e-3]] + [[-1.0, 3.0, -1e-3, 1.0]] * (count - 1)).unsqueeze(-1)
    if config.rehearse(disagreeing_KB1).metrics["active_fraction"] > 0:
        how = f" --pama.level {config.level}" if get_rule(config.loss).combines == "advantages" else ""
        raise ValueError(
            "--pama.stop_at_front needs a rule that gives no advantage where objectives disagree, such as pama at "
            f"token or sequence level without soft, found --loss {config.loss}{how}"
        )
    if stop.share > _share_by_chance(config) / 2:
        raise ValueError(
            f"--pama.stop_at_front: SHARE must be at most {_share_by_chance(config) / 2:.3g}, half of the share of "
            f"tokens on which {count} independent objectives agree, found {stop.share:g}"
        )


def _share_by_chance(config: PamaConfig) -> float:
    """Share of tokens on which K independent objectives agree: 2^(1−K), or 2^(−K) with Noon and no leak."""
    only_positive = config.noon is True and not config.options.get("leak")
    return 2.0 ** (-len(config.trained) if only_positive else 1 - len(config.trained))


def warn_of_many_objectives(config: PamaConfig) -> list[str]:
    """The warning at start if pama projects so many objectives that they agree on few tokens."""
    count = len(config.trained)
    if config.loss != "pama" or config.level == "batch" or count < MANY_OBJECTIVES:
        return []
    scale = config.rehearse(torch.zeros(count, 2, 1)).metrics.get("scale")
    scaled = "" if scale is None else f", where pama multiplies the advantages by {scale:.4g}"
    return [
        f"--loss pama with {count} objectives: independent objectives agree on {_share_by_chance(config):.1%} of the "
        f"{'tokens' if config.level == 'token' else 'responses'}{scaled}. Check pama/active_fraction, and compare with "
        "--loss min_norm"
    ]

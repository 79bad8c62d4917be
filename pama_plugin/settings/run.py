"""``PamaConfig``: the settings of a run, validated once, before Ray starts, then frozen. ``load`` makes it.

The fields, each with the checks of its own, are in ``fields``. This module contains, in this order: ``PamaConfig``,
with the checks of settings together, its properties and its one call of a rule (``combine``, before a run through
``rehearse``); and the checks that call the rule before a run.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import model_validator

from pama_plugin.aggregation import Aggregation, aggregate, available_rules, check_options, get_rule
from pama_plugin.settings.fields import RunFields, StopAtFront
from pama_plugin.settings.names import STOCK
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

# The value of --pama.filter_by that stands for the sum of rewards times weights.
WEIGHTED_SUM = "sum"

# Number of objectives from which pama warns: independent objectives agree on a share of 2^(1−K), 3 % for six.
MANY_OBJECTIVES = 6


class PamaConfig(RunFields):
    """The settings of a run: the objectives, the rule that combines them, and its options.

    Raises:
        ValidationError: a setting is invalid. The message names the flag, the requirement and the value.
    """

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

    def weights_at(self, steps_done: int | None) -> tuple[float, ...]:
        """The weights of the trained objectives for the next step, after ``steps_done`` steps; None: the final ones."""
        weights = [objective.weight for objective in self.trained]
        return tuple(each.end if steps_done is None else each.at(steps_done) for each in weights)

    def weights_with(self, preferences: Sequence[Sequence[float]], steps_done: int | None) -> torch.Tensor:
        """(K, B) ``weights_at`` for responses with these preferences; (K, 1) without preferences.

        A preference multiplies the weight of the objective by K times its share, so that equal shares change nothing.
        """
        weights_K1 = torch.tensor(self.weights_at(steps_done), dtype=torch.float64).unsqueeze(-1)
        if not preferences:
            return weights_K1
        return weights_K1 * torch.tensor(preferences, dtype=torch.float64).T * len(weights_K1)

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
        weights_KB = self.weights_with(preferences, steps_done)
        return aggregate(
            self.loss,
            values_KBA,
            mask_BA,
            level=self.level,
            rescale=self.rescale,
            noon=self.noon,
            weights=weights_KB if preferences else weights_KB.squeeze(-1),
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

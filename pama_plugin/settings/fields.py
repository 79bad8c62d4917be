"""The settings of a run one by one: their types, and the checks that need no other setting."""

import math
from contextlib import suppress
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pama_plugin.aggregation import LEVELS, RESCALES
from pama_plugin.settings.names import BEST_RULES, PROBE_MODES
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.preferences import parse_preferences

CHOICES: dict[str, tuple[str, ...]] = {
    "level": LEVELS,
    "rescale": RESCALES,
    "best": BEST_RULES,
    "probe": PROBE_MODES,
}

# Field → smallest number, and what it counts.
COUNTS = {"probe_gradients": (1, "a whole number of steps"), "eval_preferences": (2, "a number of points")}

# Share of its usual spread below which an objective is inactive. Whitening then amplifies its noise twentyfold. For
# comparison: if one of 64 rewards of 0 or 1 differs, they spread over a quarter of the most, if one of 1,600, over 5 %.
INACTIVE_BELOW = 0.05


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


class RunFields(BaseModel):
    """The fields of ``PamaConfig``, which says what they mean together."""

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

    @field_validator(*COUNTS, mode="before")
    @classmethod
    def _is_a_count(cls, value: Any, info: ValidationInfo) -> Any:
        least, what = COUNTS[str(info.field_name)]
        if value is not None and not (str(value).isdecimal() and int(value) >= least):
            raise ValueError(f"--pama.{info.field_name} must be {what}, at least {least}, found {value!r}")
        return value

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

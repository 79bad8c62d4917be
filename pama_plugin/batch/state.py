"""The state of a run that is saved, as JSON, in OpenRLHF's checkpoint, for resuming."""

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pama_plugin.settings.run import PamaConfig


class Moments(BaseModel):
    """Running count, mean and standard deviation, updated batch by batch (Chan, Golub, LeVeque 1979).

    >>> import torch
    >>> moments = Moments()
    >>> moments.update(torch.tensor([1.0, 2.0]))
    >>> moments.update(torch.tensor([6.0]))
    >>> moments.mean, round(moments.std, 3)
    (3.0, 2.646)
    """

    count: int = Field(default=0, ge=0)
    mean: float = Field(default=0.0, allow_inf_nan=False)
    squares: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # Σ (x − mean)²

    def update(self, values: Tensor) -> None:
        """Update with a batch of any shape. An empty batch changes nothing."""
        if not values.numel():
            return
        values = values.double()
        count, total = values.numel(), self.count + values.numel()
        difference = float(values.mean()) - self.mean
        self.squares += float((values - values.mean()).square().sum()) + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    @property
    def std(self) -> float:
        """The sample standard deviation; NaN for fewer than two numbers."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan


class ObjectiveState(BaseModel):
    """Statistics of one objective, and the identity of the scorer that computed its rewards."""

    model_config = ConfigDict(extra="forbid")

    scorer: str
    rewards: Moments = Moments()
    steps: int = 0  # number of steps in ``rewards``
    spread: Moments = Moments()  # of the standard deviation of the rewards of a step, as the estimator compares them
    first_std: float | None = None  # standard deviation of the rewards of the first step in which they varied
    first_evaluation: tuple[float, float] | None = None  # mean and standard deviation over prompts
    memory: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}  # of the rule, such as a multiplier

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, saved: Any) -> Any:
        """Read the multiplier of an older checkpoint."""
        if isinstance(saved, dict) and "multiplier" in saved:
            saved = dict(saved)
            multiplier = saved.pop("multiplier")
            saved["memory"] = {} if multiplier is None else {"integral": multiplier}
        return saved


class RunState(BaseModel):
    """The state of all objectives, by name."""

    model_config = ConfigDict(extra="forbid")

    objectives: dict[str, ObjectiveState]
    heads: tuple[str, ...]  # names of the trained objectives, in the order of the critic's heads
    rule: dict[str, Any] = {}  # the rule and its settings; older checkpoints do not have it
    adapters: dict[str, Any] = {}  # what identifies those of the policy, and their base; empty if it has none
    front: str = ""  # settings for which steps_at_front was counted
    steps_at_front: int = 0  # consecutive steps at the front, for --pama.stop_at_front
    first_nll: float | None = None  # mean negative log-likelihood by the reference in the first step
    rating: str  # how evaluations were rated; other ratings are not comparable

    @classmethod
    def start(cls, config: PamaConfig, agent: str | None = None, adapters: dict[str, Any] | None = None) -> "RunState":
        """The state before the first step.

        Args:
            config: the configuration of the run.
            agent: the file of the user's agent, if any.
            adapters: what identifies the adapters of the policy, if it has any.
        """
        objectives = {
            objective.name: ObjectiveState(scorer=objective.identity(agent)) for objective in config.objectives
        }
        weights = ", ".join(f"{objective.name} {objective.weight}" for objective in config.trained)
        rule = config.rule_settings()
        return cls(
            objectives=objectives,
            heads=config.trained_names,
            rule=rule,
            adapters=adapters or {},
            rating=f"{config.best or 'min'} of {weights}",
            front=f"{rule} {config.stop_at_front} of {weights}",
        )

    def swapped(self, saved: "RunState") -> list[str]:
        """Names of the objectives in ``saved`` whose scorer has changed, or that no longer exist."""
        return [
            name
            for name, state in saved.objectives.items()
            if name not in self.objectives or self.objectives[name].scorer != state.scorer
        ]

    def resume(self, saved: "RunState") -> None:
        """Take over the statistics of each objective in ``saved`` whose scorer is unchanged."""
        swapped = self.swapped(saved)
        self.objectives |= {
            name: state for name, state in saved.objectives.items() if name in self.objectives and name not in swapped
        }
        if saved.rule and saved.rule["loss"] != self.rule["loss"]:
            for name, state in self.objectives.items():
                self.objectives[name] = state.model_copy(update={"memory": {}})
        self.first_nll = saved.first_nll
        if self.front == saved.front and not swapped:
            self.steps_at_front = saved.steps_at_front

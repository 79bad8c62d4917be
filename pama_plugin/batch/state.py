"""What a resumed run must know of the one before: our part of the host's checkpoint, as JSON."""

import math

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pama_plugin.settings.run import PamaConfig


class Moments(BaseModel):
    """Count, mean and standard deviation of all numbers seen, updated batch by batch (Chan, Golub, LeVeque 1979).

    >>> import torch
    >>> moments = Moments()
    >>> moments.update(torch.tensor([1.0, 2.0]))
    >>> moments.update(torch.tensor([6.0]))
    >>> moments.mean, round(moments.std, 3)
    (3.0, 2.646)
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # Σ (x − mean)²

    def update(self, values: Tensor) -> None:
        """Take in a batch of any shape; an empty one changes nothing."""
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
        """The sample standard deviation; NaN of fewer than two numbers."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan


class ObjectiveState(BaseModel):
    """What was measured of one objective, and the scorer that it was measured with."""

    model_config = ConfigDict(extra="forbid")

    scorer: str
    rewards: Moments = Moments()
    steps: int = 0  # that ``rewards`` are of
    first_evaluation: tuple[float, float] | None = None  # mean, and standard deviation over prompts
    multiplier: float | None = None  # of a constraint, once a step has been made


class RunState(BaseModel):
    """The state of all objectives, by name."""

    model_config = ConfigDict(extra="forbid")

    objectives: dict[str, ObjectiveState]
    heads: tuple[str, ...]  # the trained ones, in the order of the critic's heads
    front: str = ""  # what steps_at_front was counted for
    steps_at_front: int = 0  # in a row so far, for --pama.stop_at_front
    rating: str  # how evaluations were rated: ratings of another kind are no match for these

    @classmethod
    def start(cls, config: PamaConfig, agent: str | None = None) -> "RunState":
        """The state before the first step; ``agent`` is the file of the user's own agent, if there is one."""
        fresh = {objective.name: ObjectiveState(scorer=objective.identity(agent)) for objective in config.objectives}
        weights = ", ".join(f"{objective.name} {objective.weight}" for objective in config.trained)
        how = (config.loss, config.level, config.noon, config.whiten, config.options, config.stop_at_front)
        return cls(
            objectives=fresh,
            heads=config.trained_names,
            rating=f"{config.best or 'min'} of {weights}",
            front=f"{' '.join(map(str, how))} of {weights}",
        )

    def swapped(self, saved: "RunState") -> list[str]:
        """The names of ``saved`` whose scorer is another one now, or that are gone."""
        return [
            name
            for name, state in saved.objectives.items()
            if name not in self.objectives or self.objectives[name].scorer != state.scorer
        ]

    def resume(self, saved: "RunState") -> None:
        """Take over what ``saved`` measured, objective by objective, where the scorer is still the same."""
        swapped = self.swapped(saved)
        self.objectives |= {
            name: state for name, state in saved.objectives.items() if name in self.objectives and name not in swapped
        }
        if self.front == saved.front and not swapped:
            self.steps_at_front = saved.steps_at_front

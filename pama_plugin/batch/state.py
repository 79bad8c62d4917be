"""What a resumed run must know of the one before: our part of the host's checkpoint, as JSON."""

import hashlib
import math
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pama_plugin.rewards import split_location
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig

_MIB = 2**20
# Options of the kinds that do not change what a response scores.
HOW_IT_RUNS = ["gpus", "nodes", "offload", "replicas", "batch_size", "timeout", "retries", "concurrency", "token_env"]


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
        fresh = {objective.name: ObjectiveState(scorer=identify(objective, agent)) for objective in config.objectives}
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


def identify(objective: Objective, agent: str | None = None) -> str:
    """Kind, location and options, with a hash of what local files hold: the same text means the same scorer.

    Of a model's weights the hash covers sizes, and the first and the last MiB, of each file. Where it runs is no part.

    >>> from pama_plugin.settings.objective import parse_objective
    >>> identify(parse_objective("length=builtin:length,scale=140,weight=2"))
    'builtin:length scale=140'
    """
    only_how = () if objective.kind == "builtin" else HOW_IT_RUNS
    options = sorted(f" {key}={value}" for key, value in objective.options.items() if key not in only_how)
    location = objective.location
    if objective.kind == "http":  # a URL's query may hold a key
        location = re.sub(r"(?<=\?)[^|]+", lambda query: hashlib.sha256(query[0].encode()).hexdigest()[:16], location)
    scorer = f"{objective.kind}:{location}{''.join(options)}"
    files = []
    if objective.kind == "py":
        files = [split_location(objective.location)[0]]
    elif objective.kind == "agent" and agent is not None:
        files = [Path(agent)]
    elif objective.kind in ("rm", "hf"):
        folder = Path(objective.location)
        files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    if not files:
        return scorer
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(f"{file.name} {size}".encode() + stream.read(_MIB))
            stream.seek(max(size - _MIB, 0))
            digest.update(stream.read(_MIB))
    return f"{scorer} sha256:{digest.hexdigest()[:16]}"

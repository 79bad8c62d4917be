"""The file of ``pama sweep``: settings of all runs, and grids of rules × weights × seeds.

    flags: --actor.model_name_or_path ./policy --data.prompt_dataset ./prompts.jsonl     # for every run
    objectives:
      sentiment: hf:./sentiment-model
      length: builtin:length,scale=140
    seeds: [1, 2, 3]
    grids:                           # each: rules × weights × seeds
    - rules: {pama: --loss pama, linear: --loss linear}
    - rules: {morlhf: --loss morlhf}
      weights: [{sentiment: 1, length: 3}, {sentiment: 3, length: 1}]

A run is identified by a hash of its flags, so runs with equal flags are trained once, under any name.
"""

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pama_plugin.errors import ConfigError
from pama_plugin.settings.yaml_text import load_yaml

MAX_NAME = 200  # bytes of an arm in the name of its folder: file systems allow 255 in all


def _check_quotes(flags: str) -> str:
    shlex.split(flags)
    return flags


Flags = Annotated[str, AfterValidator(_check_quotes)]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seeds = Annotated[list[int], Field(min_length=1)]


class Grid(BaseModel):
    """Rules × weights × seeds; ``rules`` maps a name to flags."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: Annotated[dict[str, Flags], Field(min_length=1)]
    weights: Annotated[list[dict[str, Weight]], Field(min_length=1)] = [{}]
    seeds: Seeds | None = None


class Sweep(BaseModel):
    """The content of a sweep file: settings of all runs, and the grids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    flags: Flags = ""
    objectives: Annotated[dict[str, str], Field(min_length=1)]
    seeds: Seeds = [42]  # the default of OpenRLHF
    grids: Annotated[list[Grid], Field(min_length=1)]


class Job(NamedTuple):
    """One run of a sweep. Runs that differ in the seed only belong to the same arm."""

    rule: str
    weights: dict[str, float]
    seed: int
    flags: list[str]

    @property
    def arm(self) -> str:
        return f"{self.rule} {':'.join(f'{weight:g}' for weight in self.weights.values())}".rstrip()

    @property
    def identity(self) -> str:
        return hashlib.sha256(json.dumps(self.flags).encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        name = re.sub(r"[^\w.=+-]+", "-", self.arm).encode()[:MAX_NAME].decode(errors="ignore")
        return f"{name}-seed{self.seed}-{self.identity}"


def load_sweep(file: Path) -> list[Job]:
    """The runs of a file without duplicates: first all arms with their first seed, then with their second, and so on.

    With this order, the arms of an interrupted sweep have nearly the same seeds.

    Raises:
        ConfigError: the file cannot be read or is invalid.
    """
    try:
        sweep = Sweep.model_validate(load_yaml(file.read_bytes()))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{file}: {where}: {message}, found {first['input']!r:.200}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    jobs: dict[str, tuple[int, Job]] = {}
    for grid in sweep.grids:
        for rule, rule_flags in grid.rules.items():
            for weights in grid.weights:
                if unknown := sorted(set(weights) - set(sweep.objectives)):
                    raise ConfigError(
                        f"{file}: weights must name {', '.join(sweep.objectives)}, found {', '.join(unknown)}"
                    )
                for turn, seed in enumerate(grid.seeds or sweep.seeds):
                    job = _make_job(sweep, rule, rule_flags, weights, seed)
                    jobs.setdefault(job.identity, (turn, job))
    return [job for _, job in sorted(jobs.values(), key=lambda entry: entry[0])]


def _make_job(sweep: Sweep, rule: str, rule_flags: str, weights: dict[str, float], seed: int) -> Job:
    objectives = [
        f"{name}={spec},weight={weights[name]:g}" if name in weights else f"{name}={spec}"
        for name, spec in sweep.objectives.items()
    ]
    flags = shlex.split(sweep.flags) + shlex.split(rule_flags) + ["--train.seed", str(seed)]
    for objective in objectives:
        flags += ["--pama.objective", objective]
    return Job(rule, weights, seed, flags)

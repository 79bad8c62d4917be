"""The kinds of objective, and the options that each takes besides those of all."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pama_plugin.rewards.options import HfOptions, HttpOptions, PyOptions, RejectBool

Kind = Literal["rm", "hf", "py", "http", "builtin", "agent"]
IN_THE_ROLLOUT: tuple[Kind, ...] = ("py", "http", "builtin", "agent")


class Placement(BaseModel):
    """Where the ranks of an ``rm`` objective run, from its options of the same names; None is what ``--reward.*`` says.

    Args:
        gpus: ranks per node, or a fraction of one GPU for a single rank that shares it with other such objectives.
        nodes: how many times ``gpus``.
        offload: whether the parameters wait in the memory of the CPU.

    >>> Placement.model_validate({"gpus": "0.5", "offload": "true"})
    Placement(gpus=0.5, nodes=None, offload=True)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpus: Annotated[float | None, RejectBool] = None
    nodes: Annotated[Annotated[int, Field(ge=1)] | None, RejectBool] = None
    offload: bool | None = None

    @field_validator("gpus")
    @classmethod
    def _is_whole_or_a_fraction(cls, gpus: float | None) -> float | None:
        if gpus is None or gpus >= 1 and gpus.is_integer() or 0 < gpus < 1 and round(gpus, 4) == gpus:
            return gpus
        raise ValueError("must be a whole number of ranks per node, or a fraction of one GPU with up to 4 decimals")

    @model_validator(mode="after")
    def _is_one_rank_if_a_fraction(self) -> "Placement":
        if self.gpus is not None and self.gpus < 1 and (self.nodes or 1) > 1:
            raise ValueError(f"gpus={self.gpus} is one rank that shares a GPU, so nodes must be 1, found {self.nodes}")
        return self


class RmOptions(Placement):
    """What an ``rm`` objective takes besides."""

    value_head_prefix: str | None = None


class NoOptions(BaseModel):
    """Of a kind that takes none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# ``builtin`` is not among them: its rewards say themselves what they take.
OPTIONS: dict[Kind, type[BaseModel]] = {
    "rm": RmOptions,
    "hf": HfOptions,
    "py": PyOptions,
    "http": HttpOptions,
    "agent": NoOptions,
}

# Packages of the extra ``rewards`` that a kind cannot do without.
REQUIRED_PACKAGES = {"hf": ("transformers",), "http": ("circuitbreaker", "httpx", "tenacity")}

"""What the kinds ``py``, ``http`` and ``hf`` take besides: here, so that nobody needs their libraries to know it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

# Its square is finite in float32, in which rewards are whitened.
LARGEST = 1e18


def refuse_bool(number: Any) -> Any:
    """For what Python, and so pydantic, takes for 0 or 1."""
    if isinstance(number, bool):
        raise ValueError("must be a number")
    return number


RejectBool = BeforeValidator(refuse_bool)


def check_model(location: str) -> None:
    """A folder must hold a model; what is no folder must read like a name on the hub, which whoever loads it resolves.

    Raises:
        ValueError: neither.
    """
    folder = Path(location).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"no reward model in {location}: it has no config.json")
    if not folder.exists() and (location.startswith((".", "/", "~")) or location.count("/") > 1):
        raise ValueError(f"no such folder: {location}")


class PyOptions(BaseModel):
    """What a ``py`` objective takes besides.

    Args:
        timeout: seconds for one call.
        concurrency: calls at once in one rollout engine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    timeout: Annotated[float, RejectBool, Field(gt=0, allow_inf_nan=False)] = 180.0
    concurrency: Annotated[int, RejectBool, Field(ge=1)] = 16


class HttpOptions(BaseModel):
    """The options of an ``http`` objective.

    Args:
        timeout: seconds for one attempt, from connecting to the last byte.
        retries: further attempts after the first.
        concurrency: requests in flight at once from one rollout engine.
        token_env: name of the environment variable that holds the bearer token; it is read where the rollout runs.

    >>> HttpOptions.model_validate({"timeout": "30"})
    HttpOptions(timeout=30.0, retries=4, concurrency=32, token_env=None)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    timeout: Annotated[float, RejectBool, Field(gt=0, allow_inf_nan=False)] = 180.0
    retries: Annotated[int, RejectBool, Field(ge=0)] = 4
    concurrency: Annotated[int, RejectBool, Field(ge=1)] = 32
    token_env: str | None = Field(None, min_length=1)


class HfOptions(BaseModel):
    """Which number of a classifier is the reward, and what text it reads.

    Args:
        label: the index of the logit, or its name in the model's ``id2label``. A number is always an index.
        output: ``logit`` z_c; ``probability`` p_c, a softmax over the logits, or the sigmoid of z_c where the model
            has one logit or independent labels; ``log_odds`` log p_c - log(1 - p_c).
        text: ``chat``, the tokenizer's chat template over prompt and response; ``full``, prompt + response as one
            text; ``pair``, both as the two texts of ``tokenizer(prompt, response)``; ``response`` alone. None is
            ``chat`` if the tokenizer has a template, else ``full``. But for ``chat``, messages are joined by newlines.
        max_length: tokens that the model reads at most; None is what model and tokenizer allow.
        batch_size: conversations that are scored at once.
        dtype: of the weights; ``auto`` is what they were saved in.
        trust_remote_code: whether code that comes with the model may run.
        replicas: how many copies of the model share the work.
        gpus: for each of them: 1, a fraction of one GPU, or 0 for the CPU.

    >>> HfOptions.model_validate({"label": "1", "gpus": "0.5"}).label
    1
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: Annotated[Annotated[int | str | None, Field(union_mode="left_to_right")], RejectBool] = None
    output: Literal["logit", "probability", "log_odds"] = "logit"
    text: Literal["chat", "full", "pair", "response"] | None = None
    max_length: Annotated[Annotated[int, Field(ge=1)] | None, RejectBool] = None
    batch_size: Annotated[int, RejectBool, Field(ge=1)] = 16
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    replicas: Annotated[int, RejectBool, Field(ge=1)] = 1
    gpus: Annotated[float, RejectBool] = 1.0

    @field_validator("gpus")
    @classmethod
    def _is_one_or_a_fraction(cls, gpus: float) -> float:
        if gpus in (0, 1) or 0 < gpus < 1 and round(gpus, 4) == gpus:
            return gpus
        raise ValueError("must be 1, a fraction of one GPU with up to 4 decimals, or 0 for the CPU")

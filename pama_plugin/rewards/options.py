"""Options of each kind, and checks of a model's location. This module does not import the libraries of the kinds."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

# Largest reward. Its square is finite in float32, in which rewards are whitened.
LARGEST = 1e18


def refuse_bool(number: Any) -> Any:
    """Validator that refuses booleans, which pydantic would convert to 0 or 1."""
    if isinstance(number, bool):
        raise ValueError("must be a number")
    return number


RejectBool = BeforeValidator(refuse_bool)


def split_names(value: Any) -> Any:
    """``A|B`` as a list; a list, as in a file, unchanged."""
    return value.split("|") if isinstance(value, str) else value


Key = Annotated[str | None, Field(min_length=1)]
Columns = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(split_names)]


def refuse_columns(columns: Iterable[str], reserved: Iterable[str]) -> None:
    """Raise ``ValueError`` for columns that would take the place of what every reward receives."""
    if taken := sorted(set(columns) & set(reserved)):
        raise ValueError(f"columns must not have the names of {', '.join(reserved)}, found {', '.join(taken)}")


def check_model(location: str, options: BaseModel) -> None:
    """Check that the location is a folder with a model, or may be a name on the hub.

    Names on the hub are resolved when the model is loaded.

    Raises:
        ValueError: the location is neither.
    """
    folder = Path(location).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"no reward model in {location}: it has no config.json")
    if not folder.exists() and (location.startswith((".", "/", "~")) or location.count("/") > 1):
        raise ValueError(f"no such folder: {location}")


def absolute_model(location: str) -> str:
    """The absolute path of a folder; a name on the hub unchanged."""
    folder = Path(location).expanduser()
    return str(folder.absolute()) if folder.exists() else location


def model_files(location: str) -> list[Path]:
    """The weight files in a folder; none for a name on the hub."""
    folder = Path(location)
    return sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))


class NoOptions(BaseModel):
    """For a kind without options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RmOptions(BaseModel):
    """Options of an ``rm`` objective. The default is the value of the corresponding ``--reward.*`` flag.

    Args:
        gpus: ranks per node, or a fraction of one GPU for a single rank that shares the GPU with other such objectives.
        nodes: number of nodes with ``gpus`` ranks each.
        offload: whether to keep the parameters in CPU memory between uses.
        value_head_prefix: name of the value head in the model's weights.
        trust_remote_code: whether OpenRLHF may run code that comes with the model.

    >>> RmOptions.model_validate({"gpus": "0.5", "offload": "true"})
    RmOptions(gpus=0.5, nodes=None, offload=True, value_head_prefix=None, trust_remote_code=False)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpus: Annotated[float | None, RejectBool] = None
    nodes: Annotated[Annotated[int, Field(ge=1)] | None, RejectBool] = None
    offload: bool | None = None
    value_head_prefix: str | None = None
    trust_remote_code: bool = False

    @field_validator("gpus")
    @classmethod
    def _is_whole_or_a_fraction(cls, gpus: float | None) -> float | None:
        if gpus is None or gpus >= 1 and gpus.is_integer() or 0 < gpus < 1 and round(gpus, 4) == gpus:
            return gpus
        raise ValueError("must be a whole number of ranks per node, or a fraction of one GPU with up to 4 decimals")

    @model_validator(mode="after")
    def _is_one_rank_if_a_fraction(self) -> "RmOptions":
        if self.gpus is not None and self.gpus < 1 and (self.nodes or 1) > 1:
            raise ValueError(f"nodes must be 1 with gpus={self.gpus}, one rank that shares a GPU, found {self.nodes}")
        return self


class PyOptions(BaseModel):
    """Options of a ``py`` objective.

    Args:
        key: the key of the reward in the dict that the function returns.
        columns: columns of the data set that the function takes as keyword arguments.
        timeout: seconds per call.
        concurrency: maximum number of parallel calls per rollout engine.
        isolate: whether each parallel call has a process of its own, in which it can be ended. Otherwise calls run in
            threads of the engine: the file is imported once, and a call that does not return cannot be ended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: Key = None
    columns: Columns = ()
    timeout: Annotated[float, RejectBool, Field(gt=0, allow_inf_nan=False)] = 180.0
    concurrency: Annotated[int, RejectBool, Field(ge=1)] = 16
    isolate: bool = True


class HttpOptions(BaseModel):
    """Options of an ``http`` objective.

    Args:
        key: the key of the reward in the reply.
        columns: columns of the data set that are sent with the response.
        timeout: seconds per attempt, from connecting to the last byte.
        retries: maximum number of attempts after the first.
        concurrency: maximum number of parallel requests per rollout engine.
        token_env: name of the environment variable with the bearer token. It is read where the rollout runs.

    >>> HttpOptions.model_validate({"timeout": "30"})
    HttpOptions(key=None, columns=(), timeout=30.0, retries=4, concurrency=32, token_env=None)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: Key = None
    columns: Columns = ()
    timeout: Annotated[float, RejectBool, Field(gt=0, allow_inf_nan=False)] = 180.0
    retries: Annotated[int, RejectBool, Field(ge=0)] = 4
    concurrency: Annotated[int, RejectBool, Field(ge=1)] = 32
    token_env: str | None = Field(None, min_length=1)


class JudgeOptions(HttpOptions):
    """Options of a ``judge`` objective, and those of ``http``.

    Args:
        rubric: file with the text of the request, in which ``{prompt}``, ``{response}``, ``{label}`` and columns are
            replaced; doubled braces are braces.
        model: name of the model on the server.
        key: the key of the reward in the JSON object of the answer, or the named group of ``pattern``.
        pattern: a regular expression whose last match in the answer has the reward, as its only group or as named
            groups. Without it, the answer must be a JSON object.
        json_schema: file with the JSON schema that the server must enforce for the answer.
        temperature: of the judge's sampling. Default: that of the server.
        max_tokens: of the answer. Default: that of the server.
    """

    rubric: str = Field(min_length=1)
    model: str = Field(min_length=1)
    pattern: str | None = None
    json_schema: Annotated[str | None, Field(min_length=1)] = None
    temperature: Annotated[Annotated[float, Field(ge=0, allow_inf_nan=False)] | None, RejectBool] = None
    max_tokens: Annotated[Annotated[int, Field(ge=1)] | None, RejectBool] = None


class ReplicaOptions(BaseModel):
    """Options of every kind with ``scored_in="replicas"``.

    Args:
        batch_size: conversations per forward pass.
        replicas: number of copies of the model, which share the conversations of a rollout batch.
        gpus: GPUs per replica: 1, a fraction of one GPU, or 0 for the CPU.
        timeout: seconds for 16 batches. A replica that takes longer is restarted; their rewards are missing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: Annotated[int, RejectBool, Field(ge=1)] = 16
    replicas: Annotated[int, RejectBool, Field(ge=1)] = 1
    gpus: Annotated[float, RejectBool] = 1.0
    timeout: Annotated[float, RejectBool, Field(gt=0, allow_inf_nan=False)] = 600.0

    @field_validator("gpus")
    @classmethod
    def _is_one_or_a_fraction(cls, gpus: float) -> float:
        if gpus in (0, 1) or 0 < gpus < 1 and round(gpus, 4) == gpus:
            return gpus
        raise ValueError("must be 1, a fraction of one GPU with up to 4 decimals, or 0 for the CPU")


class HfOptions(ReplicaOptions):
    """Options of an ``hf`` objective: the output that is the reward, and the text that the classifier reads.

    Args:
        label: the index of the logit, or its name in the model's ``id2label``. A number is always an index.
        output: ``logit`` z_c; ``probability`` p_c, a softmax over the logits, or the sigmoid of z_c if the model has
            one logit or independent labels; ``log_odds`` log p_c - log(1 - p_c).
        text: ``chat``: prompt and response in the tokenizer's chat template; ``full``: prompt + response as one text;
            ``pair``: the two texts of ``tokenizer(prompt, response)``; ``response``: the response only. Default:
            ``chat`` if the tokenizer has a template, else ``full``. Except for ``chat``, newlines join messages.
        max_length: maximum number of tokens. Default: the limit of model and tokenizer.
        dtype: dtype of the weights; ``auto`` is the dtype of the checkpoint.
        trust_remote_code: whether to run code that comes with the model.

    >>> HfOptions.model_validate({"label": "1", "gpus": "0.5"}).label
    1
    """

    label: Annotated[Annotated[int | str | None, Field(union_mode="left_to_right")], RejectBool] = None
    output: Literal["logit", "probability", "log_odds"] = "logit"
    text: Literal["chat", "full", "pair", "response"] | None = None
    max_length: Annotated[Annotated[int, Field(ge=1)] | None, RejectBool] = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False

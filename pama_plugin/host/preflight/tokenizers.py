"""Checks that reward models and critics, which receive the policy's token ids and never text, can read them."""

from collections.abc import Callable
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer

from pama_plugin.errors import ConfigError

POLICY = "--actor.model_name_or_path"


class NeedsItsOwnCode(ConfigError):
    """A model with its own code, which OpenRLHF runs in its actors; the driver does not run it to read a vocabulary."""


def check_vocabularies(policy: str | None, readers: dict[str, str]) -> list[str]:
    """Compare the vocabulary of every model in ``readers`` (flag → folder or hub name) with the policy's tokens.

    Returns:
        One warning per model that could not be compared.

    Raises:
        ConfigError: a model cannot be loaded, or has fewer embeddings than the policy has tokens.
    """
    if policy is None or not readers:
        return []
    warnings = []
    try:
        tokens = max(load(read_vocabulary, POLICY, policy)) + 1
        for flag, location in readers.items():
            try:
                size = load(_vocabulary_size, flag, location)
            except NeedsItsOwnCode as error:
                warnings.append(f"the vocabulary was not compared: {error}")
                continue
            if size < tokens:
                raise ConfigError(
                    f"{flag}: its vocabulary must hold every token of the policy, found {size} in {location} "
                    f"and {tokens} in {policy}"
                )
    except LocalEntryNotFoundError:  # the nodes that load the models may have cached it
        return ["the vocabularies were not compared: the hub is out of reach, and a model is not cached here"]
    except NeedsItsOwnCode as error:  # for the policy
        return [f"the vocabularies were not compared: {error}"]
    return warnings


def load(read: Callable[[str], Any], flag: str, location: str) -> Any:
    """Return ``read(location)``; an error in reading the model becomes a ``ConfigError`` that names the flag.

    Raises:
        ConfigError: the model does not exist, or is broken.
        NeedsItsOwnCode: the model cannot be read without running its own code.
        LocalEntryNotFoundError: the hub is out of reach and the model is not cached here.
    """
    try:
        return read(location)
    except (OSError, ValueError) as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise error.__cause__ from None
        if "trust_remote_code" in str(error):
            raise NeedsItsOwnCode(f"{flag}: {location} cannot be read without running its own code") from error
        raise ConfigError(f"{flag}: cannot read the model at {location}: {str(error).splitlines()[0]}") from error


def read_vocabulary(location: str) -> dict[int, str]:
    """Token id → token, for the tokenizer that OpenRLHF would load from ``location``."""
    return {index: token for token, index in read_tokenizer(location).get_vocab().items()}


def read_tokenizer(location: str) -> Any:
    """The tokenizer that OpenRLHF would load from ``location``."""
    return AutoTokenizer.from_pretrained(location, trust_remote_code=False)  # the default would ask the user


def _vocabulary_size(location: str) -> int:
    """The number of embeddings."""
    config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    size: int = config.get_text_config().vocab_size
    return size

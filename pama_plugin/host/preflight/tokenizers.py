"""Whether a model that is given the policy's token ids can read them: reward models and critics see ids, never text."""

from collections.abc import Callable
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer

from pama_plugin.errors import ConfigError

POLICY = "--actor.model_name_or_path"


class NeedsItsOwnCode(ConfigError):
    """A model that comes with code, which the host runs in its actors; the driver does not, to look at a vocabulary."""


def check_vocabularies(policy: str | None, readers: dict[str, str]) -> list[str]:
    """Compare the vocabulary of every model in ``readers`` (flag → folder or hub name) with the policy's tokens.

    Returns:
        A warning of every model that could not be looked at.

    Raises:
        ConfigError: a model that cannot be loaded, or one with fewer embeddings than the policy has tokens.
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
                warnings.append(f"a vocabulary was not compared: {error}")
                continue
            if size < tokens:
                raise ConfigError(
                    f"{flag}: its vocabulary must hold every token of the policy, found {size} in {location} "
                    f"and {tokens} in {policy}"
                )
    except LocalEntryNotFoundError:  # the nodes that load the models may have what this one lacks
        return ["the vocabularies were not compared: the hub is out of reach, and a model is not in its cache here"]
    except NeedsItsOwnCode as error:  # of the policy
        return [f"the vocabularies were not compared: {error}"]
    return warnings


def load(read: Callable[[str], Any], flag: str, location: str) -> Any:
    """``read(location)``; what is wrong with the model there becomes a ``ConfigError`` that names the flag.

    Raises:
        ConfigError: there is no such model, or it is broken.
        NeedsItsOwnCode: it cannot be read without running code that comes with it.
        LocalEntryNotFoundError: the hub is out of reach and has no copy here.
    """
    try:
        return read(location)
    except (OSError, ValueError) as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise error.__cause__ from None
        if "trust_remote_code" in str(error):
            raise NeedsItsOwnCode(f"{flag}: {location} is read by code of its own") from error
        raise ConfigError(f"{flag}: cannot read the model at {location}: {str(error).splitlines()[0]}") from error


def read_vocabulary(location: str) -> dict[int, str]:
    """Token id → token, of the tokenizer that the host would load from here."""
    tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)  # left out, it would ask the user
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _vocabulary_size(location: str) -> int:
    """Rows of the embedding."""
    config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    size: int = config.get_text_config().vocab_size
    return size

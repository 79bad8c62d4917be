"""Checks a model's weight files without loading the model."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PretrainedConfig

from pama_plugin.errors import ConfigError


def check_value_head(flag: str, location: str, prefix: str | None) -> None:
    """Refuse a folder whose weights have no value head: OpenRLHF would create a random one, and score with it.

    A name on the hub is not checked.

    Args:
        flag: the flag that the error names.
        location: folder or hub name.
        prefix: the head's name; None for OpenRLHF's default. The model's config.json takes precedence.

    Raises:
        ConfigError: the head is missing, or the files cannot be read.
    """
    folder = Path(location).expanduser()
    if not folder.is_dir():
        return
    try:
        names = _weight_names(folder)
        prefix = json.loads((folder / "config.json").read_text()).get("value_head_prefix", prefix or "score")
    except Exception as error:  # a damaged file may raise anything
        raise ConfigError(f"{flag}: cannot read the weights in {location}: {error}") from error
    if f"{prefix}.weight" not in names:
        raise ConfigError(
            f"{flag}: a value-head reward model must hold {prefix}.weight, without which it scores at random, found "
            f"none in {location} (value_head_prefix= names another head; for a sequence classifier use kind hf)"
        )


def check_code(flag: str, location: str, *, trusted: bool) -> None:
    """Refuse a model that comes with code, unless it is trusted: OpenRLHF would run the code without asking.

    A hub name that this machine cannot look up is not checked.

    Raises:
        ConfigError: the model's config.json names code, which ``trusted`` does not allow.
    """
    try:
        config, _ = PretrainedConfig.get_config_dict(location)
    except OSError:
        return
    if "auto_map" in config and not trusted:
        raise ConfigError(
            f"{flag}: trust_remote_code must be true for a model that comes with its own code, found auto_map in the "
            f"config.json of {location}"
        )


def _weight_names(folder: Path) -> set[str]:
    """Names in the first kind of file, of those that transformers would load, that exists."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            return set(json.loads((folder / index).read_text())["weight_map"])
    if (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return set(file.keys())
    return set(torch.load(folder / "pytorch_model.bin", map_location="meta", weights_only=True))

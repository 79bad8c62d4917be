"""Look at the checkpoint that a run would resume from, before Ray starts and without changing what is in it."""

import argparse
import re
import zipfile
from pathlib import Path

import torch
from pydantic import ValidationError

from pama_plugin.config import PamaConfig
from pama_plugin.errors import ConfigError
from pama_plugin.state import RunState

STATE = "pama"  # our key in the host's client_states


def prepare_resume(args: argparse.Namespace, config: PamaConfig, *, allow_other_objectives: bool) -> PamaConfig:
    """Refuse a checkpoint that cannot be resumed, say what of it will not be used, and mend an interrupted save.

    A run that was killed while it saved may leave the policy's ``latest`` one step ahead of the critic's: then both are
    set to the newest step that both have whole.

    Args:
        args: the host's flat arguments.
        config: what was asked for.
        allow_other_objectives: resume although names were added or removed.

    Returns:
        ``config``, with the objectives in the order of the saved ones, which is that of the critic's heads.

    Raises:
        ConfigError: no whole checkpoint, an unreadable state, or other objectives.
    """
    root = Path(getattr(args, "ckpt.path"))
    with_critic = getattr(args, "algo.advantage.estimator") == "gae"
    folders = [root / role for role in (("_actor", "_critic") if with_critic else ("_actor",))]
    if not getattr(args, "ckpt.load_enable") or not folders[0].exists():  # the host then starts from the beginning
        return config

    tag = _agree_on_a_tag(folders)
    saved = _read_state(folders[0] / tag)
    if saved is None:
        if with_critic and len(config.objectives) > 1:
            raise ConfigError(
                f"--ckpt.load_enable: the critic in {root} has one value head, found the objectives "
                f"{', '.join(config.names)}"
            )
        print(f"PAMA: {folders[0] / tag} is a stock checkpoint; the objectives' statistics start anew", flush=True)
        return config

    names = list(saved.objectives)
    if set(names) != set(config.names) and (with_critic or not allow_other_objectives):
        way_out = "its critic has one value head for each" if with_critic else "--pama.allow_other_objectives resumes"
        raise ConfigError(
            f"--ckpt.load_enable: {folders[0] / tag} is of the objectives {', '.join(names)} ({way_out}), "
            f"found {', '.join(config.names)}"
        )
    for name in RunState.start(config).swapped(saved):
        print(
            f"PAMA: {name!r} is not what the checkpoint saw: its statistics start anew, the others' go on", flush=True
        )
    rank = {name: index for index, name in enumerate(names)}
    ordered = sorted(config.objectives, key=lambda objective: rank.get(objective.name, len(rank)))
    return config.model_copy(update={"objectives": tuple(ordered)})


def _agree_on_a_tag(folders: list[Path]) -> str:
    latest = [(folder / "latest").read_text().strip() if (folder / "latest").is_file() else "" for folder in folders]
    if len(set(latest)) == 1 and latest[0]:
        broken = [str(file) for folder in folders for file in _broken_files(folder / latest[0])]
        if broken:
            pointers = " and ".join(str(folder / "latest") for folder in folders)
            raise ConfigError(
                f"--ckpt.load_enable: a checkpoint must be whole, found {broken[0]} corrupt or truncated; to resume "
                f"from an earlier step, write its name into {pointers}"
            )
        return latest[0]

    def step(tag: str) -> int:
        return int(re.search(r"(\d+)$", tag)[1])

    tags = set.intersection(*({path.name for path in folder.glob("*global_step*")} for folder in folders))
    for tag in sorted(tags, key=step, reverse=True):
        if not any(_broken_files(folder / tag) for folder in folders):
            for folder in folders:
                (folder / "latest").write_text(tag)
            print(
                f"PAMA: the last save was interrupted ({latest}); resuming from {tag}, the newest that is whole",
                flush=True,
            )
            return tag
    where = " and ".join(map(str, folders))
    raise ConfigError(f"--ckpt.load_enable: {where} must hold a whole checkpoint of the same step, found none")


def _broken_files(folder: Path) -> list[Path]:
    """torch's files are zip archives, whose directory comes last: a truncated one has none. No files is broken too."""
    files = sorted(folder.glob("*.pt"))
    return [file for file in files if not zipfile.is_zipfile(file)] if files else [folder]


def _read_state(folder: Path) -> RunState | None:
    """Our part of what DeepSpeed saved, without reading the weights; None if a stock run saved it."""
    file = next(iter(sorted(folder.glob("*mp_rank_00_model_states.pt"))))
    try:
        client_states = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
        text = client_states.get(STATE)
        return None if text is None else RunState.model_validate_json(text)
    except (ValidationError, RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(
            f"--ckpt.load_enable: {file} must hold a checkpoint that can be read, found {error}"
        ) from error

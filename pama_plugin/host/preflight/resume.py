"""Chooses and checks the checkpoint to resume from before Ray starts; only a start changes the checkpoint."""

import argparse
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pama_plugin.batch.state import RunState
from pama_plugin.errors import ConfigError
from pama_plugin.rewards.options import model_files
from pama_plugin.settings.objective import digest
from pama_plugin.settings.run import PamaConfig

STATE = "pama"  # our key in OpenRLHF's client_states
# What rules did before checkpoints recorded their settings.
FORMER = {
    "pama": "--pama.noon --pama.rescale none (0.1.0)",
    **dict.fromkeys(("linear", "min_norm", "gram"), "--pama.rescale none"),
    **dict.fromkeys(("gdpo", "gd2po", "rvpo"), "--pama.option whiten_sum=true"),
    "lagrangian": "gradient ascent in log λ (it goes on from the saved multipliers), without --pama.rescale",
}
# Flags of the policy's adapters that, changed, make another policy of the saved weights.
ADAPTERS = ("ds.lora.rank", "ds.lora.alpha", "ds.lora.target_modules", "ds.load_in_4bit")
TAG = re.compile(r"(?:best_)?global_step(\d+)")


class Resume(NamedTuple):
    """The step that is complete for both policy and critic, and their checkpoint folders."""

    folders: tuple[Path, ...]
    tag: str

    def point(self) -> None:
        """Write the step to every ``latest``, which DeepSpeed reads; an interrupted save may have left another step."""
        for folder in self.folders:
            latest = folder / "latest"
            if not latest.is_file() or latest.read_text() != self.tag:
                print(f"PAMA: the last save was cut off; resuming from {folder / self.tag}", flush=True)
                latest.write_text(self.tag)


def prepare_resume(
    args: argparse.Namespace, config: PamaConfig, *, allow_other_objectives: bool, allow_other_rule: bool
) -> tuple[PamaConfig, Resume | None]:
    """Refuse a checkpoint that cannot be resumed, and print which parts of it will not be used.

    Args:
        args: OpenRLHF's flags, flat; --ckpt.load_enable is switched off if no save was ever completed.
        config: the configuration of this run.
        allow_other_objectives: resume even if objectives were added or removed.
        allow_other_rule: resume even if the rule or one of its settings is another.

    Returns:
        ``config`` with the objectives in the order of the saved ones, which is the order of the critic's heads; and the
        step to resume from, or None.

    Raises:
        ConfigError: a damaged checkpoint, an unreadable state, other objectives, or another rule.
    """
    root = Path(getattr(args, "ckpt.path"))
    with_critic = getattr(args, "algo.advantage.estimator") == "gae"
    folders = _folders(root, with_critic)
    if not getattr(args, "ckpt.load_enable") or not folders[0].exists():  # OpenRLHF starts from the beginning
        return config, None
    if getattr(args, "ds.use_universal_ckpt"):
        raise ConfigError("--ds.use_universal_ckpt must be left out with --ckpt.load_enable and objectives, found True")

    tag = _choose_tag(folders)
    if tag is None:  # a scheduler that starts a job again must not be stopped by a first save that was cut off
        print(f"PAMA: no save in {root} was completed; the run starts from the beginning", flush=True)
        setattr(args, "ckpt.load_enable", False)
        return config, None
    resume = Resume(folders, tag)
    source = folders[0] / resume.tag
    saved = _read_state(source)
    if saved is None:
        if with_critic and len(config.trained) > 1:
            raise ConfigError(
                f"--ckpt.load_enable: the critic in {root} must have a value head for each of "
                f"{', '.join(config.trained_names)}, found one stock head"
            )
        print(f"PAMA: {source} is a stock checkpoint; the objectives' statistics start anew", flush=True)
        return config, resume

    if changes := _differences(saved.adapters, adapters_of(vars(args))):
        raise ConfigError(
            f"--ckpt.load_enable: the policy's adapters must be those of {source}, found {', '.join(changes)}"
        )
    names = list(saved.objectives)
    if with_critic and set(saved.heads) != set(config.trained_names):
        raise ConfigError(
            f"--ckpt.load_enable: the trained objectives must be those of the critic's value heads in {source}, "
            f"{', '.join(saved.heads)}, found {', '.join(config.trained_names)}"
        )
    if set(names) != set(config.names) and not allow_other_objectives:
        raise ConfigError(
            f"--ckpt.load_enable: the objectives must be those of {source}, {', '.join(names)}, found "
            f"{', '.join(config.names)}; --pama.allow_other_objectives resumes anyway"
        )
    if saved.rule and (changes := _differences(saved.rule, config.rule_settings())):
        if not allow_other_rule:
            raise ConfigError(
                f"--ckpt.load_enable: the rule must be that of {source}, found {', '.join(changes)}; "
                "--pama.allow_other_rule resumes anyway"
            )
        print(f"PAMA: resuming with another rule than that of {source}: {', '.join(changes)}", flush=True)
    elif not saved.rule:
        former = FORMER.get(config.loss.partition(":")[0])
        changed = f", which an older version combined otherwise: {former} is what it did" if former else ""
        print(
            f"PAMA: {source} does not say with which rule it was trained; going on with --loss {config.loss}{changed}",
            flush=True,
        )
    for name in RunState.start(config, getattr(args, "train.agent_func_path")).swapped(saved):
        print(
            f"PAMA: the reward of {name!r} is not that of the checkpoint: its statistics start anew, the others' "
            "continue",
            flush=True,
        )
    rank = {name: index for index, name in enumerate(names)}
    ordered = sorted(config.objectives, key=lambda objective: rank.get(objective.name, len(rank)))
    return config.model_copy(update={"objectives": tuple(ordered)}), resume


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that are not those of the checkpoint."""
    return [
        f"{key} {now.get(key)} instead of {saved.get(key)}"
        for key in {**saved, **now}
        if saved.get(key) != now.get(key)
    ]


def adapters_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the policy's adapters and their base, by OpenRLHF's flags, flat; empty if it has no adapters."""
    if not flags["ds.lora.rank"]:
        return {}
    targets, base = flags["ds.lora.target_modules"], str(flags["actor.model_name_or_path"])
    if files := model_files(base):  # a folder may be elsewhere after a move
        base = f"sha256:{digest(files)}"
    named = {"ds.lora.target_modules": targets if isinstance(targets, str) else sorted(targets)}
    return {flag: flags[flag] for flag in ADAPTERS} | named | {"base": base}


def describe_saved(root: Path, *, with_critic: bool) -> str:
    """Say from which step of the checkpoints in ``root`` a run can be resumed."""
    folders = _folders(root, with_critic)
    try:
        tag = _choose_tag(folders) if folders[0].exists() else None
    except (OSError, ValueError) as error:
        return str(error)
    if tag is None:
        return f"no checkpoint was saved in {root} (--ckpt.save_steps)"
    return f"--ckpt.load_enable resumes from {folders[0] / tag}"


def _folders(root: Path, with_critic: bool) -> tuple[Path, ...]:
    return tuple(root / role for role in (("_actor", "_critic") if with_critic else ("_actor",)))


def _choose_tag(folders: tuple[Path, ...]) -> str | None:
    """Return the newest step that is complete in all folders; None if no save was ever completed.

    DeepSpeed writes ``latest`` last, so a step newer than the oldest ``latest`` is an interrupted save. The step that
    ``latest`` names may be gone: OpenRLHF deletes old checkpoints before it saves the next.
    """
    where = " and ".join(map(str, folders))
    texts = [(folder / "latest").read_text().strip() for folder in folders if (folder / "latest").is_file()]
    pointers = [text for text in texts if text]  # an interrupted write leaves an empty one
    steps = [int(match[1]) for match in map(TAG.fullmatch, pointers) if match]
    if len(steps) < len(pointers):
        raise ConfigError(f"--ckpt.load_enable: latest in {where} must name a saved step, found {pointers}")
    if len(steps) == len(folders) and len(set(pointers)) == 1:
        for folder in folders:
            if (folder / pointers[0]).is_dir() and (problem := _what_is_broken(folder / pointers[0])):
                raise ConfigError(
                    f"--ckpt.load_enable: the checkpoint must be complete, found {problem}; to resume from an earlier "
                    f"step, write its name into latest of {where}"
                )
    shared = set.intersection(*({path.parent.name for path in folder.glob("*/*.pt")} for folder in folders))
    limit = min(steps, default=math.inf)
    tags = {tag: int(match[1]) for tag in shared if (match := TAG.fullmatch(tag)) and int(match[1]) <= limit}
    # Of a step's two checkpoints (regular and best), latest names the one that was saved last.
    for tag in sorted(tags, key=lambda tag: (tags[tag], tag in pointers), reverse=True):
        if not any(_what_is_broken(folder / tag) for folder in folders):
            return tag
    if len(steps) < len(folders):
        return None
    raise ConfigError(f"--ckpt.load_enable: {where} must hold a complete checkpoint of the same step, found none")


def _what_is_broken(folder: Path) -> str | None:
    """Return what is wrong, or None. A truncated zip archive, as torch's files are, has no directory."""
    for file in sorted(folder.glob("*.pt")):
        if not zipfile.is_zipfile(file):
            return f"{file} corrupt or truncated"
    models, optimizers = (len(list(folder.glob(f"*{kind}_states.pt"))) for kind in ("model", "optim"))
    if not models:
        return f"no model states in {folder}"
    content = _load(_first_model_file(folder))
    if content.get("optimizer") is not None:  # without ZeRO it is in the file of the model
        return None
    ranks = content.get("dp_world_size", 1)
    return None if optimizers >= ranks else f"{optimizers} of {ranks} optimizer states in {folder}"


def _first_model_file(folder: Path) -> Path:
    return min(folder.glob("*model_states.pt"))


def _load(file: Path) -> dict[str, Any]:
    """Load a file that DeepSpeed saved, without reading the weights."""
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
        return dict(content)
    except Exception as error:  # a damaged pickle may raise anything
        raise ConfigError(f"--ckpt.load_enable: {file} must hold a readable checkpoint, found {error}") from error


def _read_state(folder: Path) -> RunState | None:
    """Return our part of a checkpoint; None if a stock run saved it."""
    file = _first_model_file(folder)
    text = _load(file).get(STATE)
    if text is None:
        return None
    try:
        return RunState.model_validate_json(text)
    except ValueError as error:
        raise ConfigError(f"--ckpt.load_enable: {file} must hold a readable state, found {error}") from error

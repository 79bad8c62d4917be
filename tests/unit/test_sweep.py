"""``pama sweep`` trains each run once, resumes after an interruption, and writes complete results only."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from pama_plugin.cli import main
from pama_plugin.errors import ConfigError
from pama_plugin.runs.sweep_file import load_sweep

FILE = """
flags: --actor.model_name_or_path policy
objectives: {a: "builtin:length", b: "hf:model,label=1"}
seeds: [1, 2]
grids:
- rules: {pama: --loss pama --pama.level token, linear: --loss linear}
- rules: {morlhf: --loss morlhf}
  weights: [{a: 1, b: 3}, {a: 0.5}]
  seeds: [7]
- rules: {again: --loss linear}
"""

# Stands in for ``pama train``: writes the log of two steps, and fails or waits on request.
PAMA = """#!/bin/bash
echo "$1" >> {folder}/calls
while [ "$1" != --logger.tensorboard_dir ]; do shift; done
echo "Global step 1: ..."
while [ -e {folder}/wait ]; do sleep 0.05; done
mkdir -p "$2/ppo_1231T23:59" && cp {folder}/log/* "$2/ppo_1231T23:59"  # a folder by run, as of OpenRLHF
echo "Global step 2: ..."
[ ! -e {folder}/fail ]
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep file, and a fake ``pama`` that records its calls."""
    (tmp_path / "sweep.yaml").write_text(FILE)
    fake = tmp_path / "bin" / "pama"
    fake.parent.mkdir()
    fake.write_text(PAMA.format(folder=tmp_path))
    with SummaryWriter(str(tmp_path / "log")) as writer:
        for step in (1, 2):
            for tag in ("reward/a", "pama/coefficient/a"):
                writer.add_scalar(f"train/{tag}", step / 3, step)
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake.with_name("python")))
    return tmp_path


def run(folder: Path, *flags: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", str(folder / "sweep.yaml"), "--out", str(folder / "out"), *flags])
    return stopped.value.code


def test_the_grid(sweep) -> None:
    jobs = load_sweep(sweep / "sweep.yaml")
    assert [(job.arm, job.seed) for job in jobs] == [
        *[("pama", 1), ("linear", 1), ("morlhf 1:3", 7), ("morlhf 0.5", 7)],  # first seeds first
        *[("pama", 2), ("linear", 2)],  # "again" is linear by another name
    ]
    assert jobs[2].flags == [
        *"--actor.model_name_or_path policy --loss morlhf --train.seed 7".split(),
        *["--pama.objective", "a=builtin:length,weight=1", "--pama.objective", "b=hf:model,label=1,weight=3"],
    ]
    assert len({job.folder for job in jobs}) == 6 and all("/" not in job.folder for job in jobs)


def test_everything_runs_once(sweep, capsys) -> None:
    assert run(sweep, "--jobs", "2") == 0
    results = sorted((sweep / "out").glob("*/result.json"))
    assert len(results) == 6 and (sweep / "calls").read_text() == 6 * "train\n"
    result = json.loads(results[0].read_text())
    assert (result["arm"], result["seed"]) == ("linear", 1)
    assert result["scalars"]["reward/a"] == [[1, 0.333333], [2, 0.666667]]
    assert run(sweep) == 0
    assert len((sweep / "calls").read_text().split()) == 6
    assert "6 runs, 6 of them done" in capsys.readouterr().out


def test_a_result_has_the_settings_of_its_run_and_older_ones_are_pointed_out(sweep, capsys) -> None:
    (sweep / "log" / "pama.yaml").write_text("loss: linear\nrescale: unit\n")
    assert run(sweep) == 0
    results = sorted((sweep / "out").glob("*/result.json"))
    assert all(
        json.loads(result.read_text())["settings"] == {"loss": "linear", "rescale": "unit"} for result in results
    )
    results[0].unlink()
    assert run(sweep) == 0 and "older version" not in capsys.readouterr().out
    for result in results[:2]:
        content = json.loads(result.read_text())
        result.write_text(json.dumps({key: value for key, value in content.items() if key != "settings"}))
    results[0].unlink()
    assert run(sweep) == 0 and "Runs of an older version are among them" in capsys.readouterr().out


def test_a_failed_run_has_no_result_and_restarts(sweep, capsys) -> None:
    (sweep / "fail").touch()
    assert run(sweep) == 1
    assert "failed: " in capsys.readouterr().out and not list((sweep / "out").glob("*/result.json"))
    (sweep / "fail").unlink()
    assert run(sweep) == 0
    assert len(list((sweep / "out").glob("*/result.json"))) == 6


def test_a_run_without_a_log_has_failed(sweep, capsys) -> None:
    for file in (sweep / "log").iterdir():
        file.unlink()
    (sweep / "log" / "other").touch()
    assert run(sweep) == 1
    assert "no TensorBoard events" in next((sweep / "out").glob("*/run.log")).read_text()
    assert run(sweep, "--jobs", "0") == 2


@pytest.mark.parametrize("content", ["", '{"arm": "pama"', "{}", '{"scalars": {"a": [1]}}', "[]"])
def test_a_result_that_is_not_whole_is_made_again(sweep, content, capsys) -> None:
    assert run(sweep) == 0
    result = min((sweep / "out").glob("*/result.json"))
    result.write_text(content)
    assert run(sweep) == 0
    said = capsys.readouterr().out
    assert f"{result} " in said and "the run is repeated" in said and "6 runs, 5 of them done" in said
    assert len((sweep / "calls").read_text().split()) == 7 and json.loads(result.read_text())["seed"]


def test_a_run_whose_log_cannot_be_written_does_not_end_the_sweep(sweep, capsys) -> None:
    """As on a full disk."""
    job = load_sweep(sweep / "sweep.yaml")[0]
    (sweep / "out" / job.folder / "run.log").mkdir(parents=True)
    assert run(sweep) == 1
    assert re.search(rf"{job.folder}: .*Is a directory", capsys.readouterr().out)
    assert len(list((sweep / "out").glob("*/result.json"))) == 5


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_sweep_resumes(sweep, sent) -> None:
    """SIGTERM and SIGINT also end the run. After SIGKILL it goes on, and the next sweep does not start it again."""
    (sweep / "wait").touch()
    code = (
        f"import sys; sys.executable = {sys.executable!r}; from pama_plugin.cli import main; "
        f"main(['sweep', {str(sweep / 'sweep.yaml')!r}, '--out', {str(sweep / 'out')!r}])"
    )
    process = subprocess.Popen(
        [f"{sys.prefix}/bin/python", "-c", code],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A shell makes background processes, such as a whole run of the tests, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 60
        while not (sweep / "calls").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(sent)
        assert process.wait(30) != 0
    finally:
        process.kill()
        process.wait()

    (lock,) = (sweep / "out").glob("*/lock")
    with lock.open("w") as handle:
        if sent == signal.SIGKILL:  # the run goes on and holds the lock
            with pytest.raises(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if sent == signal.SIGKILL:
        (sweep / "wait").unlink()
        with lock.open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
    (sweep / "wait").unlink(missing_ok=True)
    assert run(sweep) == 0
    assert len(list((sweep / "out").glob("*/result.json"))) == 6
    assert len((sweep / "calls").read_text().split()) == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("objectives: {", "sweep.yaml: not valid YAML"),
        ('flags: "--x \'y"\nobjectives: {a: x}\ngrids: [{rules: {p: --loss p}}]', "flags: No closing quotation"),
        ("objectives: {a: x}\ngrids: [{rules: {p: --loss 'p}}]", "grids.0.rules.p: No closing quotation.*found"),
        ("objectives: !!bool maybe", "sweep.yaml: not valid YAML: 'maybe' is not of the type bool"),
        ("objectives: {a: 'builtin:length'}", "sweep.yaml: grids: Field required"),
        ("objectives: {a: 'builtin:length'}\ngrids: [{rules: {}}]", "grids.0.rules: .*at least 1"),
        ("objectives: {a: x}\ngrids: [{rules: {p: --loss p}, weights: [{b: 1}]}]", "weights .*a, found b"),
        ("objectives: {a: x}\ngrids: [{rules: {p: --loss p}, weights: [{a: 0}]}]", "weights.*greater than 0.* found 0"),
        ("objectives: {a: x}\ngrids: [{rules: {p: --loss p}, seed: [1]}]", "grids.0.seed: Extra"),
    ],
)
def test_a_bad_file(content, message, tmp_path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_sweep(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("objectives: {a: 'builtin:length', a: 'builtin:json'}\ngrids: [{rules: {p: --loss pama}}]", "found a twice"),
        ("objectives: {a: 'builtin:length'}\ngrids: [{rules: {p: --loss pama, p: --loss linear}}]", "found p twice"),
        (
            "objectives: {a: 'builtin:length'}\ngrids: [{rules: {p: --loss pama}, weights: [{a: 1, a: 2}]}]",
            "found a twice",
        ),
        (
            "objectives: {a: 'builtin:length'}\ngrids: [{rules: {good: --loss pama, bad: --loss pamma}}]",
            "sweep.yaml: bad: --loss .* found 'pamma'",
        ),
        (
            "objectives: {a: 'builtin:length,weight=2'}\ngrids: [{rules: {p: --loss pama}, weights: [{a: 1}]}]",
            "sweep.yaml: p 1: .* found an option twice",
        ),
        (
            "objectives: {a: 'builtin:length'}\ngrids: [{rules: {stock: --loss ppo}}]",
            "sweep.yaml: stock: .*needs --loss RULE",
        ),
        (
            "objectives: {a: 'builtin:length'}\ngrids: [{rules: {none: --pama.level token}}]",
            "sweep.yaml: none: .*needs --loss RULE",
        ),
        (
            "flags: --pama.lvel token\nobjectives: {a: 'builtin:length'}\ngrids: [{rules: {p: --loss pama}}]",
            "sweep.yaml: p: .*--pama.lvel.*--pama.level",
        ),
    ],
)
def test_invalid_runs_are_refused_before_the_first_run(content, message, sweep, capsys) -> None:
    (sweep / "sweep.yaml").write_text(content)
    assert run(sweep) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (sweep / "calls").exists()


def test_a_sweep_that_is_stopped_while_a_run_starts_stops_that_run_too(sweep, monkeypatch) -> None:
    (sweep / "wait").touch()
    start = subprocess.Popen

    def slow_start(*command, **options):
        process = start(*command, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        return process

    monkeypatch.setattr("pama_plugin.runs.sweep.subprocess.Popen", slow_start)
    stock = signal.getsignal(signal.SIGTERM)
    try:
        assert run(sweep) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, stock)
        (sweep / "wait").unlink()


def test_rules_with_long_names_have_folders(tmp_path) -> None:
    names = ("r" * 300, "r" * 299, "規則" * 100, "a/../b")
    rules = {name: f"--loss pama --x {index}" for index, name in enumerate(names)}
    content = {"objectives": {"a": "builtin:length"}, "grids": [{"rules": rules}]}
    (tmp_path / "sweep.yaml").write_text(json.dumps(content, ensure_ascii=False))
    folders = [job.folder for job in load_sweep(tmp_path / "sweep.yaml")]
    for folder in folders:
        (tmp_path / "out" / folder).mkdir(parents=True)
    assert len(list((tmp_path / "out").iterdir())) == 4 and folders[3].startswith("a-..-b-seed42-")


def test_a_missing_file(tmp_path) -> None:
    with pytest.raises(ConfigError, match="sweep.yaml: No such file"):
        load_sweep(tmp_path / "sweep.yaml")

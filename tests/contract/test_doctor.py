"""pama doctor: every check can pass and fail, and the exit code is 0 only if a run could start."""

import os
import pwd
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
from hosttools import ROOT, save_tiny_model

from pama_plugin.host import doctor
from pama_plugin.host.doctor import Check, Gpus

pytestmark = pytest.mark.contract

ONE_EACH = [
    *("--actor.num_gpus_per_node", "1", "--ref.num_gpus_per_node", "1", "--critic.num_gpus_per_node", "1"),
    *("--reward.num_gpus_per_node", "1", "--vllm.num_engines", "1", "--algo.advantage.estimator", "reinforce"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes = {"policy": 20, "same": 20, "small": 19}
    found = {name: save_tiny_model(folder / name, size) for name, size in sizes.items()}
    return found | {"other": save_tiny_model(folder / "other", 20, word="u")}


@pytest.fixture(scope="module")
def cluster(local_ray):
    """The address of this folder's own small Ray."""
    import ray

    return ray.get_runtime_context().gcs_address


def run(*flags: str, address: str) -> tuple[int, str]:
    """The whole command; in a process of its own, since it swaps classes of the host."""
    code = "from pama_plugin.cli import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", code, "doctor", *flags]
    environment = os.environ | {"RAY_ADDRESS": address, "COLUMNS": "200"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    print(process.stdout, process.stderr)
    return process.returncode, process.stdout


def flags_for(models: dict[str, str], *objectives: str) -> list[str]:
    flags = ["--actor.model_name_or_path", models["policy"], "--data.prompt_dataset", "prompts.jsonl", *ONE_EACH]
    return [*flags, "--ds.attn_implementation", "eager", "--loss", "pama"] + [
        word for objective in objectives for word in ("--pama.objective", objective)
    ]


@pytest.mark.e2e  # whole commands, each of which imports the host: seconds apiece
def test_a_run_that_could_start(models, cluster) -> None:
    flags = flags_for(models, f"a=rm:{models['same']}", f"b=rm:{models['other']}", "length=builtin:length")
    code, out = run(*flags, address=cluster)
    user = pwd.getpwuid(os.getuid()).pw_name
    assert code == 0 and "FAIL" not in out and out.endswith("\nThis run could start.\n")
    for line in (
        "openrlhf       ok       0.11.2+cpu",
        "seams          ok       as released",
        f"Ray            ok       a cluster of RAY_ADDRESS, {cluster}, started by {user}: 1 nodes",
        "device         ok       CPU",
        "flash-attn     warning  cannot be imported",
        "flags          ok       OpenRLHF and the plugin take them",
        "the run asks Ray for 5, there are 16 and",
        "tokenizers     ok       a reads the policy's 20 token ids as the policy does",
        "tokenizers     warning  20 of the policy's 20 token ids are other tokens to b: 0 is 't0', to b 'u0'",
    ):
        assert line in out


@pytest.mark.e2e  # whole commands, each of which imports the host: seconds apiece
@pytest.mark.parametrize(
    ("objective", "more", "found"),
    [
        (
            "r=rm:{small}",
            [],
            "FAIL     --pama.objective r: its vocabulary must hold every token of the policy, found 19",
        ),
        ("r=rm:{same}", ["--algo.advantage.estimator", "rloo"], "FAIL     AssertionError: rloo requires n_samples"),
    ],
    ids=["the plugin", "the host"],
)
def test_a_run_that_is_refused(objective, more, found, models, cluster) -> None:
    code, out = run(*flags_for(models, objective.format(**models)), *more, address=cluster)
    assert code == 1 and f"flags          {found}" in out
    assert out.endswith("A run could not start: 1 of the checks failed.\n")


def examine(monkeypatch, **replaced) -> tuple[int, list[Check]]:
    """The checks without flags, in this process, some of them replaced by what they gave."""
    found = {"_ray": (Check("Ray", "ok", ""), Gpus(8, 8))} | replaced
    for name, value in found.items():
        monkeypatch.setattr(doctor, name, lambda *_, value=value, **__: value)
    return doctor.doctor([]), list(doctor._examine([]))


def test_this_site(monkeypatch) -> None:
    code, checks = examine(monkeypatch)
    assert code == 0 and {check.status for check in checks} == {"ok", "warning"}
    names = [check.name for check in checks]
    assert names[:7] == ["pama_plugin", "torch", "transformers", "ray", "deepspeed", "vllm", "openrlhf"]
    assert names[7:] == ["seams", "launch", "Ray", "device", "flash-attn"]


def test_one_failure_is_exit_code_1(monkeypatch, capsys) -> None:
    code, _ = examine(monkeypatch, _device=Check("device", "FAIL", "none"))
    assert code == 1 and "1 of the checks failed" in capsys.readouterr().out


def test_a_package_that_is_missing(monkeypatch) -> None:
    def found(name: str) -> str:
        if name == "deepspeed":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", found)
    code, checks = examine(monkeypatch)
    assert code == 1 and Check("deepspeed", "FAIL", "not installed") in checks


def test_a_version_that_openrlhf_does_not_ask_for(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: {"ray": "2.40.0", "vllm": "0.8.1"}.get(name) or version(name))
    code, checks = examine(monkeypatch)
    assert code == 0
    assert Check("ray", "warning", "2.40.0; the installed OpenRLHF asks for ==2.55.0") in checks
    asked = "==0.29.0 or >=0.29.0"  # by one extra or the other
    assert Check("vllm", "warning", f"0.8.1; the installed OpenRLHF asks for {asked}") in checks


def test_no_openrlhf(monkeypatch) -> None:
    from pama_plugin.host.preflight import fingerprints

    monkeypatch.setattr(fingerprints, "find_spec", lambda _: None)
    code, checks = examine(monkeypatch)
    assert code == 1 and (checks[-1].name, checks[-1].status) == ("openrlhf", "FAIL")


def test_a_checkout_in_the_working_directory(tmp_path, monkeypatch) -> None:
    """``python -m`` would run it instead."""
    (tmp_path / "openrlhf").mkdir()
    monkeypatch.chdir(tmp_path)
    _, checks = examine(monkeypatch)
    (warning,) = [check for check in checks if check.name == "openrlhf" and check.status == "warning"]
    assert str(tmp_path / "openrlhf") in warning.detail


def test_a_host_that_drifted(monkeypatch) -> None:
    from pama_plugin.host.preflight import fingerprints

    monkeypatch.setattr(fingerprints, "version", lambda _: "0.12.0")
    (refused,) = doctor._seams(allow_unsupported=False)
    assert refused.status == "FAIL" and "found 0.12.0" in refused.detail
    unsupported, bodies = doctor._seams(allow_unsupported=True)
    assert (unsupported.status, bodies.status) == ("warning", "warning") and "found 0.12.0" in unsupported.detail
    assert "OpenRLHF 0.12.0 differs from release 0.11.2" in bodies.detail  # by our patch


def test_the_ways_in(monkeypatch) -> None:
    from pama_plugin.host import pth

    monkeypatch.setattr(pth, "installed", lambda: ["site-packages/pama_plugin.pth"])
    assert "site-packages/pama_plugin.pth, the stock OpenRLHF command" in doctor._way_in().detail
    monkeypatch.setattr(sys, "version_info", (3, 18, 0))
    assert "pama train only: this Python ignores" in doctor._way_in().detail
    monkeypatch.setattr(pth, "installed", lambda: [])
    assert "`pama enable` adds the stock OpenRLHF command" in doctor._way_in().detail


def test_a_cluster_that_does_not_answer(monkeypatch) -> None:
    """Ray itself would try for minutes."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(doctor, "RAY_TIMEOUT", 1)
    check, gpus = doctor._ray()
    assert check == Check("Ray", "FAIL", "no answer within 1 s from the cluster at 127.0.0.1:1") and gpus is None


CLUSTER = '{"nodes": 2, "gpus": 16, "free": 3, "address": "h:1", "owner": "me", "own": %s}'


@pytest.mark.parametrize(
    ("printed", "address", "gpus", "status", "found"),
    [
        ("null", "", 4, "ok", "the run will start one on this machine, with 4 GPUs"),
        ("null", "", 0, "FAIL", "with 0 GPUs; on CPUs, ray start --head --num-gpus N"),
        ("null", "host:6379", 4, "FAIL", "found none at host:6379"),
        (
            CLUSTER % "true",
            "host:6379",
            0,
            "ok",
            "a cluster of RAY_ADDRESS, h:1, started by me: 2 nodes, 16 GPUs, 3 of",
        ),
        (CLUSTER % "true", "", 0, "ok", "a cluster found on this machine, h:1, started by me: 2 nodes"),
        (CLUSTER % "false", "host:6379", 0, "ok", "started by me"),
        (CLUSTER % "false", "", 0, "warning", "a cluster found on this machine, h:1, started by me"),
        ("", "host:6379", 0, "FAIL", "cannot connect to the cluster at host:6379: no output"),
    ],
)
def test_what_ray_has(printed, address, gpus, status, found, monkeypatch) -> None:
    import torch

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=printed, stderr=""))
    check, _ = doctor._ray()
    assert check.status == status and found in check.detail


@pytest.mark.parametrize(
    ("cuda", "gpus", "patched", "status"),
    [(2, None, False, "ok"), (0, None, True, "ok"), (0, Gpus(8, 8), False, "warning"), (0, Gpus(0, 0), False, "FAIL")],
)
def test_the_device(cuda, gpus, patched, status, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    check = doctor._device(gpus, runs_without_cuda=patched)
    assert check.status == status and (not cuda or check.detail == "2 GPUs: H100")


def test_flash_attn(monkeypatch) -> None:
    assert doctor._flash_attn(required=True).status == "FAIL"
    assert doctor._flash_attn(required=False).status == "warning"
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(__version__="2.8.3"))
    assert doctor._flash_attn(required=True) == Check("flash-attn", "ok", "2.8.3")


@pytest.mark.parametrize(("asked", "status"), [(3, "ok"), (5, "warning"), (9, "FAIL")])
def test_the_room_for_it(asked, status) -> None:
    assert doctor._room(asked, Gpus(8, 4)).status == status


@pytest.mark.parametrize(
    ("flags", "found"),
    [(["--loss", "pama", "--pama.config", "{bad}"], "not valid YAML: "), (["--help"], "they start no run")],
)
def test_flags_that_end_the_command_in_many_lines_or_none(flags, found, tmp_path) -> None:
    (tmp_path / "bad.yaml").write_text("objectives: [\n  a: b\n c")
    args, problem = doctor._dry_run([flag.format(bad=tmp_path / "bad.yaml") for flag in flags])
    assert args is None and found in problem

"""The drift guard: the table is what the real wheels have, and every kind of drift is noticed for what it is."""

import importlib
import inspect
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from hosttools import ALL_MODES, ROOT
from packaging.requirements import Requirement

from pama_plugin.errors import ConfigError
from pama_plugin.host.preflight import fingerprints
from pama_plugin.host.preflight.fingerprints import SEAMS, check_host, fingerprint, known_releases

pytestmark = pytest.mark.contract

RELEASES = list(known_releases())
SUPPORTED = [release for release in RELEASES if "+" not in release]
# The oldest one; all by hand, with PAMA_ALL_MODES=1, because each takes 70 s of a core.
OLDER = SUPPORTED[:-1] if ALL_MODES else SUPPORTED[:1]
# Not trainer_async: its halves must run at the same time, which one process cannot play.
BEHAVIOUR = ("parity", "experience", "critic", "checkpoint", "evaluation", "rollout", "seam")
MAKER = "trainer/ppo_utils/experience_maker.py"
ESTIMATE = f"{MAKER}:RemoteExperienceMaker.compute_advantages_and_returns"


def unpack(wheel: Path, folder: Path) -> Path:
    """The folder that has the package; the metadata is one above."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (package,) = folder.glob("*.data/purelib")
    return package


@pytest.fixture
def installed(wheels, tmp_path, monkeypatch):
    """Make a copy of this release the installed one, with one file of it rewritten, under this version."""

    def install(release: str, *, file: str = "", old: str = "", new: str = "", version: str | None = None) -> None:
        package = unpack(wheels[release], tmp_path) / "openrlhf"
        if file:
            text = (package / file).read_text()
            assert re.search(old, text), f"{file} has no {old!r}"
            (package / file).write_text(re.sub(old, new, text))
        monkeypatch.setattr(fingerprints, "host_package", lambda: package)
        monkeypatch.setattr(fingerprints, "version", lambda _: version or release)

    return install


@pytest.mark.parametrize("release", RELEASES)
def test_the_table_is_what_the_wheel_has(release, wheels) -> None:
    with_seams = {f"{file}:{name}" for file, names in SEAMS.items() for name in names.split()}
    found = fingerprint(zipfile.Path(wheels[release]) / f"openrlhf-{release}.data" / "purelib" / "openrlhf")
    assert found == known_releases()[release], "write the table anew: see the docstring of preflight/fingerprints.py"
    assert set(found) == with_seams


@pytest.mark.parametrize("told", ["version.txt", "the fingerprints"])
def test_a_checkout_that_is_not_installed(told, installed, monkeypatch) -> None:
    def fail(_: str) -> str:
        raise PackageNotFoundError

    installed("0.11.1")
    monkeypatch.setattr(fingerprints, "version", fail)
    if told == "version.txt":
        (fingerprints.host_package().parent / "version.txt").write_text("0.11.1\n")
        (fingerprints.host_package().parent / "setup.py").touch()
    assert fingerprints.host_release() == "0.11.1" and check_host(False) == []


def test_a_version_txt_of_another_package_is_not_openrlhfs(installed) -> None:
    installed("0.11.1")
    (fingerprints.host_package().parent / "version.txt").write_text("7.7.7\n")
    assert fingerprints.host_release() == "0.11.1"


def test_no_openrlhf_at_all(monkeypatch) -> None:
    monkeypatch.setattr(fingerprints, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="OpenRLHF must be installed"):
        check_host(False)


MODULES = [path.stem for path in (ROOT / "pama_plugin" / "host").glob("[a-z]*.py")]


@pytest.mark.parametrize("module", MODULES)
def test_what_is_imported_or_overridden_is_a_seam(module) -> None:
    import openrlhf.trainer.ray  # noqa: F401  first: importing deepspeed before vLLM spoils its set-up

    def is_hosts(thing: object) -> bool:
        return (getattr(thing, "__module__", None) or "").startswith("openrlhf.")

    guarded = {name for names in SEAMS.values() for name in names.split()}
    for name, value in vars(importlib.import_module(f"pama_plugin.host.{module}")).items():
        kind = getattr(getattr(value, "__ray_metadata__", None), "modified_class", value)
        if is_hosts(kind):
            assert name in {seam.partition(".")[0] for seam in guarded}, f"{name}, which {module} imports"
        elif isinstance(kind, type):
            for key, method in inspect.getmembers(kind, inspect.isfunction):
                inherited = [inspect.unwrap(getattr(base, key)) for base in kind.__mro__ if hasattr(base, key)]
                stock = [each for each in inherited if is_hosts(each)]
                if stock and not is_hosts(method):
                    assert stock[0].__qualname__ in guarded, f"{kind.__name__} overrides it"


def test_every_list_of_releases_is_the_tables() -> None:
    assert SUPPORTED == ["0.11.0", "0.11.1", "0.11.2"]
    assert sorted([*SUPPORTED, *(f"{release}+cpu" for release in SUPPORTED)]) == RELEASES
    builder = (ROOT / "patches" / "build_wheel.py").read_text()
    assert re.findall(r'^    "([\d.]+)": "[0-9a-f]{64}"', builder, flags=re.MULTILINE) == SUPPORTED
    (pin,) = (each.specifier for each in map(Requirement, requires("pama_plugin")) if each.name == "openrlhf")
    assert all(release in pin for release in SUPPORTED) and "0.10.9" not in pin and "0.11.3" not in pin


def test_the_table_is_written_from_wheels(wheels, tmp_path, monkeypatch) -> None:
    copy = tmp_path / "fingerprints.json"
    committed = fingerprints.TABLE.read_text()
    monkeypatch.setattr(fingerprints, "TABLE", copy)
    fingerprints.write_table(list(wheels.values()))
    assert copy.read_text() == committed


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_as_it_is_is_silent(release, installed) -> None:
    installed(release)
    assert check_host(allow_unsupported=False) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"# At least|# Use at least FP32", "# another comment"),
        ('"""Compute shaped rewards, advantages', '"""Another docstring'),
        (r"args = self\.strategy\.args\n", "args = (\n            self.strategy.args)\n"),
        (
            r"def compute_advantages_and_returns\([^)]*\) -> [^:]*",
            "def compute_advantages_and_returns(self, experiences)",
        ),
    ],
    ids=["comment", "docstring", "layout", "annotations"],
)
def test_what_changes_no_behaviour_is_silent(old, new, installed) -> None:
    installed("0.11.2", file=MAKER, old=old, new=new)
    assert check_host(allow_unsupported=False) == []


def test_a_changed_body_is_a_warning(installed) -> None:
    installed("0.11.2", file=MAKER, old=r"rewards = rewards - rewards\.mean\(\)", new="rewards = rewards")
    (warning,) = check_host(allow_unsupported=False)
    assert warning.endswith(f"in the body of {ESTIMATE}") and "OpenRLHF 0.11.2 differs from release 0.11.2" in warning


SIGNATURE = {"file": MAKER, "old": r"(def compute_advantages_and_returns\(\s*self, )experiences", "new": r"\1batch"}
BOTH = (
    f"{ESTIMATE} of OpenRLHF 0.11.2 must be 'def compute_advantages_and_returns(self, experiences)', "
    "found 'def compute_advantages_and_returns(self, batch)'"
)


def test_a_changed_signature_is_refused_with_both_unless_overridden(installed) -> None:
    installed("0.11.2", **SIGNATURE)
    with pytest.raises(ConfigError) as error:
        check_host(allow_unsupported=False)
    assert str(error.value).startswith(f"{BOTH}; --pama.allow_unsupported_host ")
    assert check_host(allow_unsupported=True) == [BOTH]


@pytest.mark.parametrize(
    ("file", "old", "new", "seam"),
    [
        (MAKER, "def make_experience_batch", "def make_batch", f"{MAKER}:RemoteExperienceMaker.make_experience_batch"),
        (
            "trainer/ray/launcher.py",
            "class RayActorGroup",
            "class Group",
            "trainer/ray/launcher.py:RayActorGroup.__init__",
        ),
        ("cli/train_ppo_ray.py", 'if __name__ == "__main__"', "if True", "cli/train_ppo_ray.py:__main__"),
    ],
)
def test_a_seam_that_is_gone_is_refused(file, old, new, seam, installed) -> None:
    installed("0.11.2", file=file, old=old, new=new)
    with pytest.raises(ConfigError, match=f"{seam} of OpenRLHF 0.11.2 must be .*, found 'nothing'"):
        check_host(allow_unsupported=False)


def test_a_field_that_is_gone_is_a_changed_signature(installed) -> None:
    installed("0.11.2", file="trainer/ppo_utils/experience.py", old=r"\n    truncated: [^\n]*", new="")
    with pytest.raises(ConfigError, match="experience.py:Experience of OpenRLHF .*found 'class Experience"):
        check_host(allow_unsupported=False)


def test_somebodys_own_build_is_compared_with_its_release(installed) -> None:
    installed("0.11.1", version="0.11.1+mine")
    assert check_host(allow_unsupported=False) == []


@pytest.mark.parametrize(("found", "nearest"), [("0.12.0", "0.11.2"), ("0.11.0.post1", "0.11.0"), ("0.10.4", "0.11.0")])
def test_an_unknown_release_is_refused_and_compared_with_the_nearest(found, nearest, installed) -> None:
    installed(nearest, version=found)
    unsupported = f"OpenRLHF must be one of 0.11.0, 0.11.1, 0.11.2, found {found}"
    with pytest.raises(ConfigError) as error:
        check_host(allow_unsupported=False)
    assert str(error.value).startswith(f"{unsupported}; --pama.allow_unsupported_host ")
    assert check_host(allow_unsupported=True) == [unsupported]


def test_an_unknown_release_with_a_changed_signature_says_both(installed) -> None:
    installed("0.11.2", **SIGNATURE, version="0.12.0")
    (unsupported, signatures) = check_host(allow_unsupported=True)
    assert "found 0.12.0" in unsupported and signatures == BOTH.replace("OpenRLHF 0.11.2", "OpenRLHF 0.12.0")


@pytest.fixture(scope="module")
def older_runs(wheels, tmp_path_factory):
    """The behavioural tests on every release but the newest, side by side; all other tests run on that one."""
    # flash_reinforce came with 0.11.2; the tests of whole commands are slow, and parse nothing that differs.
    commands = ("both_ways_in", "without_loss", "the_literal_command", "before_the_host_is_imported")
    chosen = " and ".join(f"not {name}" for name in ("flash_reinforce", *commands))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "one_process"]
    command += ["-m", "not e2e", "-k", chosen, *(f"tests/contract/test_{name}.py" for name in BEHAVIOUR)]
    runs = {}
    for release in OLDER:
        folder = tmp_path_factory.mktemp(release)
        path = os.pathsep.join(map(str, (folder, unpack(wheels[f"{release}+cpu"], folder), ROOT / "tests")))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        runs[release] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    return runs


@pytest.mark.e2e  # whole commands, each of which imports the host: seconds apiece
@pytest.mark.parametrize("release", OLDER)
def test_the_contract_holds_on_an_older_release(release, older_runs) -> None:
    output, _ = older_runs[release].communicate(timeout=280)
    assert older_runs[release].returncode == 0, output
    assert int(re.search(r"(\d+) passed", output)[1]) > 80, output
    assert re.search(rf"ran on openrlhf {release}\+cpu in \S*/openrlhf-{release}\+cpu\.data/", output), output

"""pama enable and pama disable: what they put where, and what the wheel brings for them."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pama_plugin.cli import main
from pama_plugin.host import pth

ROOT = Path(__file__).parents[2]
LINE = (ROOT / "pama_plugin" / "pama_plugin.pth").read_text()


@pytest.fixture
def site_packages(tmp_path, monkeypatch) -> Path:
    """An empty one, and an empty one of the user's, in place of this interpreter's."""
    folder, user = tmp_path / "site-packages", tmp_path / "user"
    folder.mkdir()
    user.mkdir()
    monkeypatch.setattr(pth.sysconfig, "get_path", {"purelib": str(folder)}.__getitem__)
    monkeypatch.setattr(pth.site, "getsitepackages", lambda: [str(folder)])
    monkeypatch.setattr(pth.site, "getusersitepackages", lambda: str(user))
    return folder


def test_the_package_and_the_root_of_the_wheel_have_the_same_line() -> None:
    own = ROOT / "pama_plugin" / "host" / "pama_plugin.pth"
    assert own.read_text() == LINE and not own.is_symlink()


def test_enable_writes_the_line_and_disable_removes_it(site_packages, capsys) -> None:
    target = site_packages / "pama_plugin.pth"
    for _ in range(2):
        main(["enable"])
        assert target.read_text() == LINE and pth.installed() == [target]
        assert f"wrote {target}" in capsys.readouterr().out
    main(["disable"])
    assert not target.exists() and pth.installed() == []
    assert f"removed {target}" in capsys.readouterr().out


def test_disable_finds_every_copy_and_may_find_none(site_packages, tmp_path, capsys) -> None:
    pth.enable()
    (tmp_path / "user" / "pama_plugin.pth").write_text(LINE)
    main(["disable"])
    assert pth.installed() == []
    main(["disable"])
    out = capsys.readouterr().out
    assert "nothing to remove" in out and out.count("pama train") == 2


@pytest.mark.parametrize("command", ["enable", "disable"])
def test_a_folder_that_cannot_be_written_is_said(command, site_packages, monkeypatch, capsys) -> None:
    pth.enable()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pth.shutil, "copyfile", refuse)
    monkeypatch.setattr(pth.Path, "unlink", refuse)
    with pytest.raises(SystemExit) as exit:
        main([command])
    assert exit.value.code == 2
    verb = {"enable": "write", "disable": "remove"}[command]
    expected = f"pama {command}: cannot {verb} {site_packages / 'pama_plugin.pth'}: Permission denied"
    assert expected in capsys.readouterr().err


def test_the_wheel_has_the_line_twice_the_table_and_a_description_that_stands_alone(tmp_path) -> None:
    """At its root, where it is live at once, and in the package, where ``pama enable`` finds it."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in ("pama_plugin.pth", "pama_plugin/host/pama_plugin.pth"):
            assert archive.read(name).decode() == LINE
        assert "pama_plugin/host/preflight/fingerprints.json" in archive.namelist()
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        links = re.findall(r"\]\(([^)]*)\)", archive.read(metadata).decode())
        assert links and all(link.startswith("https://") for link in links), "an index page has no other files"


def test_the_line_is_silent_in_any_other_interpreter(tmp_path) -> None:
    """``site`` prints a broken line's error and goes on."""
    (tmp_path / "pama_plugin.pth").write_text(LINE)
    code = f"import site, sys; site.addsitedir({str(tmp_path)!r}); print('pama_plugin' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("False\n", "")

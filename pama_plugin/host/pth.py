"""Switch the literal host command on and off: put ``pama_plugin.pth`` into site-packages, or take it out."""

import shutil
import site
import sysconfig
from pathlib import Path

from pama_plugin.errors import ConfigError

NAME = "pama_plugin.pth"
SOURCE = Path(__file__).with_name(NAME)
IGNORED_FROM = (3, 18)  # the Python that no longer runs the import lines of .pth files: PEP 829


def installed() -> list[Path]:
    """Where the interpreter finds the line at its start."""
    folders = dict.fromkeys([sysconfig.get_path("purelib"), *site.getsitepackages(), site.getusersitepackages()])
    return [path for folder in folders if (path := Path(folder) / NAME).is_file()]


def enable() -> str:
    """Install the line for this interpreter; say what was done.

    Raises:
        ConfigError: site-packages cannot be written.
    """
    target = Path(sysconfig.get_path("purelib")) / NAME
    try:
        shutil.copyfile(SOURCE, target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error
    return f"wrote {target}: the literal command takes --loss and --pama.*; pama train always does"


def disable() -> str:
    """Remove the line wherever this interpreter finds it, if it does; say what was done.

    Raises:
        ConfigError: site-packages cannot be written.
    """
    paths = installed()
    try:
        for path in paths:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"cannot remove {path}: {error.strerror}") from error
    done = f"removed {', '.join(map(str, paths))}" if paths else "nothing to remove"
    return f"{done}: the literal command runs stock OpenRLHF; pama train takes --loss and --pama.*, as always"

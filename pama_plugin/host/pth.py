"""Enables the plugin for the stock OpenRLHF command: writes ``pama_plugin.pth`` to site-packages, or removes it."""

import shutil
import site
import sysconfig
from pathlib import Path

from pama_plugin.errors import ConfigError

NAME = "pama_plugin.pth"
SOURCE = Path(__file__).with_name(NAME)
IGNORED_FROM = (3, 18)  # from this Python on, import lines of .pth files are ignored: PEP 829


def installed() -> list[Path]:
    """Return the files in which the interpreter finds the line at its start."""
    folders = dict.fromkeys([sysconfig.get_path("purelib"), *site.getsitepackages(), site.getusersitepackages()])
    return [path for folder in folders if (path := Path(folder) / NAME).is_file()]


def enable() -> str:
    """Install the line for this interpreter; return a message.

    Raises:
        ConfigError: site-packages is not writable.
    """
    target = Path(sysconfig.get_path("purelib")) / NAME
    try:
        shutil.copyfile(SOURCE, target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error
    return f"wrote {target}: the stock OpenRLHF command takes --loss and --pama.*; pama train always does"


def disable() -> str:
    """Remove the line wherever this interpreter finds it; return a message.

    Raises:
        ConfigError: site-packages is not writable.
    """
    paths = installed()
    try:
        for path in paths:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"cannot remove {path}: {error.strerror}") from error
    done = f"removed {', '.join(map(str, paths))}" if paths else "nothing to remove"
    return f"{done}: the stock OpenRLHF command runs without the plugin; pama train takes --loss and --pama.*"

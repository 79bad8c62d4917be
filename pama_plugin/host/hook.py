"""Ways to start: the stock OpenRLHF command (``pama_plugin.pth`` calls ``arm`` at its start) and ``pama train``.

OpenRLHF has neither a registry nor an entry point, and builds its parser inside ``if __name__ == "__main__"``. But
every run calls ``ArgumentParser.parse_args``. We wrap it once, for OpenRLHF's parser only: the wrapper adds our flags
and, because OpenRLHF's modules are imported by then, calls ``seam.install`` to replace its classes.
"""

import argparse
import importlib.abc
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

HOST_COMMAND = "openrlhf.cli.train_ppo_ray"
HOST_FILE = "openrlhf/cli/train_ppo_ray.py"


class FlagCheck(importlib.abc.MetaPathFinder):
    """Checks our flags when ``runpy`` imports the command's package, before its imports, which take half a minute."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == HOST_COMMAND.rpartition(".")[0]:
            sys.meta_path.remove(self)
            check_flags("train_ppo_ray.py", sys.argv[1:])


def arm_command(command: Sequence[str]) -> None:
    """Arm an interpreter that was started with ``command`` if it runs OpenRLHF's, or a module that may run it.

    A program that only mentions OpenRLHF's command, such as ``ray job submit``, is left alone.
    """
    module, script = _program(command)
    if module or f"/{script}".endswith(f"/{HOST_FILE}"):
        arm()


def _program(command: Sequence[str]) -> tuple[str, str]:
    """The module or the script that the interpreter runs; both empty for ``-c`` or an interactive session."""
    arguments = iter(command[1:])
    for argument in arguments:
        if argument in ("-W", "-X", "--check-hash-based-pycs"):  # a value follows
            next(arguments, None)
        elif match := re.fullmatch(r"-[a-zA-Z]*?(c|m)(.*)", argument):
            return (match[2] or next(arguments, ""), "") if match[1] == "m" else ("", "")
        elif not argument.startswith("-"):
            return "", argument
    return "", ""


def arm(start: Callable[[Any], None] | None = None) -> None:
    """Wrap ``ArgumentParser.parse_args`` until OpenRLHF's parser has used it.

    OpenRLHF calls ``start``, if given, with its validated arguments, instead of starting Ray and training.

    A second call does nothing: in a virtual environment the interpreter runs the lines of a ``.pth`` file repeatedly.
    """
    stock = argparse.ArgumentParser.parse_args
    if stock.__module__ == __name__:
        return

    def parse_args(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        caller = sys._getframe(1).f_globals
        if not _is_host_parser(parser, caller):
            return stock(parser, args, namespace)
        argparse.ArgumentParser.parse_args = stock  # type: ignore[method-assign]
        if caller is not vars(sys.modules["__main__"]):  # run by a profiler or debugger, which is __main__ itself
            found = getattr(sys.modules["__main__"], "__file__", "another")
            parser.exit(
                2,
                f"{parser.prog}: error: --loss and --pama.* need OpenRLHF's command to be the main program, found "
                f"{found}; put `-m pama_plugin train` in the place of `-m {HOST_COMMAND}`\n",
            )
        from pama_plugin.errors import ConfigError
        from pama_plugin.host.seam import install
        from pama_plugin.settings.flags import add_flags

        add_flags(parser)
        parsed: argparse.Namespace = stock(parser, args, namespace)
        try:
            parsed = install(parsed)
        except ConfigError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")  # without OpenRLHF's 170 lines of usage
        if start is not None:
            vars(sys.modules["__main__"])["train"] = start
        return parsed

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[assignment, method-assign]
    if start is None:
        sys.meta_path.insert(0, FlagCheck())


def check_flags(program: str, arguments: Sequence[str]) -> None:
    """End the process with status 2 and one line if our flags in ``arguments`` cannot be run."""
    from pama_plugin.errors import ConfigError
    from pama_plugin.settings.flags import load_flags

    if {"-h", "--help"} & set(arguments):
        return
    try:
        load_flags(arguments)
    except ConfigError as error:
        sys.stderr.write(f"{program}: error: {error}\n")
        sys.exit(2)


def _is_host_parser(parser: argparse.ArgumentParser, caller: dict[str, Any]) -> bool:
    """Whether OpenRLHF's command, run as a module or as a script, asks its parser."""
    is_command = caller.get("__name__") == "__main__" and str(caller.get("__file__")).endswith(HOST_FILE)
    return is_command and parser.get_default("algo.advantage.estimator") is not None


def train(arguments: Sequence[str], start: Callable[[Any], None] | None = None) -> None:
    """Run OpenRLHF's command in this process, armed, exactly as ``python -m openrlhf.cli.train_ppo_ray`` would."""
    check_flags("pama train", arguments)
    sys.argv = [HOST_COMMAND, *arguments]
    arm(start)
    runpy.run_module(HOST_COMMAND, run_name="__main__", alter_sys=True)

"""Both ways in: the literal host command (armed by ``pama_plugin.pth`` at interpreter start) and ``pama train``.

The host has neither a registry nor an entry point, and builds its parser inside ``if __name__ == "__main__"``. What
every run does pass through is ``ArgumentParser.parse_args``: wrapped once, for the host's parser alone, it is where our
flags are added and, the host's modules being imported by then, where ``seam.install`` swaps what has to be swapped.
"""

import argparse
import difflib
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

HOST_COMMAND = "openrlhf.cli.train_ppo_ray"


def arm(start: Callable[[Any], None] | None = None) -> None:
    """Wrap ``ArgumentParser.parse_args`` until the host's parser has used it.

    With ``start``, that is what the host calls with its validated arguments, instead of starting Ray and training.

    Once only: in a virtual environment the interpreter runs the lines of a ``.pth`` file more than once.
    """
    stock = argparse.ArgumentParser.parse_args
    if stock.__module__ == __name__:
        return

    def parse_args(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        if not _is_host_parser(parser):
            return stock(parser, args, namespace)
        argparse.ArgumentParser.parse_args = stock
        from pama_plugin.errors import ConfigError
        from pama_plugin.flags import add_flags
        from pama_plugin.host.seam import install

        add_flags(parser)
        parsed: argparse.Namespace = stock(parser, args, namespace)
        try:
            parsed = install(parsed)
        except ConfigError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")  # without the host's 170 lines of usage
        if start is not None:
            sys.modules["__main__"].train = start
        return parsed

    argparse.ArgumentParser.parse_args = parse_args


def _is_host_parser(parser: argparse.ArgumentParser) -> bool:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == HOST_COMMAND and parser.get_default("algo.advantage.estimator") is not None


def train(arguments: Sequence[str], start: Callable[[Any], None] | None = None) -> None:
    """Run the host's command in this process, armed, exactly as ``python -m openrlhf.cli.train_ppo_ray`` would.

    What our own flags say is checked twice: here too, because importing the host takes half a minute.
    """
    _check_own_flags(arguments)
    sys.argv = [HOST_COMMAND, *arguments]
    arm(start)
    runpy.run_module(HOST_COMMAND, run_name="__main__", alter_sys=True)


def _check_own_flags(arguments: Sequence[str]) -> None:
    from pama_plugin.config import STOCK, load_config
    from pama_plugin.errors import ConfigError
    from pama_plugin.flags import add_flags

    parser = argparse.ArgumentParser(prog="pama train", add_help=False, allow_abbrev=False)
    add_flags(parser)
    known, others = parser.parse_known_args(arguments)
    flags = vars(known)
    own = [option for action in parser._actions for option in action.option_strings]
    for flag in (word.partition("=")[0] for word in others if word.startswith("--pama.")):
        if not any(option.startswith(flag) for option in own):  # the host's parser takes abbreviations
            hint = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(flag, own, n=1))
            parser.exit(2, f"{parser.prog}: error: there is no flag {flag}{hint}\n")
    loss, file = flags["pama.loss"], flags["pama.config"]
    if loss == STOCK or not (loss or file):
        return
    names = ("level", "noon", "best", "probe", "whiten", "option", "probe_gradients", "stop_at_front")
    given = {name: flags[f"pama.{name}"] for name in names}
    try:
        load_config(loss, flags["pama.objective"], file, **given, default_level="token")
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")

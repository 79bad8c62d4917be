"""``pama``: the explicit launcher, the switch of the literal command, and the reports on a site and on a run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pama_plugin import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command ``pama``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # train passes everything on to the host's own parser, --help included, so ours must not see it.
    if arguments[:1] == ["train"]:
        from pama_plugin.host.hook import train

        train(arguments[1:])
        return
    if arguments[:1] == ["doctor"] and arguments[1:] not in (["-h"], ["--help"]):
        from pama_plugin.host.doctor import doctor

        sys.exit(doctor(arguments[1:]))

    from pama_plugin.score import add_arguments

    parser = argparse.ArgumentParser(prog="pama", description="Pareto multi-objective alignment for OpenRLHF.")
    parser.add_argument("--version", action="version", version=f"pama_plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "train", help="run OpenRLHF's PPO command with the plugin: same flags, plus --loss and --pama.*"
    )
    commands.add_parser(
        "doctor",
        usage="pama doctor [FLAGS]",
        help="say whether a run could start here; exit code 0 if so",
        description="Say whether a run could start here, and with the flags of `pama train`, whether that run could. "
        "Exit code 0 if so, else 1.",
    )
    commands.add_parser("enable", help="let the literal command, python -m openrlhf.cli.train_ppo_ray, take our flags")
    commands.add_parser("disable", help="take that back; pama train works either way")
    report = commands.add_parser("report", help="summarise a run from its TensorBoard folder: a table and a picture")
    report.add_argument("folder", type=Path, help="what --logger.tensorboard_dir was, or one run's folder in it")
    report.add_argument("--png", type=Path, help="where the curves go (default: curves.png in the folder)")
    score = commands.add_parser(
        "score",
        help="score prompts and responses in a file with the objectives of a run, without training",
        description="Score prompts and responses in a JSONL file with the objectives of a run, without training: a way "
        "to try another reward model in a minute.",
    )
    add_arguments(score)
    options = parser.parse_args(arguments)

    from pama_plugin.errors import ConfigError

    try:
        if options.command == "score":
            from pama_plugin.score import score_file

            sys.exit(score_file(options))
        if options.command == "report":
            from pama_plugin.report import report_run

            report_run(options.folder, options.png)
        else:
            from pama_plugin.host import pth

            print(pth.enable() if options.command == "enable" else pth.disable())
    except ConfigError as error:
        parser.exit(2, f"pama {options.command}: {error}\n")

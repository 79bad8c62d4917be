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
    report = commands.add_parser(
        "report",
        help="compare runs by their logs: tables, curves, the Pareto front",
        description="Compare runs by their logs: tables here; curves.png, front.png and report.html in a folder. It "
        "works on one run, on many, on one that is still going, and says what is missing of one that is broken.",
    )
    report.add_argument(
        "folder", type=Path, nargs="+", metavar="RUN", help="what --logger.tensorboard_dir was, or a sweep's --out"
    )
    report.add_argument("--out", type=Path, help="where the files go (default: the first RUN)")
    report.add_argument(
        "--reference",
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="what hypervolume is measured above, for every objective (default: the rewards before the first update)",
    )
    report.add_argument(
        "--baseline",
        metavar="ARM",
        help="an arm that all others are compared with, paired over seeds: a table of its own",
    )
    sweep = commands.add_parser(
        "sweep",
        help="train every rule, weight and seed of a file; started again, go on where it stopped",
        description="Train every rule, weight and seed of a YAML file, each in a folder of its own with one "
        "result.json. What has a result is never run again. README: Many runs.",
    )
    sweep.add_argument("file", type=Path, help="objectives, grids of rules × weights × seeds, flags of all runs")
    sweep.add_argument("--out", type=Path, required=True, help="the folder of the runs' folders")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    score = commands.add_parser(
        "score",
        help="score prompts and responses in a file with the objectives of a run, without training",
        description="Score prompts and responses in a JSONL file with the objectives of a run, without training: a way "
        "to try another reward model in a minute.",
    )
    score.add_argument("file", type=Path, help='JSONL: {"prompt": text or messages, "response": text, "label": text}')
    if arguments[:1] == ["score"]:  # kinds of other packages are imported to list them
        from pama_plugin.settings.flags import add_objective_flags

        add_objective_flags(score)
    score.add_argument("--out", type=Path, help="where the lines go with their rewards (default: FILE.scored.jsonl)")
    score.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="the policy, whose tokens rm reads and builtin counts (default: the first rm objective's model)",
    )
    options = parser.parse_args(arguments)

    from pama_plugin.errors import ConfigError

    try:
        if options.command == "score":
            from pama_plugin.score import score_file

            sys.exit(score_file(options))
        if options.command == "sweep":
            from pama_plugin.runs.sweep import run_sweep

            sys.exit(run_sweep(options))
        if options.command == "report":
            from pama_plugin.runs.report import report_runs

            report_runs(options.folder, options.out, options.reference, options.baseline)
        else:
            from pama_plugin.host import pth

            print(pth.enable() if options.command == "enable" else pth.disable())
    except ConfigError as error:
        parser.exit(2, f"pama {options.command}: {error}\n")

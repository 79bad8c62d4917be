"""The command ``pama``: train, doctor, enable, disable, report, rollouts, sweep, score, stationarity and soup."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pama_plugin import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command ``pama``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # OpenRLHF's parser handles all arguments of train, including --help.
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
    commands.add_parser("train", help="run OpenRLHF's PPO command with the plugin: its flags, plus --loss and --pama.*")
    commands.add_parser(
        "doctor",
        usage="pama doctor [FLAGS]",
        help="check whether a run could start on this machine",
        description="Check whether a run could start on this machine. Pass the flags of `pama train` to check that "
        "run. The exit code is 0 if it could, else 1.",
    )
    commands.add_parser(
        "enable",
        help="let the stock OpenRLHF command, python -m openrlhf.cli.train_ppo_ray, accept --loss and --pama.*",
    )
    commands.add_parser("disable", help="undo enable; pama train is not affected")
    report = commands.add_parser(
        "report",
        help="compare runs from their logs: tables, curves, Pareto front",
        description="Compare runs from their logs. Prints tables and writes curves.png, paths.png, front.png and "
        "report.html. Accepts any number of runs, finished, unfinished or broken, and lists missing data.",
    )
    report.add_argument(
        "folder",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="the --logger.tensorboard_dir of a run, or the --out of a sweep",
    )
    report.add_argument("--out", type=Path, help="folder for the files (default: the first RUN)")
    report.add_argument(
        "--reference",
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="reference point of the hypervolume, one value per objective (default: rewards before the first update)",
    )
    report.add_argument(
        "--baseline",
        metavar="ARM",
        help="add a table of the differences between each arm and this arm, paired over seeds",
    )
    rollouts = commands.add_parser(
        "rollouts",
        help="show what the policy wrote, with the rewards of every response",
        description="Show the responses that a run logged (--pama.log_rollouts), with their rewards, the share of each "
        "objective, and the distance from the reference. Default: those of the last step.",
    )
    rollouts.add_argument(
        "folder", type=Path, metavar="RUN", help="the --logger.tensorboard_dir of a run, or its --ckpt.output_dir"
    )
    rollouts.add_argument(
        "--evaluation", action="store_true", help="show the responses to held-out prompts of the last evaluation"
    )
    rollouts.add_argument("--step", type=int, nargs="+", metavar="N", help="the steps (default: the last)")
    order = rollouts.add_mutually_exclusive_group()
    order.add_argument("--best", metavar="NAME", help="in order of this reward, the highest first")
    order.add_argument("--worst", metavar="NAME", help="in order of this reward, the lowest first")
    order.add_argument(
        "--disagree",
        action="store_true",
        help="those first on which the rewards disagree most, in standard deviations of each",
    )
    rollouts.add_argument("--limit", type=int, default=8, metavar="N", help="number of responses (default: 8)")
    sweep = commands.add_parser(
        "sweep",
        help="train every rule, weight and seed of a file; can be interrupted and resumed",
        description="Train every rule, weight and seed of a YAML file, each in a separate folder with a result.json. "
        "Runs with a result are skipped. See pama_plugin/runs/README.md.",
    )
    sweep.add_argument("file", type=Path, help="YAML: objectives, grids of rules × weights × seeds, common flags")
    sweep.add_argument("--out", type=Path, required=True, help="folder for the folders of the runs")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="number of parallel runs (default: 1)")
    score = commands.add_parser(
        "score",
        help="score the prompts and responses of a file with the objectives of a run, without training",
        description="Score the prompts and responses of a JSONL file with the objectives of a run, without training. "
        "Prints a table and writes the lines with their rewards. Exit code 1 if an objective scored no response.",
    )
    score.add_argument(
        "file",
        type=Path,
        help='JSONL: {"prompt": text or messages, "response": text}, with "label" and columns if objectives need them',
    )
    stationarity = commands.add_parser(
        "stationarity",
        help="measure the true gradients of the objectives at saved policies: is some combination of them 0?",
        description="Sample responses of each policy, score them with the objectives, and measure the policy gradient "
        "of each objective, with the advantages of OpenRLHF's reinforce_baseline. Prints the squared lengths of the "
        "gradients, their cosines, and the squared length of their shortest convex combination, which is 0 at a "
        "Pareto-stationary point, with standard errors and a 95 % interval. Needs memory for a policy in float32, its "
        "gradient, and a batch.",
    )
    stationarity.add_argument("policy", type=Path, nargs="+", help="folder of a policy that transformers loads")
    stationarity.add_argument(
        "--prompts", type=Path, required=True, help='JSONL: {"prompt": text or messages, "label": text}'
    )
    for flag, default, what in (
        ("responses", 512, "responses to measure with; the error falls with their number"),
        ("per_prompt", 4, "responses to each prompt"),
        ("max_new_tokens", 64, "tokens of a response, as in training"),
        ("batch_size", 16, "responses in a forward pass"),
        ("seed", 0, "of the responses"),
    ):
        stationarity.add_argument(
            f"--{flag}", type=int, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    stationarity.add_argument("--temperature", type=float, default=1.0, help="as in training (default: 1)")
    stationarity.add_argument(
        "--out", type=Path, default=Path("stationarity.json"), help="output file (default: stationarity.json)"
    )
    soup = commands.add_parser(
        "soup",
        usage="pama soup POLICY POLICY ... --out DIR [--weights W,W ... | --points N] [-- FLAGS]",
        help="interpolate policies that were trained from the same model, and evaluate what lies between them",
        description="Write the policies between trained policies, Σ w_i θ_i (rewarded soups, arXiv 2306.04488): one "
        "policy per weight vector, from whole models or LoRA adapters in safetensors. With the flags of a run after "
        "--, each is evaluated on its --eval.dataset, as with --pama.evaluate_only; what is there is not made again. "
        "Prints a table and writes soups.json.",
    )
    soup.add_argument("policy", type=Path, nargs="+", metavar="POLICY", help="the --ckpt.output_dir of a run")
    soup.add_argument("--out", type=Path, required=True, help="folder for the folders of the soups")
    vectors = soup.add_mutually_exclusive_group()
    vectors.add_argument(
        "--weights",
        nargs="+",
        metavar="W,W",
        help="weight vectors that sum to 1, in the order of the policies; --weights=-0.5,1.5 if the first is negative",
    )
    vectors.add_argument(
        "--points", type=int, default=5, metavar="N", help="weights with N values per pair of policies (default: 5)"
    )
    if arguments[:1] in (["score"], ["stationarity"]):  # imports the kinds of other packages, to list them
        from pama_plugin.settings.flags import add_objective_flags

        add_objective_flags(score if arguments[0] == "score" else stationarity)
    score.add_argument(
        "--out", type=Path, help="output file: the lines with their rewards (default: FILE.scored.jsonl)"
    )
    score.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="the policy, whose tokenizer encodes text for rm and counts tokens for builtin (default: the model of the "
        "first rm objective)",
    )
    flags: Sequence[str] = ()
    if arguments[:1] == ["soup"] and "--" in arguments:  # what follows is for pama train
        place = list(arguments).index("--")
        arguments, flags = arguments[:place], arguments[place + 1 :]
    options = parser.parse_args(arguments)

    from pama_plugin.errors import ConfigError

    try:
        if options.command == "score":
            from pama_plugin.score import score_file

            sys.exit(score_file(options))
        if options.command == "stationarity":
            from pama_plugin.stationarity import measure_stationarity

            sys.exit(measure_stationarity(options))
        if options.command == "soup":
            from pama_plugin.soup import make_soups

            sys.exit(make_soups(options, flags))
        if options.command == "rollouts":
            from pama_plugin.runs.rollouts import show_rollouts

            sys.exit(show_rollouts(options))
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


if __name__ == "__main__":
    main()

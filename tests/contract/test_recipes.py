"""The recipes, as far as they go without a GPU: their own command with ``--pama.plan``, and what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hosttools import parse_host_flags

from pama_plugin.errors import ConfigError
from pama_plugin.host import seam
from pama_plugin.host.hook import HOST_COMMAND
from pama_plugin.host.preflight.memory import Memory
from pama_plugin.settings.flags import add_flags
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(path.name for path in EXAMPLES.glob("*.sh") if path.name != "quickstart.sh")

PLANS = {
    ("one_gpu.sh", "1x1"): """
        PAMA plan: 1 of 1 GPUs, one CPU beside each
        role             ranks  GPUs each  block  node
        rollout              1        0.2      1  1
        policy               1        0.2      1  1
        reference            1        0.2      1  1
        reward/helpful       1        0.1      1  1
        reward/harmless      1        0.1      1  1
    """,
    ("lora_7b.sh", "1x1"): """
        PAMA plan: 1 of 1 GPUs, one CPU beside each
        role             ranks  GPUs each  block  node
        rollout              1        0.2      1  1
        policy               1        0.2      1  1
        reward/harmless      1        0.2      1  1
    """,
    ("h100x8_colocated.sh", "1x8"): """
        PAMA plan: 8 of 8 GPUs, one CPU beside each
        role             ranks  GPUs each  block  node
        rollout              8        0.2      1  1
        policy               8        0.2      1  1
        reference            8        0.2      1  1
        reward/helpful       8     0.0666      1  1
        reward/harmless      8     0.0666      1  1
        reward/concise       8     0.0666      1  1
    """,
    ("h100x8_separate.sh", "1x8"): """
        PAMA plan: 8 of 8 GPUs, one CPU beside each
        role             ranks  GPUs each  block  node
        policy               4        0.2      1  1
        reference            4        0.2      1  1
        rollout              3          1      2  1
        reward/helpful       1       0.33      3  1
        reward/harmless      1       0.33      3  1
        reward/concise       1       0.33      3  1
    """,
}


def command_of(recipe: str, folder: Path, *flags: str) -> list[str]:
    """What the recipe passes to Python, which is replaced by a script that writes it down."""
    python = folder / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    run = subprocess.run([EXAMPLES / recipe, *flags], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return run.stdout.split("\0")[:-1]


def dedent(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def test_every_recipe_has_its_plan_here() -> None:
    assert {recipe for recipe, _ in PLANS} == set(RECIPES)


@pytest.mark.parametrize(("recipe", "cluster"), PLANS, ids=lambda value: value)
def test_a_recipe_fits_the_machine_that_it_is_for(recipe, cluster, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(seam, "estimate", lambda *_: Memory({}, {"policy": "not here", "reference": "not here"}))
    module, name, *flags = command_of(recipe, tmp_path, "--pama.plan", cluster)
    assert (module, name) == ("-m", HOST_COMMAND)
    args = parse_host_flags(*flags, extend=add_flags)
    capsys.readouterr()  # what the host prints while it is imported
    with pytest.raises(SystemExit) as end:
        seam.install(args)
    assert not end.value.code
    table, _, settings = capsys.readouterr().out.partition("\n\n")
    table, *more = table.rpartition("\n")
    assert more[-1] == "GiB of policy, reference not known: not here"
    assert table.splitlines() == dedent(PLANS[recipe, cluster])
    objectives = yaml.safe_load(settings)["objectives"]
    assert [name for name, options in objectives.items() if options["kind"] != "builtin"] == [
        line.split()[0].removeprefix("reward/") for line in table.splitlines() if line.startswith("reward/")
    ]
    (tmp_path / "run.yaml").write_text(settings)
    assert load_config(None, [], str(tmp_path / "run.yaml"), None, None, default_level="token").loss == "pama"


@pytest.mark.parametrize(("recipe", "cluster"), PLANS, ids=lambda value: value)
def test_a_recipe_asks_the_host_for_nothing_that_it_asserts_against(recipe, cluster, tmp_path) -> None:
    """What the host's own validation, after the flags are parsed, requires of the numbers."""
    args = vars(parse_host_flags(*command_of(recipe, tmp_path, "--pama.plan", cluster)[2:], extend=add_flags))
    responses = args["rollout.n_samples_per_prompt"] * args["rollout.batch_size"]
    assert args["rollout.n_samples_per_prompt"] > 1 and responses % args["train.batch_size"] == 0
    assert responses % (args["rollout.micro_batch_size"] * args["actor.num_gpus_per_node"]) == 0
    assert args["train.colocate_all"] or not args["vllm.enable_sleep"]


def test_a_smaller_machine_is_refused(tmp_path, capsys) -> None:
    flags = command_of("h100x8_separate.sh", tmp_path, "--pama.plan", "1x4")[2:]
    with pytest.raises(ConfigError, match=r"needs 8 GPUs .*\(4 for policy \+ reference, 3 for rollout, 1 for reward/h"):
        seam.install(parse_host_flags(*flags, extend=add_flags))
    assert "PAMA plan: 8 of 4 GPUs" in capsys.readouterr().out


def test_the_plan_has_the_warnings_of_a_start(tmp_path, caplog) -> None:
    flags = command_of("h100x8_separate.sh", tmp_path, "--pama.plan", "1x8")[2:]
    many = [word for index in range(6) for word in ("--pama.objective", f"length{index}=builtin:length")]
    with pytest.raises(SystemExit):
        seam.install(parse_host_flags(*flags, *many, extend=add_flags))
    assert "independent objectives agree on" in caplog.text


@pytest.mark.e2e  # whole commands, each of which imports the host: seconds apiece
def test_the_real_command_prints_the_plan_and_starts_nothing() -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    clusters = {"1x8": 0, "1x7": 2}
    recipe = EXAMPLES / "h100x8_colocated.sh"
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    running = [subprocess.Popen([recipe, "--pama.plan", cluster], **streams) for cluster in clusters]
    for process, (cluster, code) in zip(running, clusters.items()):
        stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == code, stderr
        assert f"PAMA plan: 8 of {cluster[2:]} GPUs" in stdout and "objectives:\n  helpful:\n" in stdout
        assert "Ray instance" not in stdout + stderr
    assert "error: the run needs 8 GPUs" in stderr and "found 7 GPUs" in stderr

"""Every command and every piece of code in the README is real."""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hosttools import parse_host_flags

from pama_plugin.cli import main
from pama_plugin.host.hook import HOST_COMMAND

HEAD = '{"weight_map": {"score.weight": "model.safetensors"}}'
VOCABULARIES = "pama_plugin.host.preflight.flags.check_vocabularies"
pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "pama_plugin").glob("*/README.md"))]
PAGES.append(ROOT / "pama_plugin" / "DESCRIPTION.md")
README = "\n".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
]
HOST_RUNS = [words for words in COMMANDS if words[:2] == ["pama", "train"] or HOST_COMMAND in words]

OTHER_COMMANDS = [words for words in COMMANDS if words[0] == "pama" and words[1] not in ("train", "doctor")]


def test_the_readme_has_what_is_tested_below() -> None:
    assert {"score", "rollouts", "report"} <= {command[1] for command in OTHER_COMMANDS}
    assert len(HOST_RUNS) == 5 and {"examples/quickstart.sh", "tests/run.sh"} <= {command[0] for command in COMMANDS}


def test_the_first_page_is_short() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 170


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page) -> None:
    def anchors(text: str) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("command", [command for command in COMMANDS if command[0].endswith(".sh")])
def test_scripts_exist_and_can_be_run(command) -> None:
    assert (ROOT / command[0]).stat().st_mode & 0o111


@pytest.mark.parametrize("command", HOST_RUNS, ids=" ".join)
def test_host_commands_parse_and_install(command, tmp_path, monkeypatch) -> None:
    from pama_plugin.host import seam
    from pama_plugin.settings.flags import add_flags

    (tmp_path / "reward-model").mkdir()
    (tmp_path / "reward-model" / "config.json").write_text("{}")
    (tmp_path / "reward-model" / "model.safetensors.index.json").write_text(HEAD)
    (tmp_path / "rewards.py").write_text("def polite(queries, prompts, labels): ...\n")
    monkeypatch.chdir(tmp_path)
    flags = command[next(index for index, word in enumerate(command) if word.startswith("--")) :]
    if "--algo.advantage.estimator" not in flags:
        flags += ["--algo.advantage.estimator", "reinforce"]
    # The models of the README are not there to be looked at.
    heads = mock.patch("pama_plugin.host.actors.critic.load_value_heads")
    with mock.patch.object(seam, "_swap"), mock.patch(VOCABULARIES, return_value=[]), heads:
        args = seam.install(parse_host_flags(*flags, extend=add_flags))
    assert args.pama.loss == "pama"


@pytest.mark.parametrize("command", OTHER_COMMANDS, ids=" ".join)
def test_other_commands_of_ours_parse(command, monkeypatch) -> None:
    class Parsed(Exception):
        pass

    stock = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        raise Parsed(stock(parser, *arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        main(command[1:])


def test_every_objective_can_be_parsed(tmp_path, monkeypatch) -> None:
    from pama_plugin.settings.objective import parse_objective

    (tmp_path / "reward-model").mkdir()
    (tmp_path / "reward-model" / "config.json").write_text("{}")
    (tmp_path / "reward-model" / "model.safetensors.index.json").write_text(HEAD)
    names = ("polite", "correct", "cites", "grade")
    functions = [f"def {name}(queries, prompts, labels, **columns): ...\n" for name in names]
    (tmp_path / "rewards.py").write_text("".join(functions))
    (tmp_path / "safety").mkdir()
    (tmp_path / "safety" / "config.json").write_text("{}")
    (rubric,) = [block for language, block in BLOCKS if language == "text" and "{response}" in block]
    (tmp_path / "rubric.txt").write_text(rubric)
    monkeypatch.chdir(tmp_path)
    objectives = [
        words[index + 1] for words in COMMANDS for index, word in enumerate(words) if word == "--pama.objective"
    ]
    assert {parse_objective(text).kind for text in objectives} >= {"rm", "hf", "py", "builtin", "judge"}


def test_the_yaml_loads(tmp_path, monkeypatch) -> None:
    from pama_plugin.runs.sweep_file import load_sweep
    from pama_plugin.settings.load import load_config

    text, sweep = (text for language, text in BLOCKS if language == "yaml")
    (tmp_path / "reward-model").mkdir()
    (tmp_path / "reward-model" / "config.json").write_text("{}")
    (tmp_path / "reward-model" / "model.safetensors.index.json").write_text(HEAD)
    (tmp_path / "run.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    config = load_config("pama", [], "run.yaml", None, None, default_level="token")
    assert config.names == ("sentiment", "length") and config.level == "sequence"
    (tmp_path / "sweep.yaml").write_text(sweep)
    assert len(load_sweep(tmp_path / "sweep.yaml")) == 5 * (2 + 3)


@pytest.mark.parametrize("text", [text for language, text in BLOCKS if language == "python"])
def test_the_python_runs(text, monkeypatch) -> None:
    from pama_plugin.aggregation import registry

    # What is registered here, other tests do not count.
    monkeypatch.setattr(registry.RULES, "entries", dict(registry.RULES.entries))
    names: dict = {}
    exec(text, names)
    if "polite" in names:
        assert names["polite"](["Once more, please"], ["Once"], [""]) == {"rewards": [1.0]}


def test_every_flag_of_ours_is_in_the_table() -> None:
    import argparse

    from pama_plugin.settings.flags import add_flags

    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = set(re.findall(r"--(?:loss|pama\.\w+)", parser.format_help()))
    assert flags <= set(re.findall(r"^\| `(--[\w.]+)", README, flags=re.MULTILINE))


# The modes that the host's PPO has; a mode that is not in the README's table is neither claimed nor refused.
MODES = (
    "advantage estimator",
    "KL in the reward",
    "KL as a loss, k1, k2, k3",
    "several samples per prompt",
    "dynamic batches",
    "LoRA",
    "EMA",
    "Muon",
    "GSPO",
    "two data-parallel ranks",
    "asynchronous",
    "asynchronous with partial rollouts",
    "colocate_all",
    "vLLM sleep",
    "importance-sampling correction",
    "dual clip",
    "dynamic filtering",
    "length penalties",
    "multi-turn agents",
    "evaluation, best checkpoint",
    "packing",
    "ring attention",
    "tensor parallel",
    "4 bits",
)
ROWS = re.findall(r"^\| (.+?) \| (CPU|refused)(.*?) \| `(.+?)::(.+?)` \|$", README, flags=re.MULTILINE)
# Where a mode was run: whole runs, which only the end-to-end tests are, or the host's functions alone.
RUN_ON = {", 1 rank": "tests/e2e/", ", 2 ranks": "tests/e2e/", ", functions": "tests/contract/"}
RUN_ON |= dict.fromkeys((", 1 rank, by hand", ", 2 ranks, by hand", ", 1 or 2 ranks, by hand"), "tests/e2e/")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_was_run_or_is_refused_and_a_test_shows_it(mode) -> None:
    rows = [row for row in ROWS if mode in row[0]]
    assert rows, f"the README says nothing of {mode}"
    for _, verdict, rest, file, test in rows:
        assert verdict == "refused" or file.startswith(RUN_ON[rest]), f"{mode}: {file} shows no run on CPU{rest}"
        assert f"def {test}(" in (ROOT / file).read_text(), f"{mode}: no test {file}::{test}"


def test_the_table_of_modes_has_no_third_state() -> None:
    section = README.partition("## Training modes\n")[2].partition("\n## ")[0]
    assert len(ROWS) == section.count("\n| ") - 1

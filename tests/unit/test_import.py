"""Modules outside ``host/`` can be imported without OpenRLHF. pyproject.toml defines the allowed imports."""

import re
import subprocess
import sys

import pytest

HOST_PACKAGES = {"openrlhf", "ray", "deepspeed", "vllm"}

HIDE_AND_IMPORT = """
import sys
for name in {hidden}:
    sys.modules[name] = None  # makes every import of it raise ImportError
import {module}
"""


MODULES = ("", ".aggregation", ".batch.state", ".rewards", ".runs.sweep", ".settings.load")


@pytest.mark.parametrize("module", [f"pama_plugin{name}" for name in MODULES])
def test_core_imports_with_the_host_absent(module: str) -> None:
    code = HIDE_AND_IMPORT.format(hidden=sorted(HOST_PACKAGES), module=module)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_public_names_are_imported_on_access() -> None:
    code = (
        "import pama_plugin; pama_plugin.aggregation.rules.pama; pama_plugin.rewards.Response\n"
        "assert all(hasattr(pama_plugin, name) for name in dir(pama_plugin)) and not hasattr(pama_plugin, 'no_such')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"], ["score", "--help"], ["--version"], []])
def test_the_command_line_answers_without_torch(arguments) -> None:
    hidden = ["torch", "pydantic", "yaml"]
    code = HIDE_AND_IMPORT.format(hidden=hidden, module="pama_plugin.cli") + f"pama_plugin.cli.main({arguments!r})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == (0 if arguments else 2) and "Traceback" not in process.stderr


MISTAKES = {
    "--pama.levle token": "no flag --pama.levle.*--pama.level[?]",
    "--loss pamma --pama.objective a=builtin:length": "--loss .*pama, .*found 'pamma'",
    "--loss pama --pama.noon --pama.no_noon": "not allowed with",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_misspelt_flag_or_rule_is_detected_without_torch(mistake) -> None:
    hidden = ["torch", "pydantic", "yaml", *HOST_PACKAGES]
    code = HIDE_AND_IMPORT.format(hidden=hidden, module="pama_plugin.cli")
    code += f"pama_plugin.cli.main(['train', *{mistake.split()!r}])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 2 and re.search(MISTAKES[mistake], process.stderr), process.stderr


def test_the_file_of_a_rule_has_its_name() -> None:
    """Misspelt rules are detected from the file names."""
    from pama_plugin import available_rules
    from pama_plugin.settings.flags import _names_of_rules

    assert {name.partition(":")[0] for name in available_rules()} == _names_of_rules()


@pytest.mark.parametrize("module", ["pama_plugin", "pama_plugin.cli"])
def test_the_package_is_a_command(module) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("pama_plugin ")

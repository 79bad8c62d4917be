"""The core imports without the host, and only ``host/`` imports the host."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pama_plugin

PACKAGE = Path(pama_plugin.__file__).parent
HOST_PACKAGES = {"openrlhf", "ray", "deepspeed", "vllm"}

HIDE_AND_IMPORT = """
import sys
for name in {hidden}:
    sys.modules[name] = None  # makes every import of it raise ImportError
import {module}
"""


@pytest.mark.parametrize(
    "module", ["pama_plugin", "pama_plugin.aggregation", "pama_plugin.rewards", "pama_plugin.config"]
)
def test_core_imports_with_the_host_absent(module: str) -> None:
    code = HIDE_AND_IMPORT.format(hidden=sorted(HOST_PACKAGES), module=module)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_only_the_host_package_imports_the_host() -> None:
    importers = {
        path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py") if imported_packages(path) & HOST_PACKAGES
    }
    assert importers == {"host"}


@pytest.mark.parametrize("package", ["aggregation", "rewards"])
def test_pure_packages_know_nobody(package: str) -> None:
    for path in (PACKAGE / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and module.startswith("pama_plugin") and module != "pama_plugin.errors":
                assert node.module.startswith(f"pama_plugin.{package}"), f"{path} imports {node.module}"

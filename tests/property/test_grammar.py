"""Any text given as an objective or a file results in a configuration or in a ``ConfigError``."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pama_plugin.errors import ConfigError
from pama_plugin.settings.load import dump_config, load_config
from pama_plugin.settings.objective import COMMON_OPTIONS

pytestmark = pytest.mark.property

# Pieces that reach deep parts of the parser, mixed with arbitrary characters.
OPTIONS = (
    *COMMON_OPTIONS,
    "scale",
    "min",
    "preset",
    "pattern",
    "gpus",
    "nodes",
    "offload",
    "timeout",
    "token_env",
    "label",
)
PIECES = st.sampled_from(
    ["a", "b", "=", ":", ",", "|", "..", "/", "~", "%s", "{}", "\n", "\0", "é", "1e999", "-1", "nan", "true", "[]"]
    + ["rm", "hf", "py", "http", "builtin", "agent", "length", "regex", "org/model", "x.py:f", "http://h/get_reward"]
    + ["linear:1:2:3", "impute:mean", "-1:1", "$(touch pwned)", "__import__('os')", *OPTIONS]
)
TEXT = st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join)
PAIRS = st.lists(st.tuples(st.sampled_from(OPTIONS), TEXT), max_size=4).map(
    lambda pairs: "".join(f",{key}={value}" for key, value in pairs)
)
KINDS = st.sampled_from(
    ["rm:org/m", "hf:org/m", "http:http://h/r", "builtin:length", "builtin:regex", "agent:k", "py:x.py:f"]
)
FLAG = TEXT | st.tuples(TEXT, KINDS, PAIRS).map(lambda parts: f"{parts[0]}={parts[1]}{parts[2]}")
LIKELY = st.tuples(KINDS, PAIRS).map(lambda parts: f"name={parts[0]}{parts[1]}")

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
SPEC = st.tuples(KINDS, PAIRS).map("".join)
OBJECTIVE = (
    VALUES
    | SPEC
    | st.dictionaries(
        st.sampled_from(["kind", "location", *OPTIONS]),
        VALUES | st.sampled_from(["rm", "hf", "builtin", "agent", "org/m", "length", "json", "k"]),
        max_size=5,
    )
)
CONTENT = st.fixed_dictionaries(
    {"objectives": st.dictionaries(TEXT | st.just("a"), OBJECTIVE, max_size=3) | VALUES},
    optional={key: VALUES for key in ("loss", "level", "noon", "best", "probe", "more")},
)


@contextlib.contextmanager
def nothing_else(folder: Path):
    """No exception but ``ConfigError`` is raised, and no file is created or removed."""
    before = sorted(os.listdir(folder))
    with contextlib.suppress(ConfigError):
        yield
    assert sorted(os.listdir(folder)) == before


def run(check: Callable[[Any], None], strategy: st.SearchStrategy, cases: int) -> None:
    settings(max_examples=cases, deadline=None, suppress_health_check=[HealthCheck.too_slow])(given(strategy)(check))()


CASES = pytest.mark.parametrize("cases", [300, pytest.param(1_000, marks=pytest.mark.e2e)])


@CASES
def test_flags(tmp_path, monkeypatch, cases) -> None:
    monkeypatch.chdir(tmp_path)

    def check(flags: list[str]) -> None:
        with nothing_else(tmp_path):
            config = load_config("pama", flags, None, None, None, default_level="token")
            assert config.objectives and all(weight > 0 for weight in config.weights_at(1))

    run(check, st.lists(FLAG | LIKELY, min_size=1, max_size=2), cases)


@CASES
def test_files(tmp_path, monkeypatch, cases) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    file.touch()

    def check(content: Any) -> None:
        file.write_text(yaml.safe_dump(content, allow_unicode=True), errors="replace")
        with nothing_else(tmp_path):
            config = load_config("pama", [], str(file), None, None, default_level="token")
            file.write_text(dump_config(config))
            assert load_config(None, [], str(file), None, None, default_level="token") == config

    run(check, CONTENT | VALUES, cases)


def test_files_that_are_not_yaml(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").touch()

    def check(text: str) -> None:
        (tmp_path / "run.yaml").write_text(text)
        with nothing_else(tmp_path):
            load_config("pama", [], "run.yaml", None, None, default_level="token")

    run(check, st.text(max_size=80) | st.binary(max_size=80).map(lambda raw: raw.decode("latin-1")), 300)


@pytest.mark.parametrize(
    "spec", ["!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!!python/module:os"]
)
def test_a_file_runs_nothing(tmp_path, monkeypatch, spec) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(f"objectives: {{a: {spec}}}")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config("pama", [], "run.yaml", None, None, default_level="token")
    assert os.listdir(tmp_path) == ["run.yaml"]

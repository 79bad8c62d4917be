"""The records of the built-in kinds, and kinds of other packages."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

from pama_plugin.rewards import KINDS, Response, kinds
from pama_plugin.settings.names import COMMON_OPTIONS
from pama_plugin.settings.objective import Objective, parse_objective

README = Path(kinds.__file__).with_name("README.md")
(KIND,) = re.findall(r"```python\n(# shouting.py\n.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def shouts(tmp_path, monkeypatch):
    """Install the package of the README, which adds a kind."""
    (tmp_path / "shouting.py").write_text(KIND)
    metadata = tmp_path / "shouting-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pama_plugin.kinds]\nshouts = shouting:SHOUTS\nbroken = no_such:KIND\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    KINDS.entries.pop("shouts", None)
    sys.modules.pop("shouting", None)


def test_an_installed_package_adds_a_kind(shouts) -> None:
    objective = parse_objective("loud=shouts:2,mark=?,weight=3")
    score = objective.load_scorer(patient=False)
    answers = [asyncio.run(score(Response("", "", "", text, 1))) for text in ("eh?", "eh??")]
    assert answers == [0.0, 1.0] and objective.identity() == "shouts:2 mark=?" and objective.check() == []
    assert parse_objective("loud=shouts:0").check() == ["0 marks are always there"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loud=shouts:two", "number of marks.*found 'two'"),
        ("loud=shouts:2,loudness=3", "'shouts' .*option loudness.*probe, mark"),
        ("loud=broken:2", "'broken' .*loaded from no_such:KIND"),
        ("loud=sings:2", "kind: .*agent, broken, builtin, .*shouts.*found 'sings'"),
    ],
)
def test_an_invalid_objective_of_it_is_refused(text, message, shouts) -> None:
    with pytest.raises(ValueError, match=message):
        parse_objective(text)


def test_help_lists_it_but_not_a_broken_kind(shouts, capsys) -> None:
    from pama_plugin.cli import main

    with pytest.raises(SystemExit):
        main(["score", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "shouts: 1 where a mark occurs LOCATION times" in text and "shouts mark=" in text and "broken" not in text


@pytest.mark.parametrize("name", ["agent", "builtin", "hf", "http", "py", "rm"])
@pytest.mark.needs_extras
def test_the_options_of_a_record_are_those_of_its_model(name) -> None:
    kind = KINDS[name]
    model = kind.resolve("model")
    assert set(kind.options) == set(model.model_fields if model else ())
    assert set(kind.runtime_options) <= set(kind.options)
    for field in ("check", "absolute", "files", "load"):
        assert kind.resolve(field) is None or callable(kind.resolve(field))


def test_the_options_of_every_kind_are_the_fields_of_an_objective() -> None:
    assert {*COMMON_OPTIONS, "name", "kind", "location", "options"} == set(Objective.model_fields)

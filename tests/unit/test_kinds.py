"""The records of the kinds, and kinds of other packages."""

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
    """A package with a kind of its own, installed."""
    (tmp_path / "shouting.py").write_text(KIND)
    metadata = tmp_path / "shouting-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pama_plugin.kinds]\nshouts = shouting:SHOUTS\nbroken = no_such:KIND\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    KINDS.entries.pop("shouts", None)
    sys.modules.pop("shouting", None)


def test_another_package_adds_a_kind_by_being_installed(shouts) -> None:
    objective = parse_objective("loud=shouts:2,mark=?,weight=3")
    score = objective.load_scorer(patient=False)
    answers = [asyncio.run(score(Response("", "", "", text, 1))) for text in ("eh?", "eh??")]
    assert answers == [0.0, 1.0] and objective.identity() == "shouts:2 mark=?" and objective.check() == []
    assert parse_objective("loud=shouts:0").check() == ["0 marks are always there"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loud=shouts:two", "must be the number of marks, found 'two'"),
        ("loud=shouts:2,loudness=3", "'shouts' has no option loudness; it takes .*probe, mark"),
        ("loud=broken:2", "'broken' cannot be loaded from no_such:KIND"),
        ("loud=sings:2", "kind: must be one of agent, broken, builtin, .*shouts, found 'sings'"),
    ],
)
def test_a_mistake_in_it_is_refused_like_any_other(text, message, shouts) -> None:
    with pytest.raises(ValueError, match=message):
        parse_objective(text)


def test_help_lists_it_and_does_without_one_that_is_broken(shouts, capsys) -> None:
    from pama_plugin.cli import main

    with pytest.raises(SystemExit):
        main(["score", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "shouts: 1 where a mark occurs LOCATION times" in text and "shouts mark=" in text and "broken" not in text


@pytest.mark.parametrize("name", ["agent", "builtin", "hf", "http", "py", "rm"])
@pytest.mark.needs_extras
def test_a_record_says_what_its_model_takes(name) -> None:
    kind = KINDS[name]
    model = kind.resolve("model")
    assert set(kind.options) == set(model.model_fields if model else ())
    assert set(kind.runtime_options) <= set(kind.options)
    for field in ("check", "absolute", "files", "load"):
        assert kind.resolve(field) is None or callable(kind.resolve(field))


def test_the_options_of_every_kind_are_the_fields_of_an_objective() -> None:
    assert {*COMMON_OPTIONS, "name", "kind", "location", "options"} == set(Objective.model_fields)

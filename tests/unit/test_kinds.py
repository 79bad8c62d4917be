"""The records of the built-in kinds, and kinds of other packages."""

import asyncio
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pama_plugin.rewards import KINDS, Response, kinds
from pama_plugin.settings.names import COMMON_OPTIONS
from pama_plugin.settings.objective import Objective, parse_objective
from pama_plugin.settings.source import group_by_source

README = Path(kinds.__file__).with_name("README.md")
(KIND,) = re.findall(r"```python\n(# wordlist.py\n.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Install the package of the README, which adds a kind; return a file of words."""
    (tmp_path / "wordlist.py").write_text(KIND)
    metadata = tmp_path / "wordlist-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: wordlist\nVersion: 1.0\n")
    entry_points = "[pama_plugin.kinds]\nwordlist = wordlist:WORDLIST\nbroken = no_such:KIND\n"
    (metadata / "entry_points.txt").write_text(entry_points)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "polite.txt").write_text("please\nthanks\n")
    yield tmp_path / "polite.txt"
    KINDS.entries.pop("wordlist", None)
    sys.modules.pop("wordlist", None)


def test_an_installed_package_adds_a_kind(words) -> None:
    objective = parse_objective("polite=wordlist:polite.txt,at_most=2,weight=3")
    (source,) = group_by_source([objective])
    score = source.load(patient=False)
    answers = [asyncio.run(score(Response("", "", "", text, 1))) for text in ("no", "please", "please and thanks")]
    assert answers == [0.0, 1.0, 2.0] and objective.location == str(words) and objective.check() == []
    identity = objective.identity()
    assert identity.startswith(f"wordlist:{words} at_most=2 sha256:")
    words.write_text("")
    assert objective.check() == ["the file has no word, so every reward is 0"] and objective.identity() != identity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=wordlist:none.txt", "file with one word per line.*found 'none.txt'"),
        ("a=wordlist:polite.txt,most=3", "'wordlist' .*option most.*probe, at_most"),
        ("a=broken:2", "'broken' .*loaded from no_such:KIND"),
        ("a=sings:2", "kind: .*agent, broken, builtin, .*wordlist.*found 'sings'"),
    ],
)
def test_an_invalid_objective_of_it_is_refused(text, message, words) -> None:
    with pytest.raises(ValueError, match=message):
        parse_objective(text)


def test_files_may_be_named_as_text(words, monkeypatch) -> None:
    objective = parse_objective("polite=wordlist:polite.txt")
    expected = objective.identity()
    monkeypatch.setitem(KINDS.entries, "wordlist", replace(KINDS["wordlist"], files=lambda location: [location]))
    assert objective.identity() == expected


def test_help_lists_it_but_not_a_broken_kind(words, capsys) -> None:
    from pama_plugin.cli import main

    with pytest.raises(SystemExit):
        main(["score", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "wordlist: how many words of a file" in text and "wordlist at_most=" in text and "broken" not in text


@pytest.mark.parametrize("name", sorted(KINDS.entries))
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

"""The objective grammar, YAML, who wins, and a clear error for everything that cannot be run."""

from pathlib import Path

import pytest

from pama_plugin.config import PamaConfig, Placement, dump_config, load_config, parse_objective
from pama_plugin.errors import ConfigError

LENGTH = "length=builtin:length,scale=140,min=0.5,max=1.5"


def load(*objectives: str, loss: str | None = "pama", file: Path | None = None, level=None, noon=None) -> PamaConfig:
    return load_config(loss, objectives, str(file) if file else None, level, noon, default_level="sequence")


def test_the_grammar() -> None:
    objective = parse_objective(LENGTH + ",weight=0.5")
    assert (objective.name, objective.kind, objective.location, objective.weight) == (
        "length",
        "builtin",
        "length",
        0.5,
    )
    assert objective.options == {"scale": "140", "min": "0.5", "max": "1.5"}


def test_a_reward_model_may_be_a_folder_or_a_name_on_the_hub(tmp_path, monkeypatch) -> None:
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert parse_objective("r=rm:./reward").location == str(tmp_path / "reward")
    assert parse_objective("r=rm:reward").location == str(tmp_path / "reward")
    assert parse_objective("r=rm:org/model,value_head_prefix=head").location == "org/model"


def test_a_function_becomes_absolute(tmp_path, monkeypatch) -> None:
    (tmp_path / "rewards.py").write_text("def polite(queries, prompts, labels): ...\n")
    monkeypatch.chdir(tmp_path)
    assert parse_objective("p=py:rewards.py:polite").location == f"{tmp_path}/rewards.py:polite"


@pytest.mark.parametrize(
    "source", ["polite = lambda q, p, l: 1", "from a import polite", "from a import *", "import a as polite"]
)
def test_a_function_may_come_in_other_ways(tmp_path, source) -> None:
    (tmp_path / "rewards.py").write_text(source)
    assert parse_objective(f"p=py:{tmp_path}/rewards.py:polite")


def test_a_function_may_be_defined_in_a_branch(tmp_path) -> None:
    (tmp_path / "rewards.py").write_text(
        "try:\n    import a\nexcept ImportError:\n    def polite(q, p, l): return [1]\n"
    )
    assert parse_objective(f"p=py:{tmp_path}/rewards.py:polite")


def test_home_is_expanded(tmp_path, monkeypatch) -> None:
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_objective("r=rm:~/reward").location == str(tmp_path / "reward")


def test_defaults() -> None:
    config = load(LENGTH)
    assert (config.loss, config.level, config.noon, config.names, config.weights) == (
        "pama",
        "sequence",
        True,
        ("length",),
        (1.0,),
    )


def test_yaml_says_the_same_and_flags_win(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "loss: pama\nlevel: token\nnoon: false\nobjectives:\n"
        "  length: {kind: builtin, location: length, scale: 140, weight: 2}\n  long: builtin:length,scale=10\n"
    )
    config = load(loss=None, file=file)
    assert (config.loss, config.level, config.noon, config.weights) == ("pama", "token", False, (2.0, 1.0))
    assert config.objectives[0].options == {"scale": 140}
    config = load("long=builtin:length,scale=5", "third=builtin:length", file=file, level="batch")
    assert config.names == ("length", "long", "third") and config.level == "batch"
    assert config.objectives[1].options == {"scale": "5"}


def test_a_reward_model_may_say_where_it_runs(tmp_path) -> None:
    given = parse_objective("r=rm:org/model,gpus=2,nodes=3,offload=false").placement
    assert (given.gpus, given.nodes, given.offload) == (2, 3, False)
    assert parse_objective("r=rm:org/model").placement == Placement(gpus=None, nodes=None, offload=None)
    (tmp_path / "run.yaml").write_text("objectives: {r: {kind: rm, location: org/model, gpus: 0.5, offload: true}}")
    (objective,) = load(file=tmp_path / "run.yaml").objectives
    assert objective.placement == Placement(gpus=0.5, offload=True)


@pytest.mark.parametrize("loss", ["pama", "linear"])
def test_what_is_dumped_loads_as_the_same(loss, tmp_path) -> None:
    config = load(LENGTH, "r=rm:org/model,gpus=0.5,weight=2", loss=loss)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load(loss=None, file=tmp_path / "run.yaml") == config


BAD_OBJECTIVES = {
    "": "expected NAME=KIND:LOCATION",
    "length": "expected NAME=KIND:LOCATION",
    "x=builtin": "expected NAME=KIND:LOCATION.*found 'builtin'",
    "x=builtin:length,scale": "found 'scale' without '='",
    "x=builtin:length,scale=1,scale=2": "found an option twice",
    "=builtin:length": "name: must be a letter.*found ''",
    "a/b=builtin:length": "must be a letter followed by.*metric key, found 'a/b'",
    "a b=builtin:length": "metric key",
    "x=gpt:length": "unknown kind 'gpt'; known: rm, py, builtin",
    "x=builtin:": "location: .*at least 1 character",
    "x=builtin:len": "unknown builtin reward 'len'; known: length",
    "x=builtin:length,sclae=1": "no option sclae; it takes scale, min, max",
    "x=builtin:length,scale=ten": "scale: .*valid number.*found 'ten'",
    "x=builtin:length,scale=0": "finite scale > 0",
    "x=builtin:length,min=2,max=1": "min ≤ max, found",
    "x=builtin:length,weight=0": "weight: .*greater than 0, found '0'",
    "x=builtin:length,weight=-1": "weight: .*greater than 0, found '-1'",
    "x=builtin:length,weight=nan": "weight: .*found 'nan'",
    "x=builtin:length,weight=inf": "weight: .*found 'inf'",
    "x=builtin:length,weight=much": "weight: .*valid number.*found 'much'",
    "x=rm:./nowhere": "no such folder: ./nowhere",
    "x=rm:runs/typo/model": "no such folder: runs/typo/model",
    "x=rm:.": "no reward model in .: it has no config.json",
    "x=rm:org/model,head=1": "kind 'rm' has no option head; it takes weight, value_head_prefix",
    "x=rm:org/model,gpus=many": "gpus: .*valid number.*found 'many'",
    "x=rm:org/model,gpus=0": "gpus: must be a whole number of ranks per node, or a fraction of one GPU .*, found '0'",
    "x=rm:org/model,gpus=-1": "gpus: must be a whole number.*found '-1'",
    "x=rm:org/model,gpus=1.5": "gpus: must be a whole number.*found '1.5'",
    "x=rm:org/model,gpus=inf": "gpus: must be a whole number.*found 'inf'",
    "x=rm:org/model,gpus=nan": "gpus: must be a whole number.*found 'nan'",
    "x=rm:org/model,gpus=0.33333": "gpus: .* with up to 4 decimals, found '0.33333'",
    "x=rm:org/model,gpus=0.5,nodes=2": "gpus=0.5 is one rank that shares a GPU, so nodes must be 1, found 2",
    "x=rm:org/model,nodes=0": "nodes: .*greater than or equal to 1, found '0'",
    "x=rm:org/model,offload=maybe": "offload: .*valid boolean.*found 'maybe'",
    "x=builtin:length,gpus=1": "no option gpus; it takes scale, min, max",
    "x=py:HERE:length,offload=true": "kind 'py' has no option offload; it takes weight",
    "x=py:nowhere.py:f": "no such file: .*nowhere.py",
    "x=py:rewards": "expected FILE.py:FUNCTION, found 'rewards'",
    "x=py:HERE:polite": "no function 'polite' in .*; it defines length",
    "x=py:HERE:length,k=1": "kind 'py' has no option k; it takes weight",
    "x=py:BROKEN:f": "is not valid Python",
}


@pytest.mark.parametrize("text", BAD_OBJECTIVES)
def test_a_bad_objective_is_named_with_the_rule_and_what_was_found(text, tmp_path) -> None:
    (tmp_path / "here.py").write_text("def length(): ...\n")
    (tmp_path / "broken.py").write_text("def (\n")
    given = text.replace("HERE", f"{tmp_path}/here.py").replace("BROKEN", f"{tmp_path}/broken.py")
    with pytest.raises(ConfigError, match=BAD_OBJECTIVES[text]) as error:
        load(given)
    assert str(error.value).startswith(f"--pama.objective {given!r}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "at least one --pama.objective .* found none"),
        (
            dict(objectives=[LENGTH], loss="pareto"),
            "--loss must be one of linear, pama, or ppo without objectives, found 'pareto'",
        ),
        (dict(objectives=[LENGTH, LENGTH]), "names must differ, found 'length' twice"),
        (dict(objectives=[LENGTH], level="word"), "--pama.level must be one of token, sequence, batch, found 'word'"),
        (dict(objectives=[LENGTH], loss="linear", level="token"), "no meaning with --loss linear"),
        (dict(objectives=[LENGTH], loss="linear", noon=False), "no meaning with --loss linear"),
    ],
)
def test_a_bad_run(arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*arguments.pop("objectives", []), **arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("objectives: [a, b]", "objectives must map names to specifications, found list"),
        ("- a", "must be a mapping of best, level, loss, noon, objectives, found list"),
        ("objective: {}", "must be a mapping of .*, found objective"),
        ("objectives: {a: 'builtin:length', a: 'builtin:length'}", "keys must differ, found a twice"),
        ("objectives: {a: {kind: builtin, location: length, weight: true}}", "weight: must be a number, found True"),
        ("objectives: {a: {kind: rm, location: o/m, gpus: true}}", "gpus: must be a number, found True"),
        ("objectives: {a: {kind: rm, location: o/m, nodes: true}}", "nodes: must be a number, found True"),
        ("objectives: {a: 3}", "objective 'a': expected NAME=KIND:LOCATION.*found 3"),
        ("objectives: {a: {kind: builtin}}", "objective 'a': location: Field required"),
        ("objectives: {a: {location: length}}", "objective 'a': kind: Field required"),
        ("objectives: {a: 'builtin:length'}\nnoon: 'no'", "noon must be true or false, found 'no'"),
        ("objectives: {", "is not valid YAML"),
        ("objectives: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_bad_file(content, message, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(file=file)


def test_a_file_that_is_not_text(tmp_path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load(file=tmp_path / "run.yaml")


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="--pama.config: cannot read nowhere.yaml: No such file"):
        load(file=Path("nowhere.yaml"))

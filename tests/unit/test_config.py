"""The objective grammar, YAML, precedence of flags, and an error for every invalid setting."""

import re
from pathlib import Path

import pytest
import torch

from pama_plugin.errors import ConfigError
from pama_plugin.rewards.options import RmOptions
from pama_plugin.settings.load import as_settings, dump_config, load_config
from pama_plugin.settings.objective import parse_objective
from pama_plugin.settings.run import PamaConfig, warn_of_many_objectives
from pama_plugin.settings.values import Bounds, OnFailure

LENGTH = "length=builtin:length,scale=140,min=0.5,max=1.5"


def load(*objectives: str, loss: str | None = "pama", file: Path | None = None, level=None, noon=None) -> PamaConfig:
    return load_config(loss, objectives, str(file) if file else None, level, noon, default_level="sequence")


def test_the_grammar() -> None:
    objective = parse_objective(LENGTH + ",weight=0.5")
    assert (objective.name, objective.kind, objective.location) == ("length", "builtin", "length")
    assert objective.weight.at(0) == objective.weight.at(1000) == 0.5
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
    assert (config.loss, config.level, config.noon, config.names, config.weights_at(0)) == (
        "pama",
        "sequence",
        None,  # the default of pama, which depends on the level
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
    assert (config.loss, config.level, config.noon, config.weights_at(0)) == ("pama", "token", False, (2.0, 1.0))
    assert config.objectives[0].options == {"scale": 140}
    config = load("long=builtin:length,scale=5", "third=builtin:length", file=file, level="batch")
    assert config.names == ("length", "long", "third") and config.level == "batch"
    assert config.objectives[1].options == {"scale": "5"}


def test_a_reward_model_may_say_where_it_runs(tmp_path) -> None:
    options = parse_objective("r=rm:org/model,gpus=2,nodes=3,offload=false").settings
    assert (options.gpus, options.nodes, options.offload) == (2, 3, False)
    assert parse_objective("r=rm:org/model").settings == RmOptions(gpus=None, nodes=None, offload=None)
    (tmp_path / "run.yaml").write_text("objectives: {r: {kind: rm, location: org/model, gpus: 0.5, offload: true}}")
    (objective,) = load(file=tmp_path / "run.yaml").objectives
    assert objective.settings == RmOptions(gpus=0.5, offload=True)


def test_what_every_kind_takes(tmp_path) -> None:
    text = "a=builtin:length,clip=-1:2,range=0:inf,on_failure=impute:mean,max_failures=0.2,normalize=running"
    flagged = parse_objective(text + ",freeze_after=7")
    assert (flagged.clip, flagged.range) == (Bounds(-1, 2), Bounds(0, float("inf")))
    assert flagged.on_failure == OnFailure("impute", None) and flagged.max_failures == 0.2
    assert (flagged.normalize, flagged.freeze_after) == ("running", 7)
    (tmp_path / "run.yaml").write_text(
        "objectives:\n  a: {kind: builtin, location: length, clip: [-1, 2], range: [0, .inf],\n"
        "      on_failure: 'impute:mean', max_failures: 0.2, normalize: running, freeze_after: 7}\n"
    )
    assert load(file=tmp_path / "run.yaml").objectives == (flagged,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2", [2, 2, 2, 2, 2]),
        ("linear:1:3:4", [1, 1.5, 2, 2.5, 3, 3]),
        ("cosine:1:3:4", [1, 2 - 2**0.5 / 2, 2, 2 + 2**0.5 / 2, 3, 3]),
        ("step:1:3:4", [1, 1, 1, 1, 3, 3]),
    ],
)
def test_the_weight_of_every_step(text, expected) -> None:
    weight = parse_objective(f"a=builtin:length,weight={text}").weight
    assert [weight.at(step) for step in range(len(expected))] == pytest.approx(expected)
    assert str(weight) == text


def test_monitors_are_named_but_not_combined() -> None:
    config = load(LENGTH, "logged=builtin:json,role=monitor", "b=builtin:length,weight=3")
    assert config.names == ("length", "logged", "b") and config.trained_names == ("length", "b")
    assert config.weights_at(0) == (1, 3)


@pytest.mark.needs_extras
def test_replicas_may_be_a_list(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text(
        "objectives: {judge: {kind: http, location: ['http://a/get_reward', 'http://b/get_reward'], timeout: 5}}"
    )
    (objective,) = load(file=tmp_path / "run.yaml").objectives
    assert objective.location == "http://a/get_reward|http://b/get_reward" and objective.settings.timeout == 5


@pytest.mark.parametrize("loss", ["pama", "linear"])
def test_what_is_dumped_loads_as_the_same(loss, tmp_path) -> None:
    every = "a=agent:style,weight=linear:0.3333333:2:9,clip=-1:inf,on_failure=impute:0.5,normalize=batch,probe=polite"
    config = load(LENGTH, "r=rm:org/model,gpus=0.5,weight=2", every, loss=loss)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load(loss=None, file=tmp_path / "run.yaml") == config


BAD_OBJECTIVES = {
    "": "NAME=KIND:LOCATION.*found no '='",
    "length": "NAME=KIND:LOCATION.*found no '='",
    "x=builtin": "NAME=KIND:LOCATION.*found 'builtin'",
    "x=builtin:length,scale": "NAME=KIND:LOCATION.*found 'scale' without '='",
    "x=builtin:length,scale=1,scale=2": "NAME=KIND:LOCATION.*found .*twice",
    "=builtin:length": "name: .*letter.*found ''",
    "a/b=builtin:length": "name: .*letter.*metric key.*found 'a/b'",
    "a b=builtin:length": "name: .*letter.*metric key.*found 'a b'",
    "x=gpt:length": "kind: .*agent, builtin, hf, http, judge, py, rm.*found 'gpt'",
    "x=builtin:": "location: .*at least 1 character",
    "x=builtin:len": "unknown builtin reward 'len'.*json, length, regex, repetition",
    "x=builtin:length,sclae=1": "builtin:length .*option sclae.*scale, min, max, unit, preset",
    "x=builtin:length,scale=ten": "scale: .*valid number.*found 'ten'",
    "x=builtin:length,scale=0": "length .*scale ≠ 0.*found scale=0",
    "x=builtin:length,min=2,max=1": "length .*min ≤ max.*found .*min=2.*max=1",
    "x=builtin:length,weight=0": "weight: .*1e-9.*1e9.*found '0'",
    "x=builtin:length,weight=-1": "weight: .*1e-9.*1e9.*found '-1'",
    "x=builtin:length,weight=nan": "weight: .*1e-9.*1e9.*found 'nan'",
    "x=builtin:length,weight=inf": "weight: .*1e-9.*1e9.*found 'inf'",
    "x=builtin:length,weight=much": "weight: .*number.*SHAPE:START:END:STEPS.*found 'much'",
    "x=rm:./nowhere": "no such folder: ./nowhere",
    "x=rm:runs/typo/model": "no such folder: runs/typo/model",
    "x=rm:.": "no reward model in .*config.json",
    "x=rm:org/model,head=1": "kind 'rm' .*option head.*weight, role, .*value_head_prefix",
    "x=rm:org/model,gpus=many": "gpus: .*valid number.*found 'many'",
    "x=rm:org/model,gpus=0": "gpus: .*whole number.*fraction.*found '0'",
    "x=rm:org/model,gpus=-1": "gpus: .*whole number.*fraction.*found '-1'",
    "x=rm:org/model,gpus=1.5": "gpus: .*whole number.*fraction.*found '1.5'",
    "x=rm:org/model,gpus=inf": "gpus: .*whole number.*fraction.*found 'inf'",
    "x=rm:org/model,gpus=nan": "gpus: .*whole number.*fraction.*found 'nan'",
    "x=rm:org/model,gpus=0.33333": "gpus: .*4 decimals.*found '0.33333'",
    "x=rm:org/model,gpus=0.5,nodes=2": "nodes must be 1.*gpus=0.5.*found 2",
    "x=rm:org/model,nodes=0": "nodes: .*greater than or equal to 1.*found '0'",
    "x=rm:org/model,offload=maybe": "offload: .*valid boolean.*found 'maybe'",
    "x=builtin:length,gpus=1": "builtin:length .*option gpus.*scale, min, max, unit, preset",
    "x=py:HERE:length,offload=true": "kind 'py' .*option offload.*weight, .*timeout, concurrency",
    "x=py:nowhere.py:f": "no such file: .*nowhere.py",
    "x=py:rewards": "FILE.py:FUNCTION.*found 'rewards'",
    "x=py:HERE:polite": "no function 'polite' in .*length",
    "x=py:HERE:length,k=1": "kind 'py' .*option k.*weight, .*timeout, concurrency",
    "x=py:BROKEN:f": "broken.py .*not valid Python",
    "x=builtin:length,weight=linear:1:2": "weight: .*number.*SHAPE:START:END:STEPS.*found 'linear:1:2'",
    "x=builtin:length,weight=spline:1:2:3": "weight: .*linear, cosine, step.*found 'spline:1:2:3'",
    "x=builtin:length,weight=linear:1:0:5": "weight: .*1e-9.*1e9.*found 'linear:1:0:5'",
    "x=builtin:length,weight=linear:1:2:0": "weight: .*at least 1 step.*found 'linear:1:2:0'",
    "x=builtin:length,weight=linear:1:2:1.5": "weight: .*SHAPE:START:END:STEPS.*found 'linear:1:2:1.5'",
    "x=builtin:length,role=judge": "role: .*'train', 'monitor' or 'constraint'.*found 'judge'",
    "x=builtin:length,role=constraint": "role=constraint and threshold=NUMBER",
    "x=builtin:length,threshold=1": "role=constraint and threshold=NUMBER",
    "x=builtin:length,role=constraint,threshold=1": "at least one objective .*role=train.*found none among x",
    "x=builtin:length,role=monitor": "at least one objective .*role=train.*found none among x",
    "x=builtin:length,normalize=running,freeze_after=0": "freeze_after: .*greater than or equal to 1.*found '0'",
    "x=builtin:length,freeze_after=5": "freeze_after .*normalize=running.*found normalize=none",
    "x=builtin:length,normalize=z": "normalize: .*'none', 'batch', 'group' or 'running'.*found 'z'",
    "x=builtin:length,clip=5": r"clip: .*LOW:HIGH.*\[LOW, HIGH\].*found '5'",
    "x=builtin:length,clip=5:1": "clip: .*LOW < HIGH.*found '5:1'",
    "x=builtin:length,clip=0:1e30": r"clip: .*at most 1e\+18.*found '0:1e30'",
    "x=builtin:length,range=nan:1": "range: .*LOW < HIGH.*found 'nan:1'",
    "x=builtin:length,on_failure=impute:1e300": "on_failure: .*fail, mask, impute:VALUE.*found 'impute:1e300'",
    "x=builtin:length,role=monitor,weight=2": "weight, normalize and clip .*role=monitor",
    "x=py:HERE:length,timeout=true": "timeout: .*valid number.*found 'true'",
    "x=rm:~nobody_at_all/model": "nobody_at_all|home directory",
    "x=builtin:length,on_failure=0": "on_failure: .*fail, mask, impute:VALUE.*impute:mean.*found '0'",
    "x=builtin:length,on_failure=impute": "on_failure: .*fail, mask, impute:VALUE.*found 'impute'",
    "x=builtin:length,on_failure=impute:inf": "on_failure: .*fail, mask, impute:VALUE.*found 'impute:inf'",
    "x=builtin:length,on_failure=mask:1": "on_failure: .*fail, mask, impute:VALUE.*found 'mask:1'",
    "x=builtin:length,max_failures=0.1": "max_failures .*mask or impute.*found on_failure=fail",
    "x=builtin:length,on_failure=mask,max_failures=2": "max_failures: .*less than or equal to 1.*found '2'",
    "x=builtin:length,probe=taste": "probe: .*sentiment, helpful, harmless, polite.*found 'taste'",
    "x=builtin:length,preset=imdb,scale=2": "length .*preset or scale, min, max and unit.*found both",
    "x=builtin:regex": "pattern: Missing required",
    "x=builtin:regex,pattern=(": "regex .*valid pattern.*found '\\('",
    "x=builtin:repetition,n=0": "repetition .*n ≥ 1.*found n=0",
    "x=py:HERE:length,timeout=0": "timeout: .*greater than 0.*found '0'",
    "x=http:ftp://server/get_reward": r"http\(s\)://HOST.*found 'ftp://server/get_reward'",
    "x=http:http://server/get_reward,retries=-1": "retries: .*greater than or equal to 0.*found '-1'",
    "x=http:http://server/get_reward,token_env=PAMA_NOT_SET": "token_env .*bearer token.*found .*unset",
    "x=hf:./nowhere": "no such folder: ./nowhere",
    "x=hf:org/model,text=song": "text: .*'chat', 'full', 'pair' or 'response'.*found 'song'",
    "x=hf:org/model,replicas=0": "replicas: .*greater than or equal to 1.*found '0'",
    "x=agent:style,timeout=5": "kind 'agent' .*option timeout.*weight",
}


@pytest.mark.parametrize("text", BAD_OBJECTIVES)
def test_the_error_for_a_bad_objective_has_the_flag_the_limit_and_the_value(text, tmp_path) -> None:
    (tmp_path / "here.py").write_text("def length(): ...\n")
    (tmp_path / "broken.py").write_text("def (\n")
    flag = text.replace("HERE", f"{tmp_path}/here.py").replace("BROKEN", f"{tmp_path}/broken.py")
    with pytest.raises(ConfigError, match=BAD_OBJECTIVES[text]) as error:
        load(flag)
    if "at least one" not in str(error.value):  # an error of the run, not of the objective
        shown = flag.replace("PAMA_NOT_SET", "…")  # which may be the token itself
        assert str(error.value).startswith(f"--pama.objective {shown!r}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "at least one --pama.objective .*found none"),
        (dict(objectives=[LENGTH], loss="pareto"), "--loss .*linear, .*pama, .*ppo .*found 'pareto'"),
        (dict(objectives=[LENGTH, LENGTH]), "--pama.objective .*names must differ.*found 'length' twice"),
        (dict(objectives=[LENGTH], level="word"), "--pama.level .*token, sequence, batch.*found 'word'"),
        (dict(objectives=[LENGTH], loss="linear", noon=False), "--pama.no_noon .*no effect with --loss linear"),
        (dict(objectives=[LENGTH], loss="linear", noon=True), "--pama.noon .*no effect with --loss linear"),
    ],
)
def test_a_bad_run(arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*arguments.pop("objectives", []), **arguments)


# Eight lists of ten: 10^8 values with every alias written out.
BOMB = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join(10 * [f'*{before}'])}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("objectives: [a, b]", "--pama.config: .*objectives must map names.*found list"),
        (
            "- a",
            "--pama.config: .*mapping.*best, eval_preferences, filter_by, inactive_below, level, log_rollouts, loss, "
            "noon, objectives, options, preference_template, preferences, probe, probe_gradients, rescale, "
            "stop_at_front, stop_at_kl, whiten.*found list",
        ),
        ("objective: {}", "--pama.config: .*mapping.*objectives.*found objective$"),
        ("objectives: {a: 'builtin:length', a: 'builtin:length'}", "--pama.config: .*keys must differ.*found a twice"),
        ("objectives: {a: {kind: builtin, location: length, weight: true}}", "weight: .*number.*found True"),
        ("objectives: {a: {kind: rm, location: o/m, gpus: true}}", "gpus: .*number.*found True"),
        ("objectives: {a: {kind: rm, location: o/m, nodes: true}}", "nodes: .*number.*found True"),
        ("objectives: {a: 3}", "objective 'a': .*NAME=KIND:LOCATION.*found 3"),
        ("objectives: {a: {kind: builtin}}", "objective 'a': location: Field required"),
        ("objectives: {a: {location: length}}", "objective 'a': kind: Field required"),
        ("objectives: {a: 'builtin:length'}\nnoon: 'no'", "noon: .*true or false.*found 'no'"),
        ("objectives: {a: 'builtin:length'}\nprobe_gradients: true", "--pama.probe_gradients .*at least 1.*found True"),
        ("objectives: {", "--pama.config: .*not valid YAML"),
        ("objectives: !!python/object/apply:os.getcwd []", "--pama.config: .*not valid YAML"),
        ("noon: !!bool maybe", "run.yaml: not valid YAML: 'maybe' is not of the type bool"),
        ("level: !!int ''", "not valid YAML: '' is not of the type int"),
        ("level: !!float low", "not valid YAML: 'low' is not of the type float"),
        ("level: !!timestamp soon", "not valid YAML: 'soon' is not of the type timestamp"),
        ("level: 2026-13-45", "not valid YAML: '2026-13-45' is not of the type timestamp"),
        ("level: !!binary é", "not valid YAML"),
        (f"level: 0x{'f' * 100_000}", "not valid YAML: integers must be below 2.63, found one of 100002 characters"),
        (f"level: {'9' * 5000}", "not valid YAML: '999"),
        ("level: " + "[" * 10_000, "not valid YAML"),
        ("level: &a [*a]", "not valid YAML: with its aliases written out .*at most 100,000 values"),
        (BOMB + "level: *i", "not valid YAML: with its aliases written out .*at most 100,000 values"),
        (BOMB + "objectives: *i", "not valid YAML: with its aliases written out .*at most 100,000 values"),
        ("base: &b {a: 1}\nobjectives: {<<: *b, <<: *b}", "keys must differ, found << twice"),
        ("options: {1: a, 0x1: b}", "keys must differ, found 0x1 twice"),
        ("options: {yes: a, true: b}", "keys must differ, found true twice"),
        (f"level: 1:{':'.join(200 * ['00'])}.0", "not valid YAML: .* is not of the type float"),
    ],
)
def test_a_bad_file(content, message, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(file=file)


@pytest.mark.needs_extras
def test_merge_keys(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "objectives:\n"
        "  short: &server {kind: http, location: 'http://judge', timeout: 5, range: '0:1'}\n"
        "  kind: {<<: *server, timeout: 60, location: 'http://third'}\n"
        "  both: {<<: [{timeout: 7}, *server], location: 'http://other'}\n"
    )
    objectives = {each.name: each for each in load(file=file).objectives}
    assert [each.options["timeout"] for each in objectives.values()] == [5, 60, 7]
    assert objectives["both"].location == "http://other"


def test_nothing_in_a_file_is_the_default(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("objectives: {a: 'builtin:length'}\nlevel:\nnoon:\nbest:\nprobe:\nwhiten:\n")
    config = load(file=file)
    assert (config.level, config.noon, config.best, config.probe, config.whiten) == (
        "sequence",
        None,
        None,
        "off",
        False,
    )


def test_a_file_that_is_not_text(tmp_path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="--pama.config: .*not valid YAML"):
        load(file=tmp_path / "run.yaml")


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="--pama.config: .*nowhere.yaml: No such file"):
        load(file=Path("nowhere.yaml"))


@pytest.mark.parametrize(
    "location",
    [
        "http://user:pa55@judge/",
        "http://a:pa55/@judge/",
        "http://judge/?key=pa55",
        "http://judge/?a=1,key=pa55",
        "http://judge/?a=1,pa55=1",
        "http://judge/?a=1,pa55",
        "http://judge/?a=1,pa55,pa55word",
        "http://judge/|http://judge/?a=1,key=pa55",
        "http://user:my,pa55@judge/",
        "http://user:my,key=pa55@judge/",
        "http://user:my,pa55,pa55word@judge/",
        "http://judge/#pa55",
        "http://judge/,token_env=sk-pa55",
        "http://judge/,token_env=pa55",
        "HTTP://judge/?key=pa55",
        "judge/?key=pa55",
    ],
)
@pytest.mark.parametrize("suffix", ["", ",timeout=soon", ",weight=-1"])
def test_an_error_does_not_repeat_what_may_be_a_secret(location, suffix, tmp_path) -> None:
    with pytest.raises(ConfigError) as error:
        load(f"x=http:{location}{suffix}")
    assert "pa55" not in str(error.value) and "x=http:" in str(error.value)
    file = tmp_path / "run.yaml"
    file.write_text(f'loss: linear\nobjectives:\n  x: "http:{location}{suffix}"\n')
    with pytest.raises(ConfigError) as error:
        load(file=file)
    assert "pa55" not in str(error.value) and "'x'" in str(error.value)


def test_a_regular_expression_is_no_secret() -> None:
    with pytest.raises(ConfigError, match=re.escape("'x=builtin:regex,pattern=a?(b,weight=-1'")) as error:
        load("x=builtin:regex,pattern=a?(b,weight=-1")
    assert "…" not in str(error.value)


def test_what_dynamic_filtering_rates_by() -> None:
    objectives = ("a=builtin:length,weight=3", "sum=builtin:json", "m=builtin:json,role=monitor")
    rewards = {"a": 2.0, "sum": 0.5, "m": 7.0}
    config = load(*objectives)
    for filter_by, rating in {"a": 2.0, "m": 7.0, "sum": 0.5}.items():  # "sum" is the name of an objective here
        assert config.model_copy(update={"filter_by": filter_by}).rate(rewards, 0) == rating
    others = load("a=builtin:length,weight=3", "b=builtin:json", "m=builtin:json,role=monitor")
    total = others.model_copy(update={"filter_by": "sum"})
    assert total.rate({"a": 2.0, "b": 0.5, "m": 7.0}, 0) == 6.5
    assert [objective.name for objective in total.filtered_by] == ["a", "b"]


@pytest.mark.needs_extras
def test_a_plan_has_no_secret(monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "pa55")
    config = load("x=http:https://judge/?key=${JUDGE_KEY}")
    assert "pa55" not in f"{config!r} {dump_config(config)}" and "?key=${JUDGE_KEY}" in dump_config(config)


@pytest.mark.parametrize(
    ("loss", "flags", "message"),
    [
        ("pama", dict(option=["leak=0.1"]), "--loss pama: leak .*noon"),
        ("pama", dict(option=["soft=2", "soft=3"]), "--pama.option 'soft=3': .*differ.*found 'soft' twice"),
        ("pama", dict(option=["soft=2"], level="batch"), "--loss pama: soft .*level=batch"),
        ("tchebycheff", dict(option=["ideal=[1, 2]"]), "--loss tchebycheff: ideal .*1 number"),
        ("pama", dict(option=["leak=2"]), "--pama.option: .*'pama'.* leak: .*less than or equal to 1.*found 2"),
        ("pama", dict(option=["leek=0.1"]), "--pama.option: .*'pama' .*option leek.*soft, leak"),
        ("pama", dict(option=["leak"]), "--pama.option .*KEY=VALUE.*found 'leak'"),
        ("pama", dict(option=["leak=["]), "--pama.option 'leak=\\[': .*not valid YAML"),
        ("morlhf", dict(whiten=True), "--pama.whiten .*advantages.*found --loss morlhf.*rewards"),
        ("lagrangian", {}, "--loss lagrangian .*role=constraint,threshold=NUMBER.*found none"),
        (
            "pama",
            dict(
                objectives=[f"a{i}=builtin:length,scale={i + 1}" for i in range(9)], option=["soft=4"], rescale="unit"
            ),
            "--loss pama: rescale=unit: the size of rule 'pama' is not known",
        ),
        ("morlhf", dict(rescale="unit"), "--loss morlhf: rescale=unit: the size of rule 'morlhf' is not known"),
        ("pama", dict(rescale="rms"), "--pama.rescale must be one of auto, none, unit, found 'rms'"),
        ("pama", dict(option=["rescale=false"]), "--pama.option rescale=false is now --pama.rescale none"),
        ("linear", dict(level="batch"), "--loss linear: level=batch needs a rule that has it, such as pama"),
        ("gdpo", dict(level="token"), "--pama.level must be sequence with --loss gdpo, .* found token"),
        ("morlhf", dict(level="sequence"), "--pama.level has no effect with --loss morlhf, which combines rewards"),
        *(
            ("pama", dict(stop_at_front=text), rf"--pama.stop_at_front .*SHARE\[:STEPS\].*found '{text}'")
            for text in ("", "0", "-1", "1.5", "nan", "a", ":5", "0.1:", "0.1:0", "0.1:2.5", "0.1:5:6")
        ),
        ("pama", dict(stop_at_front="0.1"), "--pama.stop_at_front .*at least 2 trained objectives.*found 1"),
    ],
)
def test_options_that_conflict_are_refused_before_anything_starts(loss, flags, message) -> None:
    settings = dict(level=None, noon=None, objectives=[LENGTH]) | flags
    with pytest.raises(ConfigError, match=message):
        load_config(loss, file=None, **settings, default_level="token")


@pytest.mark.parametrize(
    ("loss", "default", "level"),
    [
        ("pama", "token", "token"),
        ("pama", "sequence", "sequence"),
        ("linear", "sequence", "token"),
        ("min_norm", "sequence", "token"),
        ("gdpo", "token", "sequence"),
    ],
)
def test_the_default_level(loss, default, level) -> None:
    config = load_config(loss, [LENGTH], None, None, None, default_level=default)
    assert (config.level, as_settings(config)["level"]) == (level, level)


def test_every_rule_has_the_sequence_level() -> None:
    """The advantages of a response are combined as their mean, by any rule."""
    for loss in ("linear", "min_norm", "gdpo", "pama"):
        config = load_config(loss, [LENGTH], None, "sequence", None, default_level="token")
        values_KBA = torch.tensor([[[1.0, 3.0], [-2.0, -4.0]]])
        result = config.combine(
            values_KBA,
            torch.ones(2, 2),
            steps_done=0,
            groups_B=torch.zeros(2, dtype=torch.long),
            rewards_KB=torch.zeros(1, 2),
            violations=[None],
            memory=[{}],
        )
        assert torch.equal(result.advantages[:, 0], result.advantages[:, 1]) and result.advantages[0, 0] > 0


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("0.1", (0.1, 5)), ("0.1:3", (0.1, 3)), (0.25, (0.25, 5)), ({"share": 0.2, "steps": 2}, (0.2, 2))],
)
def test_stopping_at_the_front(stop, expected, tmp_path) -> None:
    """From a flag, from a file, and from the output of --pama.plan."""
    two = [LENGTH, "short=builtin:length,scale=3"]
    config = load_config("pama", two, None, None, None, stop_at_front=stop, default_level="token")
    assert (config.stop_at_front.share, config.stop_at_front.steps) == expected
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load(file=tmp_path / "run.yaml", loss=None) == config


@pytest.mark.parametrize(
    ("loss", "level", "stops"),
    [("pama", "token", True), ("pama", "sequence", True), ("gd2po", None, True)]
    + [("pama", "batch", False), *((loss, None, False) for loss in ("linear", "min_norm", "gdpo", "rvpo", "morlhf"))],
)
def test_stopping_at_the_front_needs_a_rule_without_advantages_where_objectives_disagree(loss, level, stops) -> None:
    two = [LENGTH, "short=builtin:length,scale=3"]
    settings = dict(level=level, noon=None, stop_at_front="0.1", default_level="sequence")
    if stops:
        assert load_config(loss, two, None, **settings).stop_at_front
    else:
        with pytest.raises(
            ConfigError, match=f"--pama.stop_at_front .*no advantage where objectives disagree.*found --loss {loss}"
        ):
            load_config(loss, two, None, **settings)


@pytest.mark.parametrize("sharpness", ["0.5", "1", "4"])
def test_a_soft_minimum_gives_an_advantage_where_objectives_disagree(sharpness) -> None:
    two = [LENGTH, "short=builtin:length,scale=3"]
    settings = dict(level=None, noon=None, option=[f"soft={sharpness}"], stop_at_front="0.1", default_level="token")
    with pytest.raises(
        ConfigError, match="--pama.stop_at_front .*no advantage where objectives disagree.*found --loss pama"
    ):
        load_config("pama", two, None, **settings)


@pytest.mark.parametrize(
    ("objectives", "flags", "largest"),
    [(2, {}, 0.25), (3, {}, 0.125), (5, {}, 0.03125), (3, dict(noon=True), 0.0625)]
    + [(3, dict(noon=True, option=["leak=0.1"]), 0.125)],
)
def test_a_share_near_that_of_independent_objectives_is_refused(objectives, flags, largest) -> None:
    many = [f"a{index}=builtin:length,scale={index + 1}" for index in range(objectives)]
    settings = dict(level=None, noon=None, default_level="token") | flags
    assert load_config("pama", many, None, **settings, stop_at_front=f"{largest}").stop_at_front
    with pytest.raises(
        ConfigError,
        match=f"SHARE .*at most {largest:.3g}.*{objectives} independent objectives.*found {largest * 1.01:g}",
    ):
        load_config("pama", many, None, **settings, stop_at_front=f"{largest * 1.01}")


@pytest.mark.parametrize(
    ("objectives", "flags", "warning"),
    [
        (5, {}, None),
        (6, {}, "--loss pama .*6 objectives.*3.1% of the responses.* by 22.94"),
        (8, dict(level="token", noon=True), "8 objectives.*0.4% of the tokens.* by 83.41"),
        (8, dict(rescale="none"), "8 objectives.*0.8% of the responses[.] "),
        (8, dict(level="batch"), None),
    ],
)
def test_many_objectives_give_a_warning(objectives, flags, warning) -> None:
    many = [f"length{index}=builtin:length,scale={index + 1}" for index in range(objectives)]
    settings = dict(level=None, noon=None) | flags
    warnings = warn_of_many_objectives(load_config("pama", many, None, **settings, default_level="sequence"))
    assert bool(warnings) == bool(warning) and (not warning or re.search(warning, warnings[0]))


def test_a_constraint_needs_a_rule_with_constraints() -> None:
    constraint = "short=builtin:length,role=constraint,threshold=-9"
    with pytest.raises(ConfigError, match="role=constraint .*rule.*found short with --loss pama"):
        load(LENGTH, constraint)
    config = load(LENGTH, constraint, loss="lagrangian")
    assert config.trained_names == ("length", "short")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(loss="nope", objectives=()), "--loss .*pama, .*found 'nope'"),
        (dict(loss="pama", objectives=()), "at least one objective .*role=train.*found none among no objective"),
        (dict(loss="pama", level="word"), "--pama.level .*token, sequence, batch.*found 'word'"),
        (dict(loss="pama", options={"leak": 0.1}), "--loss pama: leak .*noon"),
        (dict(loss="pama", options={"leek": 0.1}), "--pama.option: .*'pama' .*option leek"),
        (dict(loss="pama", objectives=2 * (parse_objective(LENGTH),)), "names must differ.*found length twice"),
        (dict(loss="pama", probe_gradients="zero"), "--pama.probe_gradients .*at least 1.*found 'zero'"),
        (dict(loss="morlhf", whiten=True), "--pama.whiten .*advantages.*found --loss morlhf.*rewards"),
        (dict(loss="lagrangian"), "--loss lagrangian .*role=constraint.*found none"),
        (dict(loss="linear", noon=True), "--pama.noon .*no effect with --loss linear"),
    ],
)
def test_a_configuration_validates_itself(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        PamaConfig.model_validate(dict(objectives=(parse_objective(LENGTH),)) | settings)
    config = PamaConfig(loss="pama", objectives=(parse_objective(LENGTH),), options={"soft": "4"})
    assert config.options == {"soft": 4.0}

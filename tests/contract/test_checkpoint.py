"""What a run resumes from: refused when it cannot be, mended when a save was interrupted, never changed otherwise."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress

import pytest
import torch

from pama_plugin.batch.state import RunState
from pama_plugin.errors import ConfigError
from pama_plugin.host.preflight.resume import STATE, adapters_of, describe_saved, prepare_resume
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract

TWO = ("helpful=py:{folder}/a.py:score", "length=builtin:length")


@pytest.fixture
def configure(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(f"def score(queries, prompts, labels):\n    return []  # {name}\n")

    def config(*objectives: str):
        filled = [objective.format(folder=tmp_path) for objective in objectives]
        return load_config("pama", filled, None, None, None, default_level="token")

    return config


@pytest.fixture
def save(tmp_path):
    """Write a checkpoint of the policy, and of the critic, as DeepSpeed lays it out."""

    def write(step: int, state: str | None, roles=("_actor", "_critic"), stage=2, ranks=1) -> None:
        for role in roles:
            folder = tmp_path / role / f"global_step{step}"
            folder.mkdir(parents=True, exist_ok=True)
            prefix = "zero_pp_rank_0_" if stage == 3 else ""
            content = {"module": {"weight": torch.ones(2)}, "global_step": step, "dp_world_size": ranks}
            if state is not None and role == "_actor":
                content[STATE] = state
            if stage == 0:
                content["optimizer"] = {"state": torch.ones(2)}
            torch.save(content, folder / f"{prefix}mp_rank_00_model_states.pt")
            for rank in range(ranks if stage else 0):
                torch.save({"optimizer": torch.ones(2)}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            (tmp_path / role / "latest").write_text(folder.name)

    return write


FULL = {
    "actor.model_name_or_path": "org/a",
    "ds.lora.rank": 0,
    "ds.lora.alpha": 16,
    "ds.lora.target_modules": "all-linear",
    "ds.load_in_4bit": False,
}
LORA = FULL | {"ds.lora.rank": 8}


def resume(
    tmp_path,
    config,
    estimator="gae",
    allow=False,
    load=True,
    universal=False,
    start=True,
    other_rule=False,
    adapters=FULL,
):
    flags = {"ckpt.load_enable": load, "ckpt.path": str(tmp_path), "algo.advantage.estimator": estimator}
    flags |= {"ds.use_universal_ckpt": universal, **adapters}
    flags.setdefault("train.agent_func_path", None)
    config, found = prepare_resume(
        argparse.Namespace(**flags), config, allow_other_objectives=allow, allow_other_rule=other_rule
    )
    if start and found is not None:
        found.point()
    return config


def state_of(config, **rewards: float) -> str:
    state = RunState.start(config)
    for name, reward in rewards.items():
        state.objectives[name].rewards.update(torch.tensor([reward]))
    return state.model_dump_json()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_same_objectives_resume_in_the_order_of_the_heads(stage, configure, save, tmp_path, capsys) -> None:
    save(3, state_of(configure(*TWO)), stage=stage)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = resume(tmp_path, configure(*reversed(TWO)))
    assert found.names == ("helpful", "length") and capsys.readouterr().out == ""
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_nothing_to_resume_from(configure, save, tmp_path) -> None:
    config = configure(*TWO)
    assert resume(tmp_path, config) is config
    save(1, "not read")
    assert resume(tmp_path, config, load=False) is config


def test_a_swapped_objective_starts_anew_and_says_so(configure, save, tmp_path, capsys) -> None:
    old, new = configure(*TWO), configure("helpful=py:{folder}/b.py:score", TWO[1])
    save(3, state_of(old, helpful=1.0, length=2.0))
    resume(tmp_path, new)
    assert re.fullmatch("PAMA: .*'helpful' .*checkpoint: its statistics start anew.*\n", capsys.readouterr().out)
    state = RunState.start(new)
    state.resume(RunState.model_validate_json(state_of(old, helpful=1.0, length=2.0)))
    assert state.objectives["helpful"].rewards.count == 0
    assert state.objectives["length"].rewards.mean == 2.0


def test_a_changed_file_is_a_swapped_objective_and_another_weight_is_none(configure, save, tmp_path, capsys) -> None:
    save(3, state_of(configure(*TWO)))
    resume(tmp_path, configure(TWO[0] + ",weight=3", TWO[1]))
    assert capsys.readouterr().out == ""
    (tmp_path / "a.py").write_text("def score(queries, prompts, labels):\n    return [1.0]\n")
    resume(tmp_path, configure(*TWO))
    assert re.fullmatch("PAMA: .*'helpful' .*checkpoint: its statistics start anew.*\n", capsys.readouterr().out)


def test_other_objectives_are_refused_unless_asked_for(configure, save, tmp_path) -> None:
    save(3, state_of(configure(*TWO)))
    three = configure(*TWO, "more=builtin:length")
    with pytest.raises(
        ConfigError, match="helpful, length, found helpful, length, more; --pama.allow_other_objectives"
    ):
        resume(tmp_path, three, estimator="reinforce")
    assert resume(tmp_path, three, estimator="reinforce", allow=True).names == ("helpful", "length", "more")
    with pytest.raises(
        ConfigError, match="--ckpt.load_enable: .*value heads.*, helpful, length, found helpful, length, more"
    ):
        resume(tmp_path, three, allow=True)
    with pytest.raises(ConfigError, match="--ckpt.load_enable: .*value heads.*, helpful, length, found helpful$"):
        resume(tmp_path, configure(TWO[0]), allow=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(loss="linear"), "found loss linear instead of pama, noon None instead of False"),
        (dict(level="sequence"), "found level sequence instead of token"),
        (dict(rescale="none"), "found rescale none instead of unit"),
        (dict(options={"soft": 4.0}), r"found options \{'soft': 4.0\} instead of \{\}"),
        (dict(inactive_below=0.5), "found inactive_below 0.5 instead of 0.05"),
        (dict(noon=True), "found noon True instead of False"),
    ],
)
def test_another_rule_is_refused_unless_asked_for(changed, message, configure, save, tmp_path, capsys) -> None:
    old = configure(*TWO)
    save(3, state_of(old))
    other = old.model_copy(update=changed)
    with pytest.raises(ConfigError, match=f"the rule must be that of .*{message}; --pama.allow_other_rule resumes"):
        resume(tmp_path, other)
    assert resume(tmp_path, other, other_rule=True).names == ("helpful", "length")
    assert re.search(
        f"resuming with another rule than that of .*{message.removeprefix('found ')}", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        (LORA, LORA | {"ds.lora.alpha": 32}, "found ds.lora.alpha 32 instead of 16"),
        (LORA, LORA | {"ds.lora.rank": 4}, "found ds.lora.rank 4 instead of 8"),
        (LORA, LORA | {"ds.lora.target_modules": ["q_proj"]}, r"target_modules \['q_proj'\] instead of all-linear"),
        (LORA, LORA | {"actor.model_name_or_path": "org/b"}, "found base org/b instead of org/a"),
        (LORA, LORA | {"ds.load_in_4bit": True}, "found ds.load_in_4bit True instead of False"),
        (LORA, FULL | {"ds.lora.alpha": 32}, "found ds.lora.rank None instead of 8"),
        (FULL, LORA, "found ds.lora.rank 8 instead of None"),
    ],
)
def test_other_adapters_are_refused(saved, now, message, configure, save, tmp_path) -> None:
    """Of these only another alpha could be loaded, and would make another policy of the weights."""
    config = configure(*TWO)
    save(3, RunState.start(config, None, adapters_of(saved)).model_dump_json())
    assert resume(tmp_path, config, adapters=saved).names == config.names
    with pytest.raises(ConfigError, match=f"the policy's adapters must be those of .*{message}"):
        resume(tmp_path, config, adapters=now)


def test_another_rule_does_not_inherit_the_memory_of_the_old_one(configure) -> None:
    saved = RunState.start(configure(*TWO))
    saved.objectives["length"].memory = {"multiplier": 3.0}
    saved.objectives["length"].rewards.update(torch.tensor([2.0]))
    kept = {"multiplier": 3.0}
    for changed, memory in (({}, kept), ({"level": "sequence"}, kept), ({"loss": "min_norm", "noon": False}, {})):
        state = RunState.start(configure(*TWO).model_copy(update=changed))
        state.resume(RunState.model_validate_json(saved.model_dump_json()))
        assert state.objectives["length"].memory == memory and state.objectives["length"].rewards.mean == 2.0


def test_an_older_checkpoint_does_not_say_its_rule(configure, save, tmp_path, capsys) -> None:
    config = configure(*TWO)
    content = json.loads(state_of(config))
    del content["rule"]
    save(3, json.dumps(content))
    resume(tmp_path, config)
    said = capsys.readouterr().out
    assert "does not say with which rule it was trained; going on with --loss pama" in said
    assert "--pama.noon --pama.rescale none (0.1.0) is what it did" in said
    for loss, former in (("linear", "--pama.rescale none"), ("gdpo", "--pama.option whiten_sum=true")):
        resume(tmp_path, config.model_copy(update={"loss": loss, "options": {}, "level": "sequence"}))
        assert f"which an older version combined otherwise: {former} is what it did" in capsys.readouterr().out


def test_what_json_makes_of_the_settings_is_not_another_rule(configure, save, tmp_path) -> None:
    """Tuples become lists, and Noon by default is Noon by name."""
    config = configure(*TWO).model_copy(update={"options": {"bounds": (1.0, 3.0)}})
    save(3, state_of(config))
    resume(tmp_path, config)
    resume(tmp_path, config.model_copy(update={"noon": False}))


def test_a_stock_checkpoint_resumes_with_a_critic_of_one_head(configure, save, tmp_path, capsys) -> None:
    save(3, None)
    assert resume(tmp_path, configure(TWO[0])).names == ("helpful",)
    assert "is a stock checkpoint" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--ckpt.load_enable: .*value head.*helpful, length, found one"):
        resume(tmp_path, configure(*TWO))


def pointers(tmp_path) -> list[str]:
    return [(tmp_path / role / "latest").read_text() for role in ("_actor", "_critic")]


def files(tmp_path) -> dict:
    return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# What a SIGKILL leaves behind: (what happened after steps 2, 3 and 5 were saved whole, the step to resume from).
CUT_OFF = {
    "between the two latest": (lambda folder: (folder / "_critic/latest").write_text("global_step3"), 3),
    "while the critic wrote its optimizer": (
        lambda folder: (
            (folder / "_critic/latest").write_text("global_step3"),
            (folder / "_critic/global_step5/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(),
        ),
        3,
    ),
    "after the next step's policy was begun": (
        lambda folder: shutil.copytree(folder / "_actor/global_step5", folder / "_actor/global_step6"),
        5,
    ),
    "after both were begun, before latest": (
        lambda folder: [
            shutil.copytree(folder / role / "global_step5", folder / role / "global_step6")
            for role in ("_actor", "_critic")
        ],
        5,
    ),
    "when the latest had been deleted to make room": (
        lambda folder: [shutil.rmtree(folder / role / "global_step5") for role in ("_actor", "_critic")],
        3,
    ),
    "while an old one was being deleted": (
        lambda folder: (
            (folder / "_critic/latest").write_text("global_step3"),
            (folder / "_actor/global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink(),
        ),
        2,
    ),
}


@pytest.mark.parametrize("moment", CUT_OFF)
def test_a_save_that_was_cut_off_does_not_matter(moment, configure, save, tmp_path) -> None:
    config = configure(*TWO)
    for step in (2, 3, 5):
        save(step, state_of(config), ranks=2)
    happened, step = CUT_OFF[moment]
    happened(tmp_path)
    before = files(tmp_path)
    resume(tmp_path, config, start=False)
    assert files(tmp_path) == before, "only a start may change something"
    resume(tmp_path, config)
    assert pointers(tmp_path) == [f"global_step{step}"] * 2


def test_the_best_of_a_step_is_resumed_if_it_was_saved_last(configure, save, tmp_path) -> None:
    config = configure(*TWO)
    save(4, state_of(config))
    for role in ("_actor", "_critic"):
        shutil.copytree(tmp_path / role / "global_step4", tmp_path / role / "best_global_step4")
        (tmp_path / role / "latest").write_text("best_global_step4")
    resume(tmp_path, config)
    assert pointers(tmp_path) == ["best_global_step4"] * 2


@pytest.mark.parametrize("saved", [[], ["_actor"], ["_critic"], "begun"])
def test_a_first_save_that_was_cut_off_starts_from_the_beginning(saved, configure, save, tmp_path, capsys) -> None:
    config = configure(*TWO)
    (tmp_path / "_actor").mkdir()
    if saved == "begun":
        save(1, state_of(config), ranks=2)
        for role in ("_actor", "_critic"):
            (tmp_path / role / "latest").unlink()
            (tmp_path / role / "global_step1" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    elif saved:
        save(1, state_of(config), roles=saved)
    before = files(tmp_path)
    args = argparse.Namespace(**{"ckpt.load_enable": True, "ckpt.path": str(tmp_path), "ds.use_universal_ckpt": False})
    vars(args)["algo.advantage.estimator"] = "gae"
    assert prepare_resume(args, config, allow_other_objectives=False, allow_other_rule=False) == (config, None)
    assert not getattr(args, "ckpt.load_enable") and files(tmp_path) == before
    assert f"no save in {tmp_path} was completed; the run starts from the beginning" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "", "\n"])
@pytest.mark.parametrize("roles", [["_actor"], ["_actor", "_critic"]])
def test_without_latest_the_newest_complete_step_is_resumed(text, roles, configure, save, tmp_path) -> None:
    config = configure(*TWO)
    for step in (2, 3):
        save(step, state_of(config))
    for role in roles:
        (tmp_path / role / "latest").unlink()
        if text is not None:
            (tmp_path / role / "latest").write_text(text)
    resume(tmp_path, config)
    assert pointers(tmp_path) == ["global_step3"] * 2


def test_checkpoints_that_are_gone_or_of_no_step_are_refused(configure, save, tmp_path) -> None:
    config = configure(*TWO)
    save(3, state_of(config))
    for role in ("_actor", "_critic"):
        shutil.rmtree(tmp_path / role / "global_step3")
    with pytest.raises(ConfigError, match="--ckpt.load_enable: .*complete checkpoint of the same step, found none"):
        resume(tmp_path, config)
    (tmp_path / "_actor" / "latest").write_text("my best one")
    with pytest.raises(ConfigError, match="--ckpt.load_enable: latest .* must name a saved step, found .*my best one"):
        resume(tmp_path, config)


def test_a_universal_checkpoint_is_refused(configure, save, tmp_path) -> None:
    save(1, state_of(configure(*TWO)))
    with pytest.raises(ConfigError, match="--ds.use_universal_ckpt .*--ckpt.load_enable.*found True"):
        resume(tmp_path, configure(*TWO), universal=True)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: json.dumps(json.loads(text) | {"other": 1}), "Extra inputs"),
        (lambda text: json.dumps({"objectives": {"helpful": {"rewards": {}}}, "rating": ""}), "Field required"),
    ],
)
def test_a_state_that_cannot_be_read_is_refused(state, message, configure, save, tmp_path) -> None:
    config = configure(*TWO)
    save(3, state(state_of(config)))
    with pytest.raises(ConfigError, match=f"(?s)--ckpt.load_enable: .*state, found .*{message}"):
        resume(tmp_path, config)


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("size", [0, 100, -40])
def test_a_truncated_file_is_refused_and_nothing_is_changed(file, size, configure, save, tmp_path) -> None:
    config = configure(*TWO)
    save(2, state_of(config))
    save(3, state_of(config))
    path = tmp_path / "_critic" / "global_step3" / file
    path.write_bytes(path.read_bytes()[:size])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"--ckpt.load_enable: .*found .*{file} corrupt or truncated.*latest"):
        resume(tmp_path, config)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_damaged_file_never_gets_past(configure, save, tmp_path) -> None:
    """Whatever unpickling makes of it: the pickle is cut short, inside an archive that is whole."""
    config = configure(*TWO)
    save(3, state_of(config))
    path = tmp_path / "_actor" / "global_step3" / "mp_rank_00_model_states.pt"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    for cut in range(0, 200, 7):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data[: len(data) - cut - 1] if name.endswith("data.pkl") else data)
        with pytest.raises(ConfigError, match="--ckpt.load_enable: .*mp_rank_00_model_states.pt .*, found"):
            resume(tmp_path, config)


def test_what_a_run_that_is_ended_can_be_resumed_from(configure, save, tmp_path) -> None:
    state = state_of(configure(*TWO))
    assert describe_saved(tmp_path, with_critic=True) == f"no checkpoint was saved in {tmp_path} (--ckpt.save_steps)"
    save(3, state)
    save(4, state, roles=("_actor",))  # the save that was cut off
    assert describe_saved(tmp_path, with_critic=True).endswith(f"resumes from {tmp_path}/_actor/global_step3")
    assert describe_saved(tmp_path, with_critic=False).endswith(f"resumes from {tmp_path}/_actor/global_step4")
    (tmp_path / "_actor" / "latest").write_text("step 4")
    assert "latest in" in describe_saved(tmp_path, with_critic=False)


DRIVER = """
import sys, time
from types import SimpleNamespace
import ray
from pama_plugin.host.sigterm import end_on_sigterm

@ray.remote
class Actor:
    def wait(self):
        time.sleep(1000)

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
ckpt = SimpleNamespace(path=sys.argv[2])
end_on_sigterm(SimpleNamespace(ckpt=ckpt, algo=SimpleNamespace(advantage=SimpleNamespace(estimator="gae"))))
actor = Actor.remote()
print("waiting", flush=True)
"""
WAIT, PRINT = "ray.get(actor.wait.remote())", "while True: print('step', flush=True)"  # until the pipe is full


@pytest.mark.parametrize("meanwhile", [WAIT, PRINT])
def test_sigterm_ends_the_run_and_says_what_was_saved(meanwhile, configure, save, tmp_path) -> None:
    """With Ray's own handler the process aborts, status 134, and prints addresses of C++ functions."""
    save(3, state_of(configure(*TWO)))
    with tempfile.TemporaryDirectory(prefix="pama-") as folder:  # short: Ray keeps sockets in it
        command = [sys.executable, "-c", DRIVER + meanwhile, folder, str(tmp_path)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert any(line == "waiting\n" for line in driver.stdout)
            if meanwhile == PRINT:
                time.sleep(1)
            driver.terminate()
            with suppress(ProcessLookupError):  # a second one must not wait for the locks of the first
                time.sleep(0.2)
                driver.terminate()
            printed, _ = driver.communicate(timeout=60)
            deadline = time.monotonic() + 20
            while subprocess.run(["pgrep", "-f", folder], capture_output=True).returncode == 0:
                assert time.monotonic() < deadline, "processes of Ray outlived the driver"
                time.sleep(0.2)
        finally:
            driver.kill()
    assert driver.returncode in (143, -signal.SIGTERM), printed  # the second signal may find Ray's handler removed
    expected = f"PAMA: ended by SIGTERM; --ckpt.load_enable resumes from {tmp_path}/_actor/global_step3"
    assert expected in printed.splitlines() and "SIGTERM received at" not in printed

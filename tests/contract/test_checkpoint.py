"""What a run resumes from: refused when it cannot be, mended when a save was interrupted, never changed otherwise."""

import argparse
import json

import pytest
import torch

from pama_plugin.config import load_config
from pama_plugin.errors import ConfigError
from pama_plugin.host.checkpoint import STATE, prepare_resume
from pama_plugin.state import RunState

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

    def write(step: int, state: str | None, roles=("_actor", "_critic"), stage=2) -> None:
        for role in roles:
            folder = tmp_path / role / f"global_step{step}"
            folder.mkdir(parents=True)
            prefix = "zero_pp_rank_0_" if stage == 3 else ""
            content = {"module": {"weight": torch.ones(2)}, "global_step": step}
            if state is not None and role == "_actor":
                content[STATE] = state
            torch.save(content, folder / f"{prefix}mp_rank_00_model_states.pt")
            torch.save({"optimizer": torch.ones(2)}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
            (tmp_path / role / "latest").write_text(folder.name)

    return write


def resume(tmp_path, config, estimator="gae", allow=False, load=True):
    flags = {"ckpt.load_enable": load, "ckpt.path": str(tmp_path), "algo.advantage.estimator": estimator}
    return prepare_resume(argparse.Namespace(**flags), config, allow_other_objectives=allow)


def state_of(config, **rewards: float) -> str:
    state = RunState.start(config)
    for name, reward in rewards.items():
        state.objectives[name].rewards.update(torch.tensor([reward]))
    return state.model_dump_json()


@pytest.mark.parametrize("stage", [2, 3])
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
    said = "PAMA: 'helpful' is not what the checkpoint saw: its statistics start anew, the others' go on\n"
    assert capsys.readouterr().out == said
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
    assert "PAMA: 'helpful' is not what the checkpoint saw" in capsys.readouterr().out


def test_other_objectives_are_refused_unless_asked_for(configure, save, tmp_path) -> None:
    save(3, state_of(configure(*TWO)))
    three = configure(*TWO, "more=builtin:length")
    with pytest.raises(ConfigError, match=r"helpful, length \(--pama.allow_other_objectives resumes\), found .*more"):
        resume(tmp_path, three, estimator="reinforce")
    assert resume(tmp_path, three, estimator="reinforce", allow=True).names == ("helpful", "length", "more")
    with pytest.raises(ConfigError, match="its critic has one value head for each"):
        resume(tmp_path, three, allow=True)
    with pytest.raises(ConfigError, match="found helpful"):
        resume(tmp_path, configure(TWO[0]), allow=True)


def test_a_stock_checkpoint_resumes_with_a_critic_of_one_head(configure, save, tmp_path, capsys) -> None:
    save(3, None)
    assert resume(tmp_path, configure(TWO[0])).names == ("helpful",)
    assert "is a stock checkpoint" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="has one value head, found the objectives helpful, length"):
        resume(tmp_path, configure(*TWO))


def test_a_save_that_was_interrupted_is_mended(configure, save, tmp_path, capsys) -> None:
    """Killed between the policy's ``latest`` and the critic's, whose newest step is broken off."""
    config = configure(*TWO)
    for step in (2, 3, 11):
        save(step, state_of(config))
    (tmp_path / "_critic" / "latest").write_text("global_step3")
    broken = tmp_path / "_critic" / "global_step11" / "mp_rank_00_model_states.pt"
    broken.write_bytes(broken.read_bytes()[:-40])
    resume(tmp_path, config)
    assert "resuming from global_step3, the newest that is whole" in capsys.readouterr().out
    assert {(tmp_path / role / "latest").read_text() for role in ("_actor", "_critic")} == {"global_step3"}


def test_no_whole_checkpoint(configure, save, tmp_path) -> None:
    config = configure(*TWO)
    save(1, state_of(config), roles=["_actor"])
    with pytest.raises(ConfigError, match="must hold a whole checkpoint of the same step, found none"):
        resume(tmp_path, config)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: json.dumps(json.loads(text) | {"other": 1}), "Extra inputs"),
        (lambda text: json.dumps({"objectives": {"helpful": {"rewards": {}}}}), "Field required"),
    ],
)
def test_a_state_that_cannot_be_read_is_refused(state, message, configure, save, tmp_path) -> None:
    config = configure(*TWO)
    save(3, state(state_of(config)))
    with pytest.raises(ConfigError, match=f"must hold a checkpoint that can be read, found (.|\n)*{message}"):
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
    with pytest.raises(ConfigError, match=f"found .*{file} corrupt or truncated; to resume from an earlier step"):
        resume(tmp_path, config)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

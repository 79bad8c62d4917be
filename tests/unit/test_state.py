"""Running statistics, and the identity of scorers in checkpoints."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pama_plugin.batch.state import Moments, ObjectiveState
from pama_plugin.settings.objective import parse_objective


def test_placement_and_weight_are_not_part_of_the_identity(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = parse_objective(f"a=rm:{tmp_path},gpus=1,weight=2").identity()
    assert first == parse_objective(f"b=rm:{tmp_path},gpus=2,offload=false").identity()
    assert first != parse_objective(f"a=rm:{tmp_path},value_head_prefix=h").identity()
    (tmp_path / "model.safetensors").write_bytes(b"retrained")
    assert first != parse_objective(f"a=rm:{tmp_path}").identity()


def test_the_identity_of_an_agent_depends_on_its_file(tmp_path) -> None:
    agent, style = tmp_path / "agent.py", parse_objective("style=agent:style")
    agent.write_text("first")
    first = style.identity(str(agent))
    assert first == style.identity(str(agent)) and first.startswith("agent:style sha256:")
    agent.write_text("second")
    assert first != style.identity(str(agent))


@pytest.mark.property
@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=6), st.floats(-1e6, 1e6))
def test_moments_equal_those_of_all_batches_together_after_json(batches, offset) -> None:
    moments = Moments()
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float64) + offset)
        moments = Moments.model_validate_json(moments.model_dump_json())
    together = torch.tensor([value for batch in batches for value in batch], dtype=torch.float64) + offset
    assert moments.count == len(together)
    assert moments.mean == pytest.approx(together.mean().item(), rel=1e-9, abs=1e-6)
    if len(together) > 1:
        assert moments.std == pytest.approx(together.std().item(), rel=1e-6, abs=1e-6)
    else:
        assert moments.std != moments.std


@pytest.mark.needs_extras
def test_the_identity_does_not_contain_a_key(monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "pa55")
    assert parse_objective("a=http:http://judge/?key=${JUDGE_KEY}").identity() == "http:http://judge/?key=${JUDGE_KEY}"


def test_the_multiplier_of_an_older_checkpoint_is_read() -> None:
    saved = {"scorer": "builtin:length", "multiplier": 1.5}
    assert ObjectiveState.model_validate(saved).memory == {"integral": 1.5}
    assert ObjectiveState.model_validate(saved | {"multiplier": None}).memory == {}


@pytest.mark.parametrize("broken", ['{"mean": NaN}', '{"count": -1}', '{"squares": -1}', '{"mean": 1e999}'])
def test_statistics_that_cannot_be_are_not_resumed(broken) -> None:
    with pytest.raises(ValueError):
        Moments.model_validate_json(broken)

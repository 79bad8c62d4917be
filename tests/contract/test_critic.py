"""K value heads on the host's critic, and K columns of values through the host's buffers."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pama_plugin.errors import ConfigError
from pama_plugin.settings.objective import parse_objective

pytestmark = pytest.mark.contract

NAMES = ("helpful", "length", "polite")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A reward model of the host, saved."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward")
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(vocab_size=50, num_labels=1, pad_token_id=0, **shape)).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture
def objectives(model):
    return tuple(
        parse_objective(text) for text in (f"helpful=rm:{model}", "length=builtin:length", "polite=builtin:length")
    )


def load(model: str, **settings):
    import openrlhf.trainer.ray.vllm_engine  # noqa: F401  before deepspeed
    from openrlhf.models import get_llm_for_sequence_regression

    settings = {"param_dtype": "fp32", "attn_implementation": "eager", "value_head_prefix": "score"} | settings
    return get_llm_for_sequence_regression(model, "critic", **settings)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    attention_mask = torch.ones(2, 9, dtype=torch.long)
    attention_mask[0, 7:] = 0
    action_mask = torch.ones(2, 6, dtype=torch.long)
    action_mask[0, 4:] = 0
    sequences = torch.randint(1, 50, (2, 9), generator=generator)
    return {"input_ids": sequences, "action_mask": action_mask, "attention_mask": attention_mask}


def test_each_head_gives_what_a_critic_with_that_head_gives(model, objectives) -> None:
    from pama_plugin.host.actors.critic import add_value_heads

    inputs = batch()
    sequences = inputs.pop("input_ids")
    critic = add_value_heads(load(model), objectives, model)
    values_KBA, output = critic(sequences, return_output=True, **inputs)  # as training_step calls it
    assert values_KBA.shape == (3, 2, 6) and "last_hidden_state" in output
    for head, values_BA in zip(critic.value_heads.weight, values_KBA):
        single = load(model)
        single.score.weight.data = head[None]
        expected = single(sequences, inputs["action_mask"], inputs["attention_mask"])  # as forward does
        torch.testing.assert_close(values_BA, expected, atol=1e-6, rtol=0)
    assert torch.equal(values_KBA, critic(sequences, inputs["action_mask"], inputs["attention_mask"]))


def test_the_objective_whose_model_the_critic_starts_from_keeps_its_head(model, objectives) -> None:
    from pama_plugin.host.actors.critic import add_value_heads

    one, two = (add_value_heads(load(model), objectives, model) for _ in range(2))
    assert torch.equal(one.value_heads.weight, two.value_heads.weight), "every rank must draw the same heads"
    assert torch.equal(one.value_heads.weight[0], load(model).score.weight[0])
    assert (one.value_heads.weight[1] != one.value_heads.weight[2]).all()
    assert one.value_heads.weight[1:].std() < 2 / 33


def test_packed_sequences_give_the_same_values(model, objectives, monkeypatch) -> None:
    """One sequence, because only flash-attention keeps packed ones apart; its packing functions are pure torch."""
    import openrlhf.models.model as host
    from openrlhf.models import ring_attn_utils

    from pama_plugin.host.actors.critic import add_value_heads

    def unpad(sequences, attention_mask, _):
        indices = attention_mask.flatten().nonzero().flatten()
        positions = attention_mask.cumsum(-1) - 1
        return sequences.flatten()[indices][None], positions.flatten()[indices][None], None, 0, indices

    def pad_input(hidden, indices, batch, seqlen):  # flash_attn.bert_padding
        output = torch.zeros(batch * seqlen, *hidden.shape[1:], dtype=hidden.dtype)
        output[indices] = hidden
        return output.unflatten(0, (batch, seqlen))

    monkeypatch.setattr(host, "unpad_and_slice_tensor", unpad)
    monkeypatch.setattr(ring_attn_utils, "pad_input", pad_input)
    inputs = {key: value[:1] for key, value in batch().items()}
    sequences = inputs.pop("input_ids")
    plain = add_value_heads(load(model), objectives, model)(sequences, **inputs)
    packed = add_value_heads(load(model, packing_samples=True), objectives, model)(sequences, **inputs)
    torch.testing.assert_close(packed, plain, atol=1e-6, rtol=0)


def test_the_loss_is_the_mean_of_the_hosts_own() -> None:
    from openrlhf.models import ValueLoss

    from pama_plugin.host.actors.critic import MultiObjectiveValueLoss, flatten_objectives

    stock = ValueLoss(0.2)
    loss = MultiObjectiveValueLoss(stock)
    mask = batch()["action_mask"]
    values_KBA, old_KBA, returns_KBA = torch.randn(3, 4, 2, 6, generator=torch.Generator().manual_seed(0))
    info = {"dp_size": 2, "batch_num_tokens": torch.tensor(7.0), "global_batch_size": torch.tensor(2.0)}
    flat = [flatten_objectives(tensor.movedim(0, -1)) for tensor in (old_KBA, returns_KBA)]
    own = [stock(*triple, action_mask=mask, **info) for triple in zip(values_KBA, old_KBA, returns_KBA)]
    torch.testing.assert_close(loss(values_KBA, *flat, action_mask=mask, **info), sum(own) / 4)
    loss(values_KBA, *flat, action_mask=mask, **info)
    torch.testing.assert_close(loss.pop_losses(), torch.stack(own))

    single = loss(values_KBA[0], old_KBA[0], returns_KBA[0], action_mask=mask, **info)
    assert torch.equal(single, own[0]), "one objective is the stock loss, bit for bit"


@pytest.mark.property
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 7)), min_size=1, max_size=4), min_size=1), st.data()
)
def test_the_columns_survive_the_hosts_buffers(lengths, data) -> None:
    """Micro-batches of (prompt, response) lengths → balanced over ranks → replay buffer → training batches."""
    from openrlhf.trainer.ppo_utils.experience import (
        Experience,
        balance_experiences,
        make_experience_batch,
        remove_padding_in_sequences,
        split_experience_batch,
    )

    from pama_plugin.host.actors.critic import flatten_objectives, unflatten_objectives

    num_objectives = data.draw(st.integers(2, 5))
    balance = data.draw(st.booleans()) and sum(map(len, lengths)) > 1
    experiences, sample = [], 0
    for rows in lengths:
        total = max(prompt + response for prompt, response in rows)
        attention_mask = torch.zeros(len(rows), total, dtype=torch.long)
        values_BAK = torch.full((len(rows), total - 1 or 1, num_objectives), -1.0)
        if total < 2:
            return
        for row, (prompt, response) in enumerate(rows):
            attention_mask[row, : prompt + response] = 1
            sample += 1
            for token in range(prompt + response - 1):
                values_BAK[row, token] = sample * 1000 + token * 10 + torch.arange(num_objectives)
        experiences.append(
            Experience(
                sequences=attention_mask.clone(),
                attention_mask=attention_mask,
                action_mask=attention_mask[:, 1:],
                values=flatten_objectives(values_BAK),
                total_length=attention_mask.sum(-1).float(),
                index=list(range(len(rows))),
            )
        )
    if balance:
        args = SimpleNamespace(
            actor=SimpleNamespace(num_nodes=1, num_gpus_per_node=1),
            ds=SimpleNamespace(ring_attn_size=1, tensor_parallel_size=1),
        )
        experiences = balance_experiences(experiences, args)
    items = [item for whole in experiences for item in remove_padding_in_sequences(split_experience_batch(whole))]
    order = data.draw(st.permutations(items))
    collated = make_experience_batch(order)
    mask_BA = collated.action_mask.bool()
    found_KBA = unflatten_objectives(collated.values, torch.zeros(num_objectives, *mask_BA.shape))
    tokens_BA = torch.arange(mask_BA.shape[1]).expand_as(mask_BA)
    for index, found_BA in enumerate(found_KBA):
        sample_B = (found_BA[:, 0] / 1000).floor()
        assert torch.equal(found_BA[mask_BA], (sample_B[:, None] * 1000 + tokens_BA * 10 + index)[mask_BA])


@pytest.mark.parametrize("role", ["reward", "critic"])
def test_the_normalisation_of_a_model_is_what_its_config_says(role, model, tmp_path) -> None:
    """The host's loading leaves it uninitialised: https://github.com/OpenRLHF/OpenRLHF/pull/1343."""
    from openrlhf.models import get_llm_for_sequence_regression

    from pama_plugin.host.actors.critic import restore_normalization

    config = json.loads((Path(model) / "config.json").read_text()) | {"mean": 3.0, "std": 2.0}
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for folder, expected in ((str(tmp_path), (3.0, 2.0)), (model, (0.0, 1.0))):
        loaded = get_llm_for_sequence_regression(
            folder, role, param_dtype="fp32", attn_implementation="eager", normalize_reward=True
        )
        restore_normalization(loaded)
        assert (loaded.mean.item(), loaded.std.item()) == expected


def test_saved_heads_come_back_by_name(tmp_path, model, objectives) -> None:
    from pama_plugin.host.actors.critic import HEADS_FILE, add_value_heads, load_value_heads

    saved = torch.arange(96.0).reshape(3, 32)
    metadata = {"objectives": json.dumps(["polite", "helpful", "length"])}
    save_file({"value_heads": saved}, tmp_path / HEADS_FILE, metadata=metadata)
    assert torch.equal(load_value_heads(str(tmp_path), NAMES), saved[[1, 2, 0]])
    with pytest.raises(
        ConfigError, match=r"--critic.model_name_or_path .*\(helpful, length\), found .*polite, helpful, length in"
    ):
        load_value_heads(str(tmp_path), NAMES[:2])
    assert load_value_heads(model, NAMES) is None
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / HEADS_FILE).write_bytes((tmp_path / HEADS_FILE).read_bytes()[:50])
    with pytest.raises(ConfigError, match=f"{HEADS_FILE} .*value heads, found"):
        load_value_heads(str(tmp_path / "broken"), NAMES)
    load(model).save_pretrained(tmp_path)
    critic = add_value_heads(load(str(tmp_path)), objectives, str(tmp_path))
    assert torch.equal(critic.value_heads.weight, saved[[1, 2, 0]])
    save_file({"value_heads": saved[:, :9].clone()}, tmp_path / HEADS_FILE, metadata=metadata)
    with pytest.raises(ConfigError, match=rf"{HEADS_FILE} .*3 heads of 32, found \(3, 9\)"):
        add_value_heads(load(str(tmp_path)), objectives, str(tmp_path))

"""``pama stationarity``: gradients equal those taken response by response, and the command refuses what cannot work."""

import argparse
import json
import re

import pytest
import torch
from tiny import make_config, make_prompts, make_tokenizer

from pama_plugin.cli import main
from pama_plugin.stationarity import differentiate, sample

pytestmark = pytest.mark.needs_extras


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    LlamaForCausalLM(make_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": prompt, "label": "x"} for prompt in make_prompts(16)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "prompts.jsonl"


def load(policy):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval(), tokenizer


OPTIONS = argparse.Namespace(per_prompt=2, max_new_tokens=6, temperature=0.7, batch_size=4)


def test_gradients_equal_those_taken_response_by_response(policy) -> None:
    """Without padding, at the temperature of the responses."""
    model, tokenizer = load(policy)
    torch.manual_seed(1)
    texts = make_prompts(4)
    parts = [
        sample(model, tokenizer, texts[:2], OPTIONS),
        sample(model, tokenizer, [texts[2] + " of", texts[3]], OPTIONS),
    ]
    advantages_KB = torch.randn(2, 8, dtype=torch.float64)
    found = differentiate(model, parts, advantages_KB, OPTIONS)

    blocks = []
    for index, part in enumerate(parts):
        total_KD, tokens = torch.zeros(2, sum(p.numel() for p in model.parameters()), dtype=torch.float64), 0
        for row in range(4):
            kept = part.attention_BT[row].bool()
            sequence, length = part.sequences_BT[row][kept], int(part.response_mask_BA[row].sum())
            logits = model(sequence.unsqueeze(0)).logits[0, :-1] / OPTIONS.temperature
            log_prob = logits.log_softmax(-1).gather(1, sequence[1:].unsqueeze(1))[-length:].sum()
            gradient = torch.cat(
                [g.flatten() for g in torch.autograd.grad(log_prob, list(model.parameters()))]
            ).double()
            total_KD -= advantages_KB[:, index * 4 + row, None] * gradient
            tokens += length
        blocks.append(total_KD / tokens)
    gradients = torch.stack(blocks)
    torch.testing.assert_close(found, torch.einsum("aiw,bjw->aibj", gradients, gradients), rtol=1e-3, atol=1e-6)


def test_responses_are_sampled_without_the_policys_own_settings(policy) -> None:
    model, tokenizer = load(policy)
    model.generation_config.repetition_penalty = 1e6
    torch.manual_seed(3)
    with_penalty = sample(model, tokenizer, make_prompts(4), OPTIONS).sequences_BT
    torch.manual_seed(3)
    assert torch.equal(with_penalty, sample(load(policy)[0], tokenizer, make_prompts(4), OPTIONS).sequences_BT)


def test_responses_end_at_their_first_end_of_text(policy) -> None:
    model, tokenizer = load(policy)
    torch.manual_seed(2)
    part = sample(model, tokenizer, make_prompts(12), argparse.Namespace(**vars(OPTIONS) | dict(temperature=3.0)))
    responses_BA = part.sequences_BT[:, -part.response_mask_BA.shape[1] :]
    for tokens, mask in zip(responses_BA.tolist(), part.response_mask_BA.tolist()):
        length = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else len(tokens)
        assert mask == [True] * length + [False] * (len(tokens) - length)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["stationarity", *map(str, arguments)])
    return stopped.value.code


OBJECTIVES = ("--pama.objective", "long=builtin:length,scale=10", "--pama.objective", "varied=builtin:repetition")


def test_a_policy_is_measured(policy, prompts, tmp_path, capsys) -> None:
    out = tmp_path / "found.json"
    flags = (*OBJECTIVES, "--responses", 64, "--max_new_tokens", 8, "--out", out)
    assert run(policy, policy, "--prompts", prompts, *flags) == 0
    first, second = json.loads(out.read_text())
    assert first == second and set(first["rewards"]) == {"long", "varied"}  # the same seed
    gram = [[value for value, _ in row] for row in first["gram"]]
    assert gram[0][1] == pytest.approx(gram[1][0])
    least = first["least"]
    assert least["low"] < least["value"] < least["high"] and sum(least["coefficients"]) == pytest.approx(1)
    assert least["floor"] > 0
    said = capsys.readouterr().out
    assert "Noise floor" in said and f"numbers  {out}" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--responses", "31"], "--responses must be at least 8 × --per_prompt, 32, found 31"),
        (["--per_prompt", "1"], "--per_prompt must be at least 2, found 1"),
        (["--temperature", "0"], "--temperature must be a positive number, found 0.0"),
        (["--responses", "1000"], "must have a prompt for each 4 of 1000 responses, 250, found 16"),
        (["--out", "/nowhere/found.json"], "--out must be a file in an existing folder, found /nowhere/found.json"),
        (["--pama.objective", "a=agent:x"], "kind agent needs rollouts and cannot be scored here, found objective 'a'"),
    ],
)
def test_what_cannot_work_is_refused(flags, message, policy, prompts, tmp_path, capsys) -> None:
    assert run(policy, "--prompts", prompts, *OBJECTIVES, "--responses", 32, "--out", tmp_path / "o.json", *flags) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_a_policy_that_cannot_be_loaded_is_refused(prompts, tmp_path, capsys) -> None:
    assert run(tmp_path, "--prompts", prompts, *OBJECTIVES, "--responses", 32, "--out", tmp_path / "o.json") == 2
    assert f"cannot load the policy {tmp_path}" in capsys.readouterr().err


def test_rewards_belong_to_their_objectives_whatever_shares_a_call(tmp_path) -> None:
    from pama_plugin.score import score_rows
    from pama_plugin.settings.objective import parse_objective

    (tmp_path / "f.py").write_text("def f(queries, prompts, labels):\n    return {'a': 1.0, 'c': 3.0}\n")
    function = f"py:{tmp_path}/f.py:f,isolate=false"
    texts = (f"a={function},key=a", "b=builtin:length,unit=words", f"c={function},key=c")
    rewards = score_rows([parse_objective(text) for text in texts], [{"prompt": "x", "response": "y z"}], None)
    assert {name: outcomes[0].reward for name, outcomes in rewards.items()} == {"a": 1, "b": 2, "c": 3}
    assert list(rewards) == ["a", "b", "c"], "pama stationarity reads them in order"

"""The parts of the quickstart that need no run: its reward, and the comparison of two policies that it ends with."""

import doctest
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reward() -> None:
    assert doctest.testmod(load("rewards")) == (0, 2)


def answer(policy: str, prompt: int, coverage: float, brevity: float, response: str = "a short film") -> dict:
    messages = [{"role": "user", "content": f"sentence {prompt}"}]
    rewards = {"coverage": coverage, "brevity": brevity, "sentiment": 1.0}
    return {"policy": policy, "prompt": messages, "response": response, "rewards": rewards,
            "reference_nll": 6.0, "tokens": 3}  # fmt: skip


def test_the_comparison_of_two_policies(tmp_path, capsys) -> None:
    compare = load("compare")
    rows = []
    for policy, lift in (("start", 0.0), ("trained", 0.5)):
        for prompt in range(4):
            for sample in range(compare.PER_PROMPT):
                text = "[bold]not markup[/bold]" if policy == "trained" else f"one {prompt} two {sample} words"
                rows.append(answer(policy, prompt, lift + 0.1 * (sample % 2), -1.0 - 0.2 * (sample % 2), text))
    scored = tmp_path / "scored.jsonl"
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare.show(scored)
    shown = " ".join(capsys.readouterr().out.split())
    assert "│ coverage │ 0.05 │ 0.55 │ +0.50 ± 0.00 │ 1.00 × │" in shown
    assert "│ correlation of coverage and brevity │ -1.00 │ -1.00 │" in shown
    assert "│ start policy's nll per token │ 2.00 │ 2.00 │ 1.00 × │" in shown
    assert "│ distinct bigrams │ 0.62 │ 0.25 │ 0.40 × │" in shown
    assert "[bold]not markup[/bold]" in shown and "coverage 0.50 brevity -1.00 sentiment 1.00" in shown


def test_the_likelihood_is_of_the_response_up_to_its_end() -> None:
    compare = load("compare")
    eos = 2

    class Uniform(torch.nn.Module):
        def forward(self, input_ids, attention_mask, position_ids):
            assert attention_mask[0].tolist() == [0, 1, 1, 1, 0]
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 8)})

    sequences = torch.tensor([[eos, 5, 6, eos, eos], [4, 5, 6, 7, 7]])
    nll, tokens = compare.negative_log_likelihood(Uniform(), sequences, torch.tensor([[0, 1], [1, 1]]), eos)
    assert tokens.tolist() == [2, 3]
    assert nll.tolist() == pytest.approx([2 * 2.0794, 3 * 2.0794], abs=1e-3)

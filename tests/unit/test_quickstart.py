"""The parts of the quickstart that need no run: its reward, and the comparison of two policies that it ends with."""

import doctest
import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reward() -> None:
    rewards = load("rewards")
    assert doctest.testmod(rewards) == (0, 2)
    with pytest.raises(ValueError, match="label, found 'It is so'"):
        rewards.coverage(["Summarize. No."], ["Summarize."], ["It is so"])


def write_answers(path: Path, **changed: object) -> Path:
    """Two policies, four prompts of different levels, two responses each; by hand in the test below."""
    rows = []
    for policy, lifts, width in (("start", (0, 0, 0, 0), 0.1), ("trained", (0.3, 0.4, 0.5, 0.6), 0.05)):
        for prompt, lift in enumerate(lifts):
            for sample, sign in enumerate((-1, 1)):
                against = -1 if policy == "trained" or prompt < 2 else 1
                rewards = {
                    "coverage": 0.1 + 0.1 * prompt + lift + sign * width,
                    "brevity": -1 - prompt + sign * against * 0.2,
                    "sentiment": None if policy == "trained" and prompt == sample == 0 else 1.0,
                }
                sentence = f"Sentence {prompt}: it's here."
                rows.append(
                    {
                        "policy": policy,
                        "prompt": [{"role": "user", "content": sentence}],
                        "label": sentence,
                        "response": f"sentence {prompt} it's here!" if policy == "trained" else "[bold]no [/b]markup",
                        "ended": sample == 0,
                        "reference_nll": 6.0,
                        "tokens": 3 if policy == "start" else 4,
                        "rewards": rewards,
                    }
                    | changed
                )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_comparison_of_two_policies(tmp_path, capsys, monkeypatch) -> None:
    compare = load("compare")
    monkeypatch.setattr(compare, "PER_PROMPT", 2)
    compare.show(write_answers(tmp_path / "scored.jsonl"))
    shown = " ".join(capsys.readouterr().out.split())
    for row in (
        # differences .3, .4, .5, .6: t(.975, 3) = 3.182, s = .1291, √4 = 2
        "│ coverage │ 0.25 │ 0.70 │ +0.45 ± 0.21 │ 0.50 × │",
        "│ brevity │ -2.50 │ -2.50 │ +0.00 ± 0.00 │ 1.00 × │",
        "│ sentiment │ 1.00 │ 1.00 │ +0.00 ± 0.00 │ – │",  # no spread at the start; one reward is missing
        "│ correlation of coverage and brevity │ 0.00 │ -1.00 │",  # -.75 and -.9 with the levels of the prompts
        "│ start policy's nll per token │ 2.00 │ 1.50 │",
        "│ distinct bigrams │ 0.25 │ 0.75 │",  # 1 of 4, and 9 of 12: every text has "it's here!"
        "│ copies of the sentence │ 0.00 │ 1.00 │",
        "│ cut off after 24 tokens │ 0.50 │ 0.50 │",
    ):
        assert row in shown
    assert "[bold]no [/b]markup" in shown and "coverage 0.35 brevity -0.80 sentiment – │" in shown


def test_the_comparison_with_a_policy_that_says_nothing(tmp_path, capsys, monkeypatch) -> None:
    compare = load("compare")
    monkeypatch.setattr(compare, "PER_PROMPT", 2)
    rewards = {"coverage": 0.0, "brevity": 0.0, "sentiment": None}
    compare.show(write_answers(tmp_path / "scored.jsonl", response="", rewards=rewards))
    shown = " ".join(capsys.readouterr().out.split())
    for row in ("│ coverage │ 0.00 │ 0.00 │ +0.00 ± 0.00 │ – │", "│ sentiment │ – │ – │ – │ – │"):
        assert row in shown
    assert "│ correlation of coverage and brevity │ – │ – │" in shown and "(empty)" in shown


class Counting(torch.nn.Module):
    """Predicts after token t at position p that p + t + 1 follows, with a logit of 3 above seven others."""

    def forward(self, input_ids, attention_mask, position_ids):
        assert attention_mask[0].tolist() == [0, 1, 1, 1, 0]
        expected = (input_ids + position_ids + 1) % 8
        return SimpleNamespace(logits=3.0 * torch.nn.functional.one_hot(expected, 8))


def test_the_likelihood_is_of_the_response_up_to_its_end() -> None:
    eos = 2
    # After 5 at position 0 follows 6, after 6 at position 1 follows 0 and not 2. After 4, 5 follows, then 7, then 2.
    sequences = torch.tensor([[eos, 5, 6, eos, eos], [4, 5, 7, 2, 6]])
    prompt_mask = torch.tensor([[0, 1], [1, 1]])
    nll, tokens = load("compare").negative_log_likelihood(Counting(), sequences, prompt_mask, eos)
    likely, unlikely = 0.2988, 3.2988  # log(7 + e³) - 3 and log(7 + e³)
    assert tokens.tolist() == [2, 2]
    assert nll.tolist() == pytest.approx([likely + unlikely, 2 * likely], abs=1e-3)

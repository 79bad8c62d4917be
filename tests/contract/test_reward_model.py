"""A value-head reward model of OpenRLHF in this process, for ``pama score``."""

import json

import pytest
import torch
from tiny import make_config, make_tokenizer
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaForSequenceClassification

from pama_plugin.cli import main

pytestmark = pytest.mark.contract


def test_each_response_has_the_reward_that_it_has_alone_and_no_other_waits_for_a_long_one(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    lengths = [3, 400, 1, 2_000, 12, *range(2, 20)]
    texts = [" ".join(["good", "film"] * length)[: 5 * length] for length in lengths]

    def score(*responses: str) -> list[float | None]:
        rows = [json.dumps({"prompt": "the film", "response": response}) + "\n" for response in responses]
        (tmp_path / "rows.jsonl").write_text("".join(rows))
        with pytest.raises(SystemExit):
            main(["score", str(tmp_path / "rows.jsonl"), "--pama.objective", f"r=rm:{tmp_path / 'rm'}"])
        written = (tmp_path / "rows.scored.jsonl").read_text().splitlines()
        return [json.loads(line)["rewards"]["r"] for line in written]

    rewards = score(*texts)
    assert rewards[:5] == pytest.approx([score(text)[0] for text in texts[:5]], abs=1e-5)
    assert len({round(reward, 6) for reward in rewards}) > 10


def test_a_response_that_the_model_cannot_read_concerns_no_other(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=32, n_layer=1, n_head=2, num_labels=1, pad_token_id=0
    )
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    rows = [json.dumps({"prompt": "a", "response": "film " * count}) + "\n" for count in (2, 40, 3)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    with pytest.raises(SystemExit):
        main(["score", str(tmp_path / "rows.jsonl"), "--pama.objective", f"r=rm:{tmp_path / 'rm'}"])
    written = [json.loads(line)["rewards"]["r"] for line in (tmp_path / "rows.scored.jsonl").read_text().splitlines()]
    assert [reward is None for reward in written] == [False, True, False]
    assert "IndexError" in capsys.readouterr().out

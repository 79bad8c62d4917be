"""Train the two reward models of the replication on human ratings, and evaluate them and the judge.

    python examples/paper/prepare.py DATA_FOLDER OUTPUT_FOLDER

DATA_FOLDER is that of tiny.sh, with the rated film reviews; a rating is the mean of twenty people, -4 … 4. Two
small BERTs with a tokenizer for lower-case text are trained: ``sentiment`` predicts the rating x, ``matter_of_fact``
-x²/2. A very positive review is not matter-of-fact, and the two rewards have a Pareto front: their sum with weights a
and b is largest at x = a/b. Nine tenths of the reviews train the models. One tenth measures their agreement with
people, and that of the judge of sentiment: VADER, a lexicon with rules, which no run trains on.
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
from corpora import Rated, read_corpora  # noqa: E402  of the quickstart

EPOCHS, BATCH, LEARNING_RATE, LENGTH = 4, 64, 1e-3, 64
TARGETS = {"sentiment": lambda rating: rating, "matter_of_fact": lambda rating: -(rating**2) / 2}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(texts, vocab_size=6000, min_frequency=2, show_progress=False)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, model_max_length=LENGTH, **special)


def train_model(name: str, tokenizer: PreTrainedTokenizerFast, pieces: list[Rated]) -> BertForSequenceClassification:
    set_seed(0)
    pieces = [(piece.text, TARGETS[name](piece.rating)) for piece in pieces]
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
    with tqdm(total=steps, desc=name, unit="step") as bar:
        for _ in range(EPOCHS):
            random.shuffle(pieces)
            for start in range(0, len(pieces) // BATCH * BATCH, BATCH):
                texts, targets = zip(*pieces[start : start + BATCH])
                loss = (predict(model, tokenizer, texts) - torch.tensor(targets)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model.eval()


def predict(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...]
) -> torch.Tensor:
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    return model(**batch).logits.squeeze(-1)


@torch.no_grad()
def main(data: Path, out: Path) -> None:
    reviews = read_corpora(data)["film"]
    random.Random(0).shuffle(reviews)
    held_out, training = reviews[: len(reviews) // 10], reviews[len(reviews) // 10 :]
    # Also parts of sentences, because responses have no beginning.
    pieces = [Rated(review.rating, " ".join(words[start:])) for review in training if (words := review.text.split())
              for start in (0, len(words) // 3)]  # fmt: skip
    tokenizer = train_tokenizer([piece.text for piece in pieces])
    texts, ratings = tuple(review.text for review in held_out), [review.rating for review in held_out]
    judge = SentimentIntensityAnalyzer()
    vader = [judge.polarity_scores(text)["compound"] for text in texts]
    quality = {
        "held-out reviews": len(texts),
        "correlation of VADER with people": round(pearsonr(vader, ratings)[0], 3),
    }
    for name, target in TARGETS.items():
        with torch.enable_grad():
            model = train_model(name, tokenizer, pieces)
        batches = [predict(model, tokenizer, texts[at : at + 256]) for at in range(0, len(texts), 256)]
        predicted = torch.cat(batches).tolist()
        targets = [target(rating) for rating in ratings]
        quality[f"correlation of {name} with people"] = round(pearsonr(predicted, targets)[0], 3)
        quality[f"correlation of {name} with VADER"] = round(pearsonr(predicted, vader)[0], 3)
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    (out / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    print(*(f"{key}: {value}" for key, value in quality.items()), sep="\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))

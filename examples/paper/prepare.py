"""Train the sentiment model of the small policy's runs on human ratings, and evaluate it and the judge.

    python examples/paper/prepare.py DATA_FOLDER OUTPUT_FOLDER

DATA_FOLDER is that of tiny.sh, with the rated film reviews; a rating is the mean of twenty people, -4 … 4. A small BERT
with a tokenizer for lower-case text is trained to predict the rating: nine tenths of the reviews train it, one tenth
measures its agreement with people, and that of the judge: VADER, a lexicon with rules, which no run trains on.
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


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(texts, vocab_size=6000, min_frequency=2, show_progress=False)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, model_max_length=LENGTH, **special)


def train_model(tokenizer: PreTrainedTokenizerFast, pieces: list[Rated]) -> BertForSequenceClassification:
    set_seed(0)
    pieces = list(pieces)
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
    with tqdm(total=steps, desc="sentiment", unit="step") as bar:
        for _ in range(EPOCHS):
            random.shuffle(pieces)
            for start in range(0, len(pieces) // BATCH * BATCH, BATCH):
                targets, texts = zip(*pieces[start : start + BATCH])
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
    pieces = [Rated(review.rating, " ".join(parts[start:])) for review in training if (parts := review.text.split())
              for start in (0, len(parts) // 3)]  # fmt: skip
    tokenizer = train_tokenizer([piece.text for piece in pieces])
    texts, ratings = tuple(review.text for review in held_out), [review.rating for review in held_out]
    judge = SentimentIntensityAnalyzer()
    vader = [judge.polarity_scores(text)["compound"] for text in texts]
    with torch.enable_grad():
        model = train_model(tokenizer, pieces)
    batches = [predict(model, tokenizer, texts[at : at + 256]) for at in range(0, len(texts), 256)]
    predicted = torch.cat(batches).tolist()
    quality = {
        "held-out reviews": len(texts),
        "correlation of VADER with people": round(pearsonr(vader, ratings)[0], 3),
        "correlation of sentiment with people": round(pearsonr(predicted, ratings)[0], 3),
        "correlation of sentiment with VADER": round(pearsonr(predicted, vader)[0], 3),
    }
    model.save_pretrained(out / "sentiment")
    tokenizer.save_pretrained(out / "sentiment")
    (out / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    print(*(f"{key}: {value}" for key, value in quality.items()), sep="\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))

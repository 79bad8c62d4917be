"""Make the data of the tiny policy from rated film reviews: prompts, SFT texts, preference pairs, tokenizer, weights.

    python examples/paper/tiny.py OUTPUT_FOLDER

OUTPUT_FOLDER keeps the downloaded corpus, too.
"""

import json
import random
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from corpora import read_corpora  # noqa: E402  of the quickstart

EOS, PAD = "<eos>", "<pad>"
VOCABULARY = 8192  # most words are one token, so that few words are broken
PROMPT_WORDS = 4
WORDS = range(7, 23)  # in words; short reviews let length rise, and train in minutes on two cores
LIKED, DISLIKED = 1.0, -0.5


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def split(text: str) -> tuple[str, str]:
    """The first words are the prompt; the other words, with a leading blank, are the response."""
    words = text.split()
    return " ".join(words[:PROMPT_WORDS]), " " + " ".join(words[PROMPT_WORDS:])


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def untrained_policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with 5.3 M parameters. vLLM's CPU attention supports its head size of 64."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    reviews = read_corpora(folder)["film"]
    shuffle = random.Random(0)
    set_seed(0)

    used = [review for review in reviews if len(review.text.split()) in WORDS]
    pieces = [split(review.text) for review in used]
    write_jsonl(folder / "sft.jsonl", [{"prompt": prompt, "response": rest + EOS} for prompt, rest in pieces])

    prompts = sorted({prompt for prompt, _ in pieces})
    shuffle.shuffle(prompts)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])

    liked = [review.text for review in used if review.rating > LIKED]
    disliked = [review.text for review in used if review.rating < DISLIKED]
    shuffle.shuffle(disliked)
    pairs = [{"chosen": good + EOS, "rejected": bad + EOS} for good, bad in zip(liked, disliked)]
    write_jsonl(folder / "pairs.jsonl", pairs)

    tokenizer = train_tokenizer([review.text for review in reviews])
    tokenizer.save_pretrained(folder / "untrained")
    policy = untrained_policy(tokenizer)
    policy.save_pretrained(folder / "untrained")
    print(
        f"{len(reviews)} rated reviews: {len(pieces)} texts for the policy, {len(pairs)} pairs for the reward model, "
        f"{len(prompts)} prompts; {policy.num_parameters() / 1e6:.1f} M parameters"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))

"""One classifier with five outputs as five objectives: with one model for all, and with one model each.

    python tests/benchmarks/shared.py [ROUNDS]

The classifier has the size of DistilBERT (66 M parameters, random). Both score the same 64 texts of 64 tokens, in
interleaved rounds. Memory is what a fresh process holds more after loading and scoring once than before.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from tqdm import tqdm
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

from pama_plugin.rewards.hf import HfScorer
from pama_plugin.rewards.options import HfOptions
from pama_plugin.rewards.response import Conversation

LABELS = ("safe", "polite", "helpful", "factual", "brief")
WORDS, TOKENS, TEXTS = 1000, 64, 64


def make_model(folder: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    config = DistilBertConfig(num_labels=len(LABELS), id2label=dict(enumerate(LABELS)), pad_token_id=0)
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(folder)


def load(folder: str, shared: bool) -> list[HfScorer]:
    if shared:
        return [HfScorer(folder, HfOptions(text="response"), "cpu", keys=LABELS)]
    return [HfScorer(folder, HfOptions(text="response", label=label), "cpu") for label in LABELS]


def texts() -> list[Conversation]:
    words = torch.randint(1, WORDS, (TEXTS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    return [Conversation([], " ".join(f"w{word}" for word in row)) for row in words]


def memory(folder: str, shared: bool) -> float:
    """MiB."""
    before = psutil.Process().memory_info().rss
    models = load(folder, shared)
    for model in models:
        model.score(texts()[:2])
    return (psutil.Process().memory_info().rss - before) / 2**20


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        held = {}
        for shared in (True, False):
            command = [sys.executable, __file__, folder, str(shared)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            held[shared] = json.loads(run.stdout.splitlines()[-1])
        models = {shared: load(folder, shared) for shared in (True, False)}
        conversations, seconds = texts(), {True: [], False: []}
        together = torch.tensor(models[True][0].score(conversations))
        apart = torch.stack([torch.tensor(model.score(conversations)) for model in models[False]], dim=1)
        assert torch.equal(together, apart), "both give the same rewards"
        for _ in tqdm(range(rounds), desc="rounds"):
            for shared, scorers in models.items():
                start = time.perf_counter()
                for scorer in scorers:
                    scorer.score(conversations)
                seconds[shared].append(time.perf_counter() - start)
    print(f"{len(LABELS)} objectives, {TEXTS} texts of {TOKENS} tokens, median of {rounds} rounds")
    print(f"{'':14} {'seconds':>8} {'MiB':>6}")
    for shared, name in ((True, "one model"), (False, "five models")):
        print(f"{name:14} {statistics.median(seconds[shared]):8.2f} {held[shared]:6.0f}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(memory(sys.argv[1], sys.argv[2] == "True")))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)

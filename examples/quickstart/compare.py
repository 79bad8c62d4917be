"""What the start policy and the trained policy answer to prompts that were not trained on.

    python examples/quickstart/compare.py sample START TRAINED PROMPTS.jsonl ANSWERS.jsonl
    pama score ANSWERS.jsonl --pama.objective …
    python examples/quickstart/compare.py show ANSWERS.scored.jsonl

``sample`` draws responses of both at temperature 1, as training does, with the start policy's negative log-likelihood
of each: high if a text is no language any more. ``show`` prints some of the answers side by side, and a table.
"""

import json
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import StatisticsError, correlation, fmean, pstdev
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging

from pama_plugin.runs.report.pareto import interval

PROMPTS, PER_PROMPT = 16, 4  # a minute of sampling
NEW_TOKENS = 24  # as in training
SHOWN = 4  # prompts
POLICIES = ("start", "trained")
Row = dict[str, Any]

logging.disable_progress_bar()  # of weights, which load in a second


@torch.no_grad()
def sample(start: Path, trained: Path, prompts: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    reference = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()[:PROMPTS]]
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True) for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    prompt_mask = batch.attention_mask.repeat_interleave(PER_PROMPT, dim=0)
    answers: list[Row] = []
    for policy in tqdm(POLICIES, desc="responses", unit="policy"):
        set_seed(0)
        model = load(trained) if policy == "trained" else reference
        sequences = model.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=NEW_TOKENS,
            num_return_sequences=PER_PROMPT,
        )
        responses = sequences[:, prompt_mask.shape[1] :]
        nll, tokens = negative_log_likelihood(reference, sequences, prompt_mask, tokenizer.eos_token_id)
        answers += [
            {
                "policy": policy,
                "prompt": rows[index // PER_PROMPT]["messages"],
                "label": rows[index // PER_PROMPT]["label"],
                "response": text,
                "ended": bool((responses[index] == tokenizer.eos_token_id).any()),
                "reference_nll": float(nll[index]),
                "tokens": int(tokens[index]),
            }
            for index, text in enumerate(tokenizer.batch_decode(responses, skip_special_tokens=True))
        ]
    out.write_text("".join(json.dumps(answer) + "\n" for answer in answers))


def load(folder: Path) -> Any:
    """A policy; adapters, which training with --ds.lora.rank saves, with the base that they name."""
    kind = AutoPeftModelForCausalLM if (folder / "adapter_config.json").exists() else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32)


def negative_log_likelihood(
    model: PreTrainedModel, sequences: torch.Tensor, prompt_mask: torch.Tensor, eos: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of −log π over the tokens of each response with its end of text, and the number of these tokens."""
    responses = sequences[:, prompt_mask.shape[1] :]
    ends = (responses == eos).long()
    mask = ends.cumsum(1) - ends == 0  # up to the first end of text; what follows is padding
    attention_mask = torch.cat([prompt_mask, mask], dim=1)
    positions = attention_mask.cumsum(1).sub(1).clamp(min=0)
    nll = torch.empty(responses.shape)
    for rows in torch.arange(len(sequences)).split(PER_PROMPT):
        output = model(input_ids=sequences[rows], attention_mask=attention_mask[rows], position_ids=positions[rows])
        logits = output.logits[:, prompt_mask.shape[1] - 1 : -1].transpose(1, 2)
        nll[rows] = torch.nn.functional.cross_entropy(logits, responses[rows], reduction="none")
    return (nll * mask).sum(1), mask.sum(1)


def show(scored: Path) -> None:
    rows = [json.loads(line) for line in scored.read_text().splitlines()]
    names = list(rows[0]["rewards"])
    answers = {policy: [row for row in rows if row["policy"] == policy] for policy in POLICIES}
    prompts = len(rows) // len(POLICIES) // PER_PROMPT
    console = Console(width=None if sys.stdout.isatty() else 120)

    for index in range(0, SHOWN * PER_PROMPT, PER_PROMPT):
        table = Table(title=Text(rows[index]["label"], style="bold"), expand=True)
        pair = [answers[policy][index] for policy in POLICIES]
        for policy in POLICIES:
            table.add_column(f"{policy} policy", ratio=1)
        table.add_row(*(Text(answer["response"].strip() or "(empty)") for answer in pair))
        scores = ("  ".join(f"{name} {number(answer['rewards'][name])}" for name in names) for answer in pair)
        table.add_row(*(Text(line, style="dim") for line in scores))
        console.print(table)

    table = Table(
        "",
        *(f"{policy} policy" for policy in POLICIES),
        "difference",
        "spread",
        title=f"{PER_PROMPT} responses to each of {prompts} prompts that were not trained on",
        caption="Difference: mean over the prompts, ± half of the 95 % interval. Spread: standard deviation within the "
        "responses to a prompt, trained policy / start policy.",
    )
    for name in names:
        start, trained = (by_prompt(answers[policy], name) for policy in POLICIES)
        both = [(before, after) for before, after in zip(start, trained) if before and after]
        means = [mean([fmean(values) for values in groups if values]) for groups in (start, trained)]
        spreads = [mean([pstdev(values) for values in groups if values]) for groups in (start, trained)]
        difference = interval([fmean(after) - fmean(before) for before, after in both])
        change = f"{difference.mean:+.2f} ± {difference.half:.2f}" if both else "–"
        ratio = f"{spreads[1] / spreads[0]:.2f} ×" if spreads[0] and spreads[1] is not None else "–"
        table.add_row(name, *map(number, means), change, ratio)
    for label, measure in MEASURES.items():
        table.add_row(label, *(number(measure(answers[policy])) for policy in POLICIES))
    console.print(table)


def number(value: float | None) -> str:
    """``–`` for what is not defined, such as the mean of rewards that are all missing."""
    return "–" if value is None else f"{value:.2f}"


def mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def by_prompt(answers: Sequence[Row], name: str) -> list[list[float]]:
    """For each prompt, the rewards of the responses that have one."""
    groups = (answers[start : start + PER_PROMPT] for start in range(0, len(answers), PER_PROMPT))
    return [[reward for row in group if (reward := row["rewards"][name]) is not None] for group in groups]


def conflict(answers: Sequence[Row]) -> float | None:
    """The correlation of coverage and brevity within a prompt: of their differences from the prompt's means."""
    centred = []
    for name in ("coverage", "brevity"):
        groups = by_prompt(answers, name)
        centred.append([value - fmean(group) for group in groups for value in group])
    try:
        return correlation(*centred)
    except StatisticsError:  # all responses to a prompt have the same reward
        return None


def nll_per_token(answers: Sequence[Row]) -> float:
    """What the start policy thinks of the texts: its mean negative log-likelihood per token, high if they are odd."""
    return sum(row["reference_nll"] for row in answers) / sum(row["tokens"] for row in answers)


def distinct_bigrams(answers: Sequence[Row]) -> float | None:
    """Distinct / all pairs of successive words in a response to each prompt: low if texts repeat themselves or others.

    Mean over the responses to a prompt, because these have the words of their sentence in common.
    """
    shares = []
    for sample in range(PER_PROMPT):
        texts = [row["response"].lower().split() for row in answers[sample::PER_PROMPT]]
        if bigrams := [pair for words in texts for pair in pairwise(words)]:
            shares.append(len(set(bigrams)) / len(bigrams))
    return mean(shares)


def copies(answers: Sequence[Row]) -> float:
    """The share of responses that have exactly the words of the sentence."""
    return fmean(words(row["response"]) == words(row["label"]) for row in answers)


def words(text: str) -> list[str]:
    letters = "".join(letter if letter.isalnum() or letter.isspace() else " " for letter in text.lower())
    return letters.split()


def cut_off(answers: Sequence[Row]) -> float:
    """The share of responses that the limit of new tokens ended."""
    return fmean(not row["ended"] for row in answers)


MEASURES: dict[str, Callable[[Sequence[Row]], float | None]] = {
    "correlation of coverage and brevity": conflict,
    "start policy's nll per token": nll_per_token,
    "distinct bigrams": distinct_bigrams,
    "copies of the sentence": copies,
    f"cut off after {NEW_TOKENS} tokens": cut_off,
}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["sample", start, trained, prompts, out]:
            sample(Path(start), Path(trained), Path(prompts), Path(out))
        case ["show", scored]:
            show(Path(scored))
        case _:
            raise SystemExit(__doc__)

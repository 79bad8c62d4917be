"""What the start policy and the trained policy answer to held-out prompts.

    python examples/quickstart/compare.py sample START TRAINED PROMPTS.jsonl ANSWERS.jsonl
    pama score ANSWERS.jsonl --pama.objective …
    python examples/quickstart/compare.py show ANSWERS.scored.jsonl

``sample`` draws responses of both at temperature 1, as training does, with the start policy's negative log-likelihood
of each: high if a text is no language any more. ``show`` prints a table and some of the answers side by side.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import correlation, fmean, pstdev, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging

PROMPTS, PER_PROMPT, NEW_TOKENS = 16, 4, 24
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
    answers: list[Row] = []
    for policy, folder in tqdm(dict(zip(POLICIES, (start, trained))).items(), desc="responses", unit="policy"):
        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        sequences = model.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=NEW_TOKENS,
            num_return_sequences=PER_PROMPT,
        )
        prompt_mask = batch.attention_mask.repeat_interleave(PER_PROMPT, dim=0)
        responses = sequences[:, prompt_mask.shape[1] :]
        nll, tokens = negative_log_likelihood(reference, sequences, prompt_mask, tokenizer.eos_token_id)
        answers += [
            {
                "policy": policy,
                "prompt": rows[index // PER_PROMPT]["messages"],
                "label": rows[index // PER_PROMPT]["label"],
                "response": text,
                "reference_nll": float(nll[index]),
                "tokens": int(tokens[index]),
            }
            for index, text in enumerate(tokenizer.batch_decode(responses, skip_special_tokens=True))
        ]
    out.write_text("".join(json.dumps(answer) + "\n" for answer in answers))


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
    console = Console(width=120 if not sys.stdout.isatty() else None)

    for index in range(SHOWN):
        prompt = rows[index * PER_PROMPT]["prompt"]
        table = Table(title=Text(prompt[-1]["content"], style="bold"), expand=True)
        for policy in POLICIES:
            table.add_column(f"{policy} policy", ratio=1)
        pair = [answers[policy][index * PER_PROMPT] for policy in POLICIES]
        table.add_row(*(Text(answer["response"].strip() or "(empty)") for answer in pair))
        table.add_row(*(Text(rewards_of(answer, names), style="dim") for answer in pair))
        console.print(table)

    columns = ("", *(f"{policy} policy" for policy in POLICIES), "difference", "spread")
    table = Table(*columns, title=f"{PER_PROMPT} responses to each of {len(rows) // 2 // PER_PROMPT} held-out prompts")
    for name in names:
        values = {policy: [row["rewards"][name] for row in answers[policy]] for policy in POLICIES}
        start, trained = (by_prompt(values[policy], fmean) for policy in POLICIES)
        differences = [after - before for before, after in zip(start, trained)]
        error = 2 * stdev(differences) / math.sqrt(len(differences))
        table.add_row(
            name,
            f"{fmean(start):.2f}",
            f"{fmean(trained):.2f}",
            f"{fmean(differences):+.2f} ± {error:.2f}",
            ratio(pstdev(values["trained"]), pstdev(values["start"])),
        )
    for label, measure in MEASURES.items():
        start, trained = (measure(answers[policy]) for policy in POLICIES)
        table.add_row(label, f"{start:.2f}", f"{trained:.2f}", ratio(trained, start), "")
    console.print(table)


def ratio(trained: float, start: float) -> str:
    return f"{trained / start:.2f} ×" if start > 0 else ""


def by_prompt(values: Sequence[float], measure: Callable[[Sequence[float]], float]) -> list[float]:
    return [measure(values[start : start + PER_PROMPT]) for start in range(0, len(values), PER_PROMPT)]


def rewards_of(answer: Row, names: Sequence[str]) -> str:
    return "  ".join(f"{name} {answer['rewards'][name]:.2f}" for name in names)


def conflict(answers: Sequence[Row]) -> float:
    """The correlation of coverage and brevity within a prompt: of their differences from the prompt's means."""
    centred = []
    for name in ("coverage", "brevity"):
        values = [row["rewards"][name] for row in answers]
        means = by_prompt(values, fmean)
        centred.append([value - means[index // PER_PROMPT] for index, value in enumerate(values)])
    return correlation(*centred)


def nll_per_token(answers: Sequence[Row]) -> float:
    """What the start policy thinks of the texts: its mean negative log-likelihood per token, high if they are odd."""
    return sum(row["reference_nll"] for row in answers) / sum(row["tokens"] for row in answers)


def distinct_bigrams(answers: Sequence[Row]) -> float:
    """Distinct / all pairs of successive words in a response to each prompt: low if texts repeat themselves or others.

    Mean over the responses to a prompt, because these have the words of their sentence in common.
    """
    shares = []
    for sample in range(PER_PROMPT):
        texts = [row["response"].lower().split() for row in answers[sample::PER_PROMPT]]
        bigrams = [pair for words in texts for pair in pairwise(words)]
        shares.append(len(set(bigrams)) / len(bigrams))
    return fmean(shares)


MEASURES = {
    "correlation of coverage and brevity": conflict,
    "start policy's nll per token": nll_per_token,
    "distinct bigrams": distinct_bigrams,
}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["sample", start, trained, prompts, out]:
            sample(Path(start), Path(trained), Path(prompts), Path(out))
        case ["show", scored]:
            show(Path(scored))
        case _:
            raise SystemExit(__doc__)

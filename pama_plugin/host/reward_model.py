"""Runs a value-head reward model of OpenRLHF in this process, for ``pama score``."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from openrlhf.models import get_llm_for_sequence_regression

from pama_plugin.host.preflight.weights import check_code, check_value_head
from pama_plugin.rewards import Response
from pama_plugin.settings.objective import Objective

BATCH = 8  # responses
TOKENS = 8192  # with padding, for all responses of a batch, unless it is a single one


@torch.no_grad()
def score_responses(
    objective: Objective, responses: list[Response], tokenizer: Any, advance: Callable[[int], Any]
) -> list[float | str]:
    """Return the rewards of the policy's tokens, as in training without --reward.normalize_enable.

    A response that has more tokens than the model has positions, which no run would make, gets the reason instead.
    """
    flag, options = f"--pama.objective {objective.name}", objective.settings
    check_code(flag, objective.location, trusted=options.trust_remote_code)
    check_value_head(flag, objective.location, options.value_head_prefix)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = get_llm_for_sequence_regression(
        objective.location,
        "reward",
        param_dtype="bf16" if device == "cuda" else "fp32",
        attn_implementation="sdpa",
        value_head_prefix=options.value_head_prefix or "score",
    )
    model.to(device).eval()
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    rows = [torch.tensor(tokenizer(each.query, add_special_tokens=False)["input_ids"]) for each in responses]
    rewards: list[float | str] = [f"{len(row)} tokens, more than the {limit} positions of the model" for row in rows]
    readable = [index for index, row in enumerate(rows) if len(row) <= limit]
    advance(len(rows) - len(readable))
    for batch in _batches(readable, rows):
        part = [rows[index] for index in batch]
        sequences = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)  # masked, so any token will do
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
        scored = model(sequences.to(device), mask.to(device), pad_sequence=True).float().tolist()
        for index, reward in zip(batch, scored):
            rewards[index] = reward
        advance(len(batch))
    return rewards


def _batches(indices: list[int], rows: list[torch.Tensor]) -> Iterator[list[int]]:
    """Divide rows of similar length into batches, the longest last so that others do not wait for them."""
    batch: list[int] = []
    for index in sorted(indices, key=lambda index: len(rows[index])):
        if batch and (len(batch) == BATCH or (len(batch) + 1) * len(rows[index]) > TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch

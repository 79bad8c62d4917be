"""Runs a value-head reward model of OpenRLHF in this process, for ``pama score``."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from openrlhf.models import get_llm_for_sequence_regression

from pama_plugin.host.preflight.weights import check_code, check_value_head
from pama_plugin.rewards import Response
from pama_plugin.rewards.response import score_apart
from pama_plugin.settings.objective import Objective

BATCH = 8  # responses
TOKENS = 8192  # with padding, for all responses of a batch, unless it is a single one


@torch.no_grad()
def score_responses(
    objective: Objective, responses: list[Response], tokenizer: Any, advance: Callable[[int], Any]
) -> list[float | str]:
    """Return the rewards of the policy's tokens, as in training without --reward.normalize_enable.

    A response that the model cannot read, such as one with more tokens than it has positions, gets the reason instead.
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

    def score(rows: Sequence[torch.Tensor]) -> list[float]:
        sequences = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # masked, so any token will do
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        rewards: list[float] = model(sequences.to(device), mask.to(device), pad_sequence=True).float().tolist()
        return rewards

    rows = [torch.tensor(tokenizer(each.query, add_special_tokens=False)["input_ids"]) for each in responses]
    rewards: dict[int, float | str] = {}
    for batch in _batches([len(row) for row in rows]):
        rewards |= zip(batch, score_apart(score, [rows[index] for index in batch]))
        advance(len(batch))
    return [rewards[index] for index in range(len(rows))]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Divide rows of these lengths into batches of similar ones, the longest first: a lack of memory shows at once.

    >>> list(_batches([1, 9000, 3000, 3000, 2]))
    [[1], [2, 3], [4, 0]]
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) == BATCH or (len(batch) + 1) * lengths[batch[0]] > TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch

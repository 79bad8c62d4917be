"""Runs a value-head reward model of OpenRLHF in this process, for ``pama score``."""

from collections.abc import Callable
from typing import Any

import torch
from openrlhf.models import get_llm_for_sequence_regression

from pama_plugin.host.preflight.weights import check_code, check_value_head
from pama_plugin.rewards import Response
from pama_plugin.settings.objective import Objective

BATCH = 8


@torch.no_grad()
def score_responses(
    objective: Objective, responses: list[Response], tokenizer: Any, advance: Callable[[int], Any]
) -> list[float]:
    """Return the rewards of the policy's tokens, as in training without --reward.normalize_enable."""
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
    rewards: list[float] = []
    for start in range(0, len(responses), BATCH):
        part = responses[start : start + BATCH]
        rows = [torch.tensor(tokenizer(each.query, add_special_tokens=False)["input_ids"]) for each in part]
        sequences = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # masked, so any token will do
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        rewards += model(sequences.to(device), mask.to(device), pad_sequence=True).float().tolist()
        advance(len(part))
    return rewards

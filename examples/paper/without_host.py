"""Stage C: the summary task on a GPU, with many seeds, without OpenRLHF.

    python examples/paper/without_host.py POLICY PROMPTS.jsonl OUT_FOLDER --arms linear pama --seeds 11 12 --jobs 8

The policy, prompts, rewards, rules and settings are those of Stage B. The differences: transformers samples instead of
vLLM, and the update is a few lines of PPO instead of OpenRLHF's actor.
Each run writes OUT_FOLDER/ARM-seedN.json; runs that are there are kept. With --keep STEP… the policy is saved there.
"""

import argparse
import json
import multiprocessing
import sys
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pama_plugin import aggregate
from pama_plugin.aggregation import get_rule
from pama_plugin.stationarity import Samples, sample

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from rewards import coverage  # noqa: E402  of the quickstart

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "min_norm": ("min_norm", {}),
    "pama": ("pama", {"level": "sequence"}),
    "pama-paper": ("pama", {"noon": True}),
    "gdpo": ("gdpo", {}),
    "pareto_rank": ("pareto_rank", {}),
    "morlhf": ("morlhf", {}),
}
PROMPTS, PER_PROMPT, NEW_TOKENS = 8, 4, 24
MINI_BATCH, WARMUP, KL, CLIP = 16, 3, 0.02, 0.2
SAMPLING = Namespace(temperature=1.0, max_new_tokens=NEW_TOKENS, per_prompt=PER_PROMPT)


def score(responses: list[str], labels: list[str]) -> Tensor:
    """(2, B) coverage and brevity, as in Stage B."""
    brevity = [-len(response) / 60 for response in responses]
    return torch.tensor([coverage(responses, [""] * len(responses), labels), brevity], dtype=torch.float64)


def whiten(rewards_KB: Tensor, tokens_B: Tensor) -> Tensor:
    """As OpenRLHF's ``reinforce_baseline``: minus the mean of the prompt, then whitened over all tokens.

    >>> whiten(torch.tensor([[0.0, 0.0, 0.0, 4.0]]), torch.tensor([1, 1, 1, 1])).round(decimals=3)
    tensor([[-0.5770, -0.5770, -0.5770,  1.7320]])
    """
    rewards_KGN = rewards_KB.reshape(len(rewards_KB), -1, PER_PROMPT)
    centred_KB = (rewards_KGN - rewards_KGN.mean(-1, keepdim=True)).flatten(1)
    share_B = tokens_B / tokens_B.sum()
    centred_KB = centred_KB - (centred_KB * share_B).sum(1, keepdim=True)
    whitened_KB: Tensor = centred_KB / (centred_KB.square() * share_B).sum(1, keepdim=True).clamp(min=1e-8).sqrt()
    return whitened_KB


def combine(rule: str, options: dict[str, Any], rewards_KB: Tensor, mask_BA: Tensor) -> tuple[Tensor, dict[str, float]]:
    """(B, A) advantages, equal for all tokens of a response, and the metrics."""
    groups_B, tokens_B = torch.arange(len(mask_BA)) // PER_PROMPT, mask_BA.sum(1)
    if get_rule(rule).combines == "rewards":
        ones_B1 = torch.ones(len(mask_BA), 1)
        result = aggregate(rule, rewards_KB.unsqueeze(-1), ones_B1, groups_B=groups_B, **options)
        return whiten(result.advantages.T, tokens_B).T.expand(mask_BA.shape), result.metrics
    advantages_KBA = whiten(rewards_KB, tokens_B).unsqueeze(-1).expand(-1, *mask_BA.shape)
    context = {"rewards_KB": rewards_KB} if "rewards_KB" in get_rule(rule).parameters else {}
    result = aggregate(rule, advantages_KBA, mask_BA, groups_B=groups_B, **context, **options)
    return result.advantages, result.metrics


def log_probs(model: Any, batch: Samples, rows: Tensor | slice = slice(None)) -> Tensor:
    """(B, A) log π of the response tokens."""
    attention_BT, length = batch.attention_BT[rows], batch.response_mask_BA.shape[1]
    positions_BT = attention_BT.cumsum(1).sub(1).clamp(min=0)
    sequences_BT = batch.sequences_BT[rows]
    logits = model(
        input_ids=sequences_BT, attention_mask=attention_BT, position_ids=positions_BT, logits_to_keep=length + 1
    ).logits
    chosen_BA1 = sequences_BT[:, -length:].unsqueeze(-1)
    return logits[:, :-1].log_softmax(-1).gather(-1, chosen_BA1).squeeze(-1)


def train(policy: Path, prompts: Path, out: Path, arm: str, seed: int, lr: float, steps: int, keep: list[int]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(seed)
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    model, reference = (
        AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).to(device).eval() for _ in range(2)
    )
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    rule, options = ARMS[arm]
    series: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        asked = [rows[order[(PROMPTS * (step - 1) + index) % len(rows)]] for index in range(PROMPTS)]
        batch = sample(model, tokenizer, [row["messages"] for row in asked], SAMPLING)
        rewards_KB = score(batch.texts, [row["label"] for row in asked for _ in range(PER_PROMPT)])
        mask_BA = batch.response_mask_BA
        advantages_BA, metrics = combine(rule, options, rewards_KB, mask_BA.cpu())
        with torch.no_grad():
            old_BA, reference_BA = log_probs(model, batch), log_probs(reference, batch)
        centred_KB = rewards_KB - rewards_KB.reshape(2, -1, PER_PROMPT).mean(-1).repeat_interleave(PER_PROMPT, 1)
        series.append(
            {
                "rewards": [round(float(value), 4) for value in rewards_KB.mean(1)],
                "spread": [round(float(value), 4) for value in rewards_KB.std(1)],
                "group_correlation": round(float(torch.corrcoef(centred_KB)[0, 1]), 4),
                "conflict_rate": round(metrics.get("conflict_rate", 0.0), 4),
                "nats": round(float(((old_BA - reference_BA) * mask_BA).sum(1).mean()), 4),
                "reference_nll": round(float(-(reference_BA * mask_BA).sum() / mask_BA.sum()), 4),
                "tokens": round(float(mask_BA.sum(1).float().mean()), 2),
                "texts": [[row["label"], batch.texts[PER_PROMPT * index]] for index, row in enumerate(asked[:2])],
            }
        )
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / WARMUP)
        advantages_BA = advantages_BA.to(device, torch.float32)
        for part in torch.randperm(len(mask_BA)).split(MINI_BATCH):
            rows_B = part.to(device)
            new_BA, kept_BA = log_probs(model, batch, rows_B), mask_BA[rows_B]
            ratio_BA = (new_BA - old_BA[rows_B]).exp()
            own_BA = advantages_BA[rows_B]
            surrogate_BA = torch.minimum(ratio_BA * own_BA, ratio_BA.clamp(1 - CLIP, 1 + CLIP) * own_BA)
            kl_BA = (new_BA - reference_BA[rows_B]).square().div(2).clamp(max=10)  # as OpenRLHF
            loss = ((KL * kl_BA - surrogate_BA) * kept_BA).sum() / kept_BA.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if step in keep:
            model.save_pretrained(out / f"{arm}-seed{seed}-step{step}")
            tokenizer.save_pretrained(out / f"{arm}-seed{seed}-step{step}")
    file = out / f"{arm}-seed{seed}.json"
    file.with_suffix(".partial").write_text(json.dumps({"arm": arm, "seed": seed, "lr": lr, "steps": series}) + "\n")
    file.with_suffix(".partial").replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("policy", "prompts", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--steps", type=int, default=46)
    parser.add_argument("--keep", nargs="*", type=int, default=[], help="steps after which the policy is saved")
    parser.add_argument("--jobs", type=int, default=1)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(chosen.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [
            pool.submit(
                train, chosen.policy, chosen.prompts, chosen.out, arm, seed, chosen.lr, chosen.steps, chosen.keep
            )
            for seed in chosen.seeds
            for arm in chosen.arms
            if not (chosen.out / f"{arm}-seed{seed}.json").exists()
        ]
        for future in tqdm(as_completed(waiting), total=len(waiting), unit="run"):
            future.result()


if __name__ == "__main__":
    main()

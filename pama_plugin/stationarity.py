"""``pama stationarity``: the true policy gradients of the objectives at saved policies, and their shortest combination.

At a Pareto-stationary point some convex combination of the objectives' gradients is 0: no small step raises all of
them. PAMA promises to converge to such a point (arXiv 2508.07768, Theorem 2). The squared length of a sampled gradient
is mostly noise, so only products of gradients of different prompts are used; see ``pama_plugin.batch.gradient_gram``.
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pama_plugin.batch.gradient_gram import FEWEST, Estimate, MinNorm, cosines, jackknife, min_norm, sketch
from pama_plugin.errors import ConfigError
from pama_plugin.score import check_columns, load_rows, score_rows
from pama_plugin.settings.load import load_objectives
from pama_plugin.settings.objective import Objective

BLOCKS = 64  # at most; more would need more memory for their sketches


class Samples(NamedTuple):
    """Responses of a policy to prompts, N to each; padded on both sides of the boundary between them."""

    sequences_BT: Tensor
    attention_BT: Tensor
    response_mask_BA: Tensor
    texts: list[str]


class Stationarity(NamedTuple):
    """What is measured at one policy: mean rewards, the Gram matrix of the gradients, and the min-norm point."""

    policy: str
    rewards: dict[str, float]
    gram: list[list[Estimate]]
    least: MinNorm


def measure_stationarity(options: argparse.Namespace) -> int:
    """Measure every policy, print a table and write the numbers. Returns the exit code 0.

    Raises:
        ConfigError: a file, model or flag is invalid, or an objective scored no response.
    """
    flags = vars(options)
    objectives = load_objectives(flags["pama.objective"], flags["pama.config"])
    for name, least in (("per_prompt", 2), ("max_new_tokens", 1), ("batch_size", 1)):
        if flags[name] < least:
            raise ConfigError(f"--{name} must be at least {least}, found {flags[name]}")
    if not 0 < options.temperature < math.inf:
        raise ConfigError(f"--temperature must be a positive number, found {options.temperature}")
    prompts = [row for row in load_rows(options.prompts, response=False).values()]
    needed = options.responses // options.per_prompt
    if needed < FEWEST:
        raise ConfigError(
            f"--responses must be at least {FEWEST} × --per_prompt, {FEWEST * options.per_prompt}, found "
            f"{options.responses}"
        )
    if len(prompts) < needed:
        raise ConfigError(
            f"{options.prompts} must have a prompt for each {options.per_prompt} of {options.responses} responses, "
            f"{needed}, found {len(prompts)}"
        )
    if not options.out.parent.is_dir() or options.out.is_dir():
        raise ConfigError(f"--out must be a file in an existing folder, found {options.out}")
    check_columns(objectives, prompts, str(options.prompts))
    found = []
    for policy in options.policy:
        found.append(measure_policy(policy, objectives, prompts[:needed], options))
        content = [each._asdict() | {"least": each.least._asdict()} for each in found]
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    _print_table(found, [objective.name for objective in objectives])
    print(f"numbers  {options.out}")
    return 0


def measure_policy(
    policy: Path, objectives: Sequence[Objective], prompts: Sequence[dict[str, Any]], options: argparse.Namespace
) -> Stationarity:
    """Sample, score and differentiate at one policy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()  # of weights, which load in a second
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).to(device).eval()
    except Exception as error:  # transformers raises many types
        raise ConfigError(f"cannot load the policy {policy}: {error}") from error
    set_seed(options.seed)
    rows, parts = [], []
    per_batch = max(min(options.batch_size // options.per_prompt, len(prompts) // FEWEST), 1)
    for start in tqdm(range(0, len(prompts), per_batch), desc=f"{policy.name}: responses", unit="batch"):
        asked = prompts[start : start + per_batch]
        samples = sample(model, tokenizer, [row["prompt"] for row in asked], options)
        parts.append(samples)
        texts = iter(samples.texts)
        rows += [row | {"response": next(texts)} for row in asked for _ in range(options.per_prompt)]
    rewards_KB = torch.tensor(
        [[outcome.reward for outcome in outcomes] for outcomes in score_rows(objectives, rows, tokenizer).values()],
        dtype=torch.float64,
    )
    for objective, rewards_B in zip(objectives, rewards_KB):
        if rewards_B.isnan().all():
            raise ConfigError(f"objective {objective.name!r} scored no response of {policy}")
    products_MKMK = differentiate(model, parts, estimate(rewards_KB, options.per_prompt), options)
    size = len(objectives)
    entries = jackknife(products_MKMK, torch.flatten)
    return Stationarity(
        str(policy),
        {objective.name: float(rewards_B.nanmean()) for objective, rewards_B in zip(objectives, rewards_KB)},
        [entries[row * size : (row + 1) * size] for row in range(size)],
        min_norm(products_MKMK),
    )


def estimate(rewards_KB: Tensor, per_prompt: int) -> Tensor:
    """(K, B) as OpenRLHF's ``reinforce_baseline``: minus the mean of the prompt, whitened over the rewards there are.

    0 without a reward.

    >>> estimate(torch.tensor([[1.0, 3.0, 5.0, 7.0]]), per_prompt=2).round(decimals=3)
    tensor([[-0.8660,  0.8660, -0.8660,  0.8660]])
    """
    rewards_KGN = rewards_KB.reshape(len(rewards_KB), -1, per_prompt)
    centred_KB = (rewards_KGN - rewards_KGN.nanmean(-1, keepdim=True)).flatten(1).nan_to_num()
    count_K1 = rewards_KB.isfinite().sum(1, keepdim=True)
    std_K1 = (centred_KB.square().sum(1, keepdim=True) / (count_K1 - 1).clamp(min=1)).sqrt()
    whitened_KB: Tensor = centred_KB / std_K1.clamp(min=1e-8)
    return whitened_KB


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: Sequence[Any], options: argparse.Namespace) -> Samples:
    """Sample ``per_prompt`` responses to each prompt, text or messages."""
    from transformers import GenerationConfig

    texts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    plain = GenerationConfig(  # none of the policy's own: they would sample from another distribution
        do_sample=True,
        temperature=options.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=options.max_new_tokens,
        num_return_sequences=options.per_prompt,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.generation_config = plain
    sequences_BT = model.generate(**batch)
    prompt_mask_BP = batch.attention_mask.repeat_interleave(options.per_prompt, dim=0)
    responses_BA = sequences_BT[:, prompt_mask_BP.shape[1] :]
    ends_BA = (responses_BA == tokenizer.eos_token_id).long()
    mask_BA = ends_BA.cumsum(1) - ends_BA == 0  # up to the first end of text, which counts
    return Samples(
        sequences_BT,
        torch.cat([prompt_mask_BP, mask_BA], dim=1),
        mask_BA,
        tokenizer.batch_decode(responses_BA, skip_special_tokens=True),
    )


def differentiate(model: Any, parts: Sequence[Samples], advantages_KB: Tensor, options: argparse.Namespace) -> Tensor:
    """(M, K, M, K) products of the gradients of ``−Σ_t A · log π[t] / T`` in M blocks of batches of prompts."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in parameters]
    count = min(BLOCKS, len(parts))
    sketches: list[list[Tensor]] = [[] for _ in range(count)]
    tokens = [0] * count
    row = 0
    for index, part in enumerate(tqdm(parts, desc="gradients", unit="batch")):
        block, rows = index * count // len(parts), len(part.texts)
        positions_BT = part.attention_BT.cumsum(1).sub(1).clamp(min=0)
        output = model(input_ids=part.sequences_BT, attention_mask=part.attention_BT, position_ids=positions_BT)
        mask_BA = part.response_mask_BA
        logits_BVA = output.logits[:, -mask_BA.shape[1] - 1 : -1].transpose(1, 2) / options.temperature
        targets_BA = part.sequences_BT[:, -mask_BA.shape[1] :]
        nll_BA = torch.nn.functional.cross_entropy(logits_BVA, targets_BA, reduction="none") * mask_BA
        own_KB1 = advantages_KB[:, row : row + rows].to(nll_BA).unsqueeze(-1)
        for objective, own_B1 in enumerate(own_KB1):
            loss = (nll_BA * own_B1).sum()
            last = objective == len(own_KB1) - 1
            gradients = torch.autograd.grad(loss, parameters, retain_graph=not last, allow_unused=True)
            found = sketch(gradients, sizes)
            if len(sketches[block]) < len(own_KB1):
                sketches[block].append(found)
            else:
                sketches[block][objective] += found
        tokens[block] += int(mask_BA.sum())
        row += rows
    gradients_MKW = torch.stack([torch.stack(of_block) / max(n, 1) for of_block, n in zip(sketches, tokens)])
    return torch.einsum("aiw,bjw->aibj", gradients_MKW, gradients_MKW).double().cpu()


def _print_table(found: Sequence[Stationarity], names: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "",
        caption="Products of gradients of different prompts, ± their standard errors: on average those of the true "
        "gradients. Min-norm²: squared length of their shortest convex combination; 0 at a Pareto-stationary point. "
        "Noise floor: by how much that of the sampled gradients is larger.",
    )
    for each in found:
        table.add_column(each.policy, overflow="fold", justify="right")
    for index, name in enumerate(names):
        squares = [each.gram[index][index] for each in found]
        table.add_row(f"‖∇ {name}‖²", *(f"{value:.3g} ± {error:.1g}" for value, error in squares))
    for i, j in itertools.combinations(range(len(names)), 2):
        grams = [
            torch.tensor([[entry.value for entry in row] for row in each.gram])[[i, j]][:, [i, j]] for each in found
        ]
        values = [float(cosines(gram_22)) for gram_22 in grams]
        shown = ("–" if math.isnan(value) else f"{value:.2f}" for value in values)
        table.add_row(f"cosine of {names[i]} and {names[j]}", *shown)
    table.add_row("min-norm²", *(f"{each.least.value:.3g}" for each in found))
    table.add_row("its 95 % interval", *(f"{each.least.low:.3g} … {each.least.high:.3g}" for each in found))
    table.add_row("its noise floor", *(f"{each.least.floor:.3g}" for each in found))
    shares = [zip(names, each.least.coefficients) for each in found]
    table.add_row("its shares", *("  ".join(f"{name} {share:.2f}" for name, share in pairs) for pairs in shares))
    console = Console(emoji=False)
    console.width = max(console.width, 100)  # a log has no width
    console.print(table)

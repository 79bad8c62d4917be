"""Drift of a language model on the Pareto front: the tiny policy of the tests, 60 steps, several seeds.

    python tests/benchmarks/front.py [--steps 60] [--seeds 3]

Rewards are the shares of K classes of tokens in a response. They sum to 1, so every policy is on the front. Each
reward has noise of a tenth of the standard deviation. A step has 64 responses with a group baseline and whitening, as
OpenRLHF's ``reinforce_baseline`` at the sequence level, and OpenRLHF's defaults for Adam. ``pama`` is compared with the
same advantages with random signs (noise of the same size) and with a former default, which divided the result by its
root mean square. Drift is the change of the mean share over 4096 new responses, in standard deviations of one response,
as root mean square over seeds and objectives. *floor* is the drift between two samples of one policy.
"""

import argparse
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import make_config, make_prompts, make_tokenizer
from toy import BETAS, EPS, GROUPS, MAX_NORM, SAMPLES, by, noise_like, to_unit_rms, whitened

TOKENS, FRESH, NOISE = 12, 4096, 0.1
PAMA = by("pama", level="sequence")
ARMS = {"pama": PAMA, "noise of its size": noise_like(PAMA), "to unit rms": to_unit_rms(PAMA)}
# Learning rates at which the policy visibly moves in 60 steps with unit rms.
OPTIMIZERS = {"SGD": (3.0, 0.0), "Adam": (1e-3, 0.0), "Adam, KL loss 0.1": (1e-3, 0.1)}


class Policy:
    """The model, a copy of the initial model, and prompts."""

    def __init__(self, seed: int, tokenizer: PreTrainedTokenizerFast) -> None:
        torch.manual_seed(seed)
        self.model, self.start = (LlamaForCausalLM(make_config(tokenizer)).eval() for _ in range(2))
        self.start.load_state_dict(self.model.state_dict())
        self.prompts = [torch.tensor(tokenizer(prompt).input_ids) for prompt in make_prompts(64)]

    @torch.no_grad()
    def respond(self, prompt_ids: list[int]) -> Tensor:
        """(B, P + TOKENS): prompts, cut to the shortest, and responses; the end-of-text token ends no response."""
        length = min(len(self.prompts[index]) for index in prompt_ids)
        sequences = torch.stack([self.prompts[index][:length] for index in prompt_ids])
        for _ in range(TOKENS):
            logits = self.model(sequences).logits[:, -1].float()
            sequences = torch.cat([sequences, torch.multinomial(logits.softmax(-1), 1)], -1)
        return sequences


def log_probs(model: LlamaForCausalLM, sequences: Tensor) -> Tensor:
    logits = model(sequences[:, :-1]).logits[:, -TOKENS:].float()
    return logits.log_softmax(-1).gather(-1, sequences[:, -TOKENS:, None]).squeeze(-1)


def shares(sequences: Tensor, classes_V: Tensor, objectives: int) -> Tensor:
    """(K, B) share of the tokens of each class."""
    return torch.stack([(classes_V[sequences[:, -TOKENS:]] == k).float().mean(-1) for k in range(objectives)])


def drift(arm: str, optimizer: str, objectives: int, seed: int, steps: int, bar: tqdm) -> tuple[Tensor, Tensor]:
    """(K,) drift of each mean share and (K,) drift between two samples, in deviations of the first responses."""
    tokenizer = make_tokenizer()
    policy, generator = Policy(seed, tokenizer), torch.Generator().manual_seed(seed)
    classes_V = torch.randint(objectives, (len(tokenizer),), generator=generator)
    (lr, kl), parameters = OPTIMIZERS[optimizer], list(policy.model.parameters())
    if optimizer == "SGD":
        stepper = torch.optim.SGD(parameters, lr)
    else:
        stepper = torch.optim.AdamW(parameters, lr, betas=BETAS, eps=EPS, weight_decay=0.0)
    everybody, groups_B = list(range(64)) * (FRESH // 64), torch.arange(GROUPS).repeat_interleave(SAMPLES)
    first, again = (shares(policy.respond(everybody), classes_V, objectives) for _ in range(2))
    for _ in range(steps):
        drawn = torch.randint(64, (GROUPS,), generator=generator).repeat_interleave(SAMPLES).tolist()
        sequences = policy.respond(drawn)
        rewards_KB = shares(sequences, classes_V, objectives)
        rewards_KB = rewards_KB + NOISE * rewards_KB.std(1).mean() * torch.randn(rewards_KB.shape, generator=generator)
        advantages_B = ARMS[arm](whitened(rewards_KB), groups_B, generator)
        now_BA = log_probs(policy.model, sequences)
        with torch.no_grad():
            log_ratio_BA = now_BA - log_probs(policy.start, sequences)
        ratio_BA = (now_BA - now_BA.detach()).exp()
        loss = (kl * log_ratio_BA * now_BA - advantages_B.float().unsqueeze(-1) * ratio_BA).mean()  # k2's gradient
        stepper.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        stepper.step()
        bar.update()
    last = shares(policy.respond(everybody), classes_V, objectives)
    std_K = first.std(1)
    return (last - first).mean(1) / std_K, (again - first).mean(1) / std_K


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.steps} steps, {options.seeds} seeds; {torch.get_num_threads()} CPU threads ({platform.machine()})")
    print(f"{'K':>2} {'optimizer':20}" + "".join(f"{arm:>20}" for arm in ARMS) + f"{'floor':>8}")
    total = 2 * len(OPTIMIZERS) * len(ARMS) * options.seeds * options.steps
    with tqdm(total=total, unit="step", file=sys.stderr) as bar:
        for objectives in (2, 3):
            for optimizer in OPTIMIZERS:
                moved, floors = {}, []
                for arm in ARMS:
                    runs = [
                        drift(arm, optimizer, objectives, seed, options.steps, bar) for seed in range(options.seeds)
                    ]
                    moved[arm] = float(torch.stack([run for run, _ in runs]).square().mean().sqrt())
                    floors += [floor for _, floor in runs]
                floor = float(torch.stack(floors).square().mean().sqrt())
                cells = "".join(f"{value:20.3f}" for value in moved.values())
                bar.write(f"{objectives:2} {optimizer:20}{cells}{floor:8.3f}", file=sys.stdout)


if __name__ == "__main__":
    main()

"""``aggregate("gdpo", …)`` against verl's ``compute_gdpo_outcome_advantage``, on the same rewards.

    pip install --target /tmp/verl --no-deps verl==0.9.1 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 hydra-core \\
        tensordict pyvers orjson
    PYTHONPATH=/tmp/verl python tests/benchmarks/gdpo.py [--objectives 2 8]

1024 responses of up to 1024 tokens, 8 per prompt. Both start from one reward per response and objective; our time
includes spreading the rewards over the tokens, as OpenRLHF's estimators do. The rounds are interleaved; times are
medians. TRL's GDPO is a part of ``GRPOTrainer._generate_and_score_completions`` and cannot be imported.
"""

import argparse
import platform
import statistics
import time

import torch

from pama_plugin import aggregate

B, A, N, ROUNDS = 1024, 1024, 8, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", type=int, nargs="+", default=(2, 8), metavar="K")
    options = parser.parse_args()
    from verl.trainer.ppo.core_algos import compute_gdpo_outcome_advantage  # the tests import this file without verl

    print(f"({B}, {A}), groups of {N}; {torch.get_num_threads()} CPU threads ({platform.machine()})")
    print(f"{'K':>3} {'ours ms':>9} {'verl ms':>9} {'verl / ours':>12} {'largest difference':>19}")

    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.randint(1, A + 1, (B,), generator=generator)
    mask_BA = torch.arange(A) < lengths_B[:, None]
    groups_B = torch.arange(B) // N
    for objectives in options.objectives:
        rewards_KB = torch.randn(objectives, B, generator=generator)
        names = [f"reward {index}" for index in range(objectives)]

        def ours(rewards_KB: torch.Tensor = rewards_KB) -> torch.Tensor:
            advantages_KBA = rewards_KB.unsqueeze(-1) * mask_BA
            return aggregate("gdpo", advantages_KBA, mask_BA, groups_B=groups_B).advantages

        def verls(rewards_KB: torch.Tensor = rewards_KB, names: list[str] = names) -> torch.Tensor:
            mask = mask_BA.float()
            batch = {"prompts": torch.ones(B, 1), "attention_mask": torch.cat([torch.ones(B, 1), mask], -1).long()}
            return compute_gdpo_outcome_advantage(
                torch.zeros(B, A),
                mask,
                groups_B.numpy(),
                config={"gdpo_reward_keys": names},
                non_tensor_batch={name: row.numpy() for name, row in zip(names, rewards_KB)},
                batch=batch,
            )[0]

        difference = float((ours() - verls()).abs().max())
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for function, measured in zip((ours, verls), times):
                start = time.perf_counter()
                function()
                measured.append(time.perf_counter() - start)
        mine, theirs = (statistics.median(measured) * 1000 for measured in times)
        print(f"{objectives:3} {mine:9.1f} {theirs:9.1f} {theirs / mine:11.1f}x {difference:19.1e}", flush=True)


if __name__ == "__main__":
    main()

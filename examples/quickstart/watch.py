"""Show the progress of a training command: write its output to a log and its steps to a progress bar.

    COMMAND 2>&1 | python examples/quickstart/watch.py LOG [STEPS]

With STEPS the bar follows the global steps of OpenRLHF's PPO command, without STEPS the bars of train_sft and train_rm.
The lines of the plugin, such as that of each step, are shown above it.
If the command does not finish, its last lines are printed and the exit status is 1.
"""

import re
import sys
from collections import deque
from pathlib import Path

from tqdm import tqdm

# OpenRLHF prints "Global step 3: {'policy_loss': 0.02, …}"; tqdm prints "Train step of epoch 0:  12%|…| 36/307 [".
GLOBAL_STEP = re.compile(r"Global step (\d+): ")
EPOCH_STEP = re.compile(r"Train step of epoch (\d+): .*\| (\d+)/(\d+) \[.*?((?:gpt_loss|loss|acc)=[-\d.]+)")
FINISHED = re.compile(r"Writing model shards: 100%|Prompt dataloader is exhausted")


def main(log: Path, steps: int | None) -> int:
    last_lines: deque[str] = deque(maxlen=40)
    finished, epoch = False, None
    with log.open("w") as file, tqdm(total=steps, unit="step", mininterval=1) as bar:
        for line in sys.stdin:
            file.write(line)
            file.flush()
            for part in line.replace("\r", "\n").splitlines():
                last_lines.append(part)
                finished |= bool(FINISHED.search(part))
                if match := GLOBAL_STEP.search(part):
                    bar.update(int(match[1]) - bar.n)
                elif (match := EPOCH_STEP.search(part)) and steps is None:
                    if match[1] != epoch:
                        epoch = match[1]
                        bar.reset(total=int(match[3]))  # also resets the clock, so that the rate is of this epoch
                    bar.set_description(f"epoch {int(epoch) + 1}", refresh=False)
                    bar.n = int(match[2])
                    bar.set_postfix_str(match[4])
                elif "PAMA " in part:
                    bar.write(part[part.index("PAMA ") :])
    if not finished:
        print(*last_lines, f"-- the command did not finish; its output is in {log}", sep="\n", file=sys.stderr)
    return 0 if finished else 1


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    raise SystemExit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else None))

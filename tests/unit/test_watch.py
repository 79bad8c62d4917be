"""The progress bar of the quickstart follows OpenRLHF's output and detects a command that did not finish."""

import subprocess
import sys
from pathlib import Path

import pytest

WATCH = Path(__file__).parents[2] / "examples" / "quickstart" / "watch.py"
PPO = "(PPOTrainer pid=1) INFO ✨ Global step 2: {'reward/length': 1.25}\n(PPOTrainer pid=1) PAMA step 2/2  a 1\n"
SFT = "Train step of epoch 1:  12%|█ | 36/307 [00:25<02:57,  1.52it/s, gpt_loss=6.36, lr=0.0018, grad_norm=0]\r"


@pytest.mark.parametrize(
    ("output", "steps", "shown"),
    [
        (PPO + "Prompt dataloader is exhausted.\n", ["2"], "2/2 ["),
        (PPO + "Prompt dataloader is exhausted.\n", ["2"], "PAMA step 2/2  a 1\n"),
        (SFT + "Writing model shards: 100%\n", [], "36/307"),
    ],
)
def test_a_finished_command(output, steps, shown, tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, WATCH, tmp_path / "log", *steps], input=output, capture_output=True, text=True
    )
    assert done.returncode == 0 and shown in (done.stdout + done.stderr).replace("\r", "\n")
    assert "Global step" in (tmp_path / "log").read_text() or "Train step" in (tmp_path / "log").read_text()


def test_a_command_that_died(tmp_path) -> None:
    output = PPO + "ValueError: out of luck\n"
    done = subprocess.run([sys.executable, WATCH, tmp_path / "log", "2"], input=output, capture_output=True, text=True)
    assert done.returncode == 1 and "ValueError: out of luck" in done.stderr and "did not finish" in done.stderr

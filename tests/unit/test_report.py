"""A run's TensorBoard folder becomes the right numbers, a picture and a clear error where there is none."""

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from pama_plugin.cli import main
from pama_plugin.errors import ConfigError
from pama_plugin.report.summary import read_scalars, start_and_end


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty steps of two objectives; sentiment rises by 0.1 a step, length stays at 1."""
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(1, 21):
            for name, reward, share in (("sentiment", 0.1 * step, 0.25), ("length", 1.0, 0.75)):
                writer.add_scalar(f"train/reward/{name}", reward, step)
                writer.add_scalar(f"train/pama/coefficient/{name}", share, step)
                writer.add_scalar(f"train/pama/gain/{name}", 0.5, step)
            for key in ("active_fraction", "conflict_rate", "rms"):
                writer.add_scalar(f"train/pama/{key}", 0.5, step)
    return tmp_path


def test_start_and_end_are_the_first_and_last_tenth(folder) -> None:
    start, end = start_and_end(read_scalars(folder)["reward/sentiment"])
    # two steps each: (0.1 + 0.2) / 2 and (1.9 + 2.0) / 2, standard error .0707 / √2
    assert start == pytest.approx((0.15, 0.05), abs=1e-6) and end == pytest.approx((1.95, 0.05), abs=1e-6)


def test_the_command_prints_a_table_and_draws(folder, capsys) -> None:
    main(["report", str(folder)])
    printed = capsys.readouterr().out
    # (1.95 - 0.15) / √(.05² + .05²) = 25.5
    assert "sentiment" in printed and "0.150 ± 0.050" in printed and "1.950 ± 0.050" in printed and "+25.5" in printed
    assert "active fraction 0.500" in printed and str(folder / "curves.png") in printed
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_run_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no TensorBoard events in"):
        read_scalars(tmp_path)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("train/reward", 1.0, 1)
    with pytest.raises(ConfigError, match="is not the log of a run with --loss"):
        read_scalars(tmp_path)

"""Writes the responses of every step, with their rewards, to a file and to OpenRLHF's trackers."""

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from pama_plugin.batch.rollouts import Row
from pama_plugin.host.protocols import Experience, Tokenizer

logger = logging.getLogger(__name__)


def log_folder(args: Any) -> Path:
    """Where a run writes its settings and texts: beside its TensorBoard logs if it has any."""
    if args.logger.tensorboard_dir:
        return Path(args.logger.tensorboard_dir) / args.logger.wandb.run_name  # as OpenRLHF's logger
    return Path(args.ckpt.output_dir)


def add_texts(
    rows: Sequence[Row], chosen: Sequence[int], experiences: Sequence[Experience], tokenizer: Tokenizer
) -> None:
    """Add prompt, label and response to the rows of the ``chosen`` responses; the turns too if there are several."""
    places = [(experience, index) for experience in experiences for index in range(len(experience.sequences))]
    for row, response in zip(rows, chosen, strict=True):
        experience, index = places[response]
        turns = split_turns(
            experience.sequences[index], experience.attention_mask[index], experience.action_mask[index]
        )
        texts = [(who, _whole(tokenizer.decode(tokens, skip_special_tokens=True))) for who, tokens in turns]
        label = experience.labels[index]
        row["prompt"], row["label"] = _whole(experience.prompts[index]), None if label is None else _whole(str(label))
        row["response"] = "".join(text for _, text in texts)
        if len(texts) > 1:
            row["turns"] = [{who: text} for who, text in texts]


def _whole(text: str) -> str:
    """The text with halves of surrogate pairs, which few readers of JSON take, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def split_turns(tokens_T: Tensor, attention_T: Tensor, action_A: Tensor) -> list[tuple[str, list[int]]]:
    """The tokens after the prompt, by who wrote them: an agent's environment answers between turns of the policy.

    Args:
        tokens_T: prompt and response.
        attention_T: false at padding.
        action_A: true at tokens of the policy, for ``tokens_T[1:]``.
    """
    actions = action_A.bool().tolist()
    if True not in actions:
        return []
    after = list(zip(tokens_T[1:].tolist(), actions, attention_T[1:].bool().tolist()))[actions.index(True) :]
    runs = itertools.groupby((entry for entry in after if entry[2]), key=lambda entry: entry[1])
    return [("policy" if ours else "environment", [token for token, *_ in run]) for ours, run in runs]


class RolloutLog:
    """A file of responses, and the trackers that show those of the last steps under ``name``.

    A disk that is full, or a folder that cannot be written, gives one warning; the run goes on without the log.
    """

    def __init__(self, file: Path, name: str, wandb: Any, tensorboard: Any) -> None:
        self.file: Path | None = file
        self.name, self.wandb, self.tensorboard = name, wandb, tensorboard

    def write(self, rows: Sequence[Row]) -> None:
        if self.file is not None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a+b") as file:
                    _cut_off_half_a_line(file)
                    file.write("".join(json.dumps(row) + "\n" for row in rows).encode("ascii"))
            except OSError as error:
                logger.warning("PAMA: rollouts are no longer logged to %s: %s", self.file, error.strerror)
                self.file = None
        if not rows:
            return
        if self.tensorboard is not None:
            texts = [f"    {line}" for row in rows for line in json.dumps(row, indent=1).splitlines()]
            self.tensorboard.writer.add_text(self.name, "\n".join(texts), rows[0]["step"])
        if self.wandb is not None:
            columns = ["step", "prompt", "response", "label", *rows[0]["rewards"], "advantage"]
            table = [[(row | row["rewards"]).get(column) for column in columns] for row in rows]
            self.wandb.handle.log({self.name: self.wandb.handle.Table(columns=columns, data=table)})


def _cut_off_half_a_line(file: BinaryIO) -> None:
    """Remove what a full disk or a killed run left of a line."""
    end = file.seek(0, 2)
    while end:
        start = max(end - 2**16, 0)
        file.seek(start)
        if (newline := file.read(end - start).rfind(b"\n")) >= 0:
            file.truncate(start + newline + 1)
            return
        end = start
    file.truncate(0)

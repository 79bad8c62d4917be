"""OpenRLHF's data set of prompts, which with ours carry the columns that objectives need."""

from typing import Any

from openrlhf.datasets import PromptDataset
from openrlhf.trainer import ppo_trainer

from pama_plugin.host.actors.prompts import with_columns
from pama_plugin.host.protocols import Strategy
from pama_plugin.settings.condition import column_of


class PromptsWithColumns(PromptDataset):
    """Made where OpenRLHF makes its own; rows, order and texts are OpenRLHF's."""

    prompts: list[str]

    def __init__(self, dataset: Any, tokenizer: Any, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, tokenizer, strategy, *args, **kwargs)
        names = strategy.args.pama.columns
        self.prompts = [
            with_columns(prompt, {name: column_of(row, name) for name in names})
            for prompt, row in zip(self.prompts, dataset, strict=True)
        ]


def read_columns(strategy: Strategy) -> None:
    """Have ``prepare_datasets`` of this process make prompts with columns, if an objective needs any."""
    if strategy.args.pama.columns:
        ppo_trainer.PromptDataset = PromptsWithColumns

"""OpenRLHF's data set of prompts, which with ours carry the columns that objectives need."""

from typing import Any

from openrlhf.datasets import PromptDataset
from openrlhf.trainer import ppo_trainer

from pama_plugin.host.actors.prompts import with_columns
from pama_plugin.host.protocols import Strategy
from pama_plugin.settings.names import DATASOURCE, DEFAULT_DATASOURCE


class PromptsWithColumns(PromptDataset):
    """Made where OpenRLHF makes its own; rows, order and texts are OpenRLHF's."""

    prompts: list[str]

    def __init__(self, dataset: Any, tokenizer: Any, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, tokenizer, strategy, *args, **kwargs)
        names = strategy.args.pama.columns
        self.prompts = [
            with_columns(prompt, {name: _value(row, name) for name in names})
            for prompt, row in zip(self.prompts, dataset, strict=True)
        ]


def _value(row: Any, name: str) -> Any:
    """OpenRLHF's default of the data source, also where another data set of the run has the column."""
    value = row.get(name) if name == DATASOURCE else row[name]
    return DEFAULT_DATASOURCE if value is None and name == DATASOURCE else value


def read_columns(strategy: Strategy) -> None:
    """Have ``prepare_datasets`` of this process make prompts with columns, if an objective needs any."""
    if strategy.args.pama.columns:
        ppo_trainer.PromptDataset = PromptsWithColumns

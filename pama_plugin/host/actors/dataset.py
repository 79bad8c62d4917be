"""OpenRLHF's data set of prompts, which with ours carry the columns that objectives need, and room for a preference."""

from collections.abc import Callable, Iterator
from typing import Any

from openrlhf.datasets import PromptDataset
from openrlhf.trainer import ppo_trainer

from pama_plugin.errors import PamaError
from pama_plugin.host.actors.prompts import Prompt, with_columns
from pama_plugin.host.preflight.preferences import text_with_slots
from pama_plugin.host.protocols import Strategy
from pama_plugin.settings.condition import column_of
from pama_plugin.settings.preferences import Template, Weights, read_weights
from pama_plugin.settings.run import PamaConfig


class PromptsWithColumns(PromptDataset):
    """Made where OpenRLHF makes its own; rows, order and texts are OpenRLHF's."""

    prompts: list[str]
    datasources: list[Any]

    def __init__(self, dataset: Any, tokenizer: Any, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, tokenizer, strategy, *args, **kwargs)
        config, data, source = strategy.args.pama, strategy.args.data, strategy.args.pama.preference_source
        template = config.template if source is not None else None
        prompts: list[str] = []
        for number, (text, row) in enumerate(zip(self.prompts, dataset, strict=True)):
            prompt = with_columns(text, {name: column_of(row, name) for name in config.columns})
            if template is not None:
                prompt.slots = text_with_slots(
                    template,
                    row,
                    number,
                    tokenizer,
                    data.input_key,
                    data.input_template,
                    data.apply_chat_template,
                )
                prompt.given, prompt.row, prompt.source = row.get(source.column), number, str(self.datasources[number])
            prompts.append(prompt)
        self.prompts = prompts


class PromptsWithPreferences:
    """OpenRLHF's loader of prompts; each prompt comes with each of the preferences that ``choose`` returns for it."""

    def __init__(self, loader: Any, template: Template, choose: Callable[[Prompt], list[Weights]]) -> None:
        self.loader, self.template, self.choose = loader, template, choose

    def __iter__(self) -> Iterator[tuple[list[Any], list[str], list[Any], list[Any]]]:
        for columns in self.loader:
            for source, prompt, label, images in zip(*columns):
                for preference in self.choose(prompt):
                    yield [source], [prompt.with_preference(self.template, preference)], [label], [images]

    def __len__(self) -> int:
        return len(self.loader)


class NumberedDraw:
    """Draws the preference of each prompt of the run by its number, so that a resumed run goes on with the same."""

    def __init__(self, config: PamaConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.number = 0

    def __call__(self, prompt: Prompt) -> list[Weights]:
        self.number += 1
        assert (source := self.config.preference_source) is not None
        if source.source != "column":
            return [source.draw(self.number - 1, self.seed, len(self.config.trained))]
        try:
            return [read_weights(prompt.given, self.config.trained_names)]
        except ValueError as error:  # of a data set that could not be read before Ray started
            raise PamaError(
                f"--pama.preferences {self.config.preferences}: {error}, for the prompt {prompt[:200]!r}"
            ) from None


def read_columns(strategy: Strategy) -> None:
    """Have ``prepare_datasets`` of this process make prompts with columns, if objectives or preferences need any."""
    if strategy.args.pama.columns or strategy.args.pama.preferences is not None:
        ppo_trainer.PromptDataset = PromptsWithColumns

"""Converts rollouts for reward models with their own tokenizer: prompts as messages, responses as text."""

import logging
from typing import Any

from openrlhf.datasets.prompts_dataset import preprocess_data
from openrlhf.datasets.utils import blending_datasets

from pama_plugin.host.actors.prompts import plain
from pama_plugin.host.protocols import Experience
from pama_plugin.rewards import Conversation

logger = logging.getLogger(__name__)


class Conversations:
    """Converts rollouts to text.

    A rollout has the prompt only as formatted by the policy's template, with the policy's special tokens. So with
    --data.apply_chat_template or --data.input_template the data sets are read again to recover the original prompts.
    """

    def __init__(self, strategy: Any, tokenizer: Any) -> None:
        self.strategy, self.args, self.tokenizer = strategy, strategy.args, tokenizer
        self.origins: dict[str, Any] = {}  # formatted prompt → prompt in the data set
        self.templated = bool(self.args.data.apply_chat_template or self.args.data.input_template)
        self.complete = not self.templated
        self.warned = False

    def of(self, samples_list: list[Experience]) -> list[Conversation]:
        """Return one per response, in order. All turns after the first prompt belong to the response."""
        return [
            Conversation(self._messages(plain(samples.prompts[row])), self._response(samples, row))
            for samples in samples_list
            for row in range(len(samples.sequences))
        ]

    def _messages(self, prompt: str) -> list[dict[str, Any]]:
        if prompt not in self.origins and not self.complete:
            self._read()
        if prompt not in self.origins and self.templated:
            logger.warning(
                "no data set has the prompt %r: hf objectives read it as the policy's template formatted it", prompt
            )
        if not self.templated and not self.warned:
            self._warn_of_a_template(prompt)
        origin = self.origins.setdefault(prompt, prompt)
        return [{"role": "user", "content": origin}] if isinstance(origin, str) else origin

    def _warn_of_a_template(self, prompt: str) -> None:
        special = [token for token in self.tokenizer.all_special_tokens if token in prompt]
        if special:
            self.warned = True
            logger.warning(
                "the prompts of the data set contain %s of the policy: hf objectives would put that template inside a "
                "message of their own. Use messages with --data.apply_chat_template, or set text=full",
                ", ".join(special),
            )

    def _response(self, samples: Experience, row: int) -> str:
        actions = samples.action_mask[row].nonzero()
        if not len(actions):
            return ""
        first = int(actions[0]) + 1  # the mask starts at the second token
        tokens = samples.sequences[row][first:][samples.attention_mask[row][first:].bool()]
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _read(self) -> None:
        data, template = self.args.data, self.args.data.input_template
        apply = self.tokenizer.apply_chat_template if data.apply_chat_template else None
        sets = [
            blending_datasets(
                data.prompt_dataset,
                data.prompt_probs,
                self.strategy,
                self.args.train.seed,
                max_count=data.max_samples,
                dataset_split=data.prompt_split,
            )
        ]
        if self.args.eval.dataset:
            sets.append(
                blending_datasets(self.args.eval.dataset, None, self.strategy, dataset_split=self.args.eval.split)
            )
        for rows in sets:
            for row in rows.select(range(min(data.max_samples, len(rows)))):
                prompt, _ = preprocess_data(row, template, data.input_key, None, apply)
                self.origins[prompt] = row[data.input_key]
        self.complete = True

"""Kind ``hf``: any sequence classifier of transformers, with a tokenizer and a chat template of its own.

Imported only where an ``hf`` objective is used: it is the one module of the core that needs transformers.
"""

import inspect
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pama_plugin.rewards.options import HfOptions
from pama_plugin.rewards.response import Conversation, Inspection

logger = logging.getLogger(__name__)

# Tokenizers that know no limit say 1e30, or another such number; no model reads as many tokens as this.
_NO_LIMIT = 10**8


_Row = dict[str, list[int]]  # the model's inputs for one conversation, by name


class HfScorer:
    """A loaded classifier: ``score`` gives what transformers itself gives for each conversation alone, unpadded.

    A text that is too long loses its leftmost tokens: those of the prompt and then, where the response alone is too
    long, those of the response. What the tokenizer puts at the beginning (BOS, CLS) and all that follows the response
    stay. The end of a response is kept because a head on the last token reads it there, before the same end-of-text
    tokens, and because a response that never stops, cut at its end, would read like one that is about to.

    Raises:
        ValueError: a checkpoint without a trained head, a tokenizer of another model, an unknown or missing label,
            no chat template to use, or a ``max_length`` that is needed, too short or too long.
    """

    def __init__(self, location: str, options: HfOptions, device: str) -> None:
        trust = options.trust_remote_code
        self._options = options
        self._tokenizer: Any = AutoTokenizer.from_pretrained(location, trust_remote_code=trust)
        _check_tokenizer(self._tokenizer, location)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            location, dtype=options.dtype, trust_remote_code=trust, output_loading_info=True
        )
        self._embeddings = model.get_input_embeddings().weight.shape[0]
        _check_weights(model, info["missing_keys"], len(self._tokenizer), self._embeddings, location)
        self._label = _find_label(options.label, model.config.id2label, location)
        self._text = options.text or ("chat" if self._tokenizer.chat_template else "full")
        if self._text == "chat" and not self._tokenizer.chat_template:
            raise ValueError(f"text=chat needs a chat template, and the tokenizer of {location} has none")
        special = 0 if self._text == "chat" else self._tokenizer.num_special_tokens_to_add(self._text == "pair")
        allowed = self._tokenizer.model_max_length
        self._max_length = _find_limit(options.max_length, allowed, _positions(model), special, location)
        self._beginnings = {self._tokenizer.bos_token_id, self._tokenizer.cls_token_id} - {None}

        config = self._config = model.config.get_text_config()
        config.use_cache = False  # keys and values that nothing would read again
        padding = getattr(config, "pad_token_id", None)
        self._padding = padding if padding in range(self._embeddings) else None  # some configurations say -1
        self._takes = set(inspect.signature(model.forward).parameters)
        # XLNet reads the last position, padding or not; encoder-decoders want as many EOS in every text of a batch.
        alone = getattr(config, "summary_type", None) == "last" or model.config.is_encoder_decoder
        self._batch_size = 1 if alone or "attention_mask" not in self._takes else options.batch_size
        self._model = model.to(device).eval()

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """One reward per conversation, in order; NaN for a text without a single token, which no model can read."""
        rows = [row for row, _ in self._encode(conversations)]
        lengths = [len(row["input_ids"]) for row in rows]
        # Texts of like length share a batch; the longest come first, so that too little memory shows at once.
        order = sorted((index for index, length in enumerate(lengths) if length), key=lambda index: -lengths[index])
        rewards = [math.nan] * len(rows)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            for index, reward in zip(batch, self._reward(self._logits([rows[index] for index in batch])).tolist()):
                rewards[index] = reward
        return rewards

    def score_each(self, conversations: Sequence[Conversation]) -> list[float]:
        """As ``score``, and NaN for a conversation that the model or its template cannot read."""
        try:
            return self.score(conversations)
        except Exception as error:  # a template may raise what it likes, and so may a model's own code
            if len(conversations) == 1:
                logger.warning("no reward for %r: %r", conversations[0], error)
                return [math.nan]
            logger.warning("scoring %d conversations together failed: %r; now one by one", len(conversations), error)
            return [reward for conversation in conversations for reward in self.score_each([conversation])]

    def inspect(self, conversation: Conversation, tokens: int = 16) -> Inspection:
        """What the model sees of a conversation, with its last ``tokens`` as text.

        Where the prompt ends is found by tokenizing it alone, which may be a token off where a word spans both. A
        response that the template rewrites cannot be found in its output; then all of it counts as response.
        """
        ((row, cut),) = self._encode([conversation])
        prompt = self._tokenizer(self._split(conversation)[0], add_special_tokens=False, verbose=False)["input_ids"]
        in_prompt = len(prompt) - sum(token in self._beginnings for token in prompt[:1])
        ids = row["input_ids"]
        tail = self._tokenizer.decode(ids[-tokens:], skip_special_tokens=False)
        return Inspection(tail, len(ids), truncated_prompt=min(cut, in_prompt) > 0, truncated_response=cut > in_prompt)

    def _split(self, conversation: Conversation) -> tuple[str, str]:
        """The text before the response, and the text from there on."""
        messages, response = conversation
        if self._text == "response":
            return "", response
        contents = [_as_text(message["content"]) for message in messages]
        if self._text != "chat":
            return "\n".join(contents), response
        chat = [{**message, "content": content} for message, content in zip(messages, contents)]
        chat.append({"role": "assistant", "content": response})
        text = str(self._tokenizer.apply_chat_template(chat, tokenize=False))
        start = max(text.rfind(response.strip()), 0)  # templates strip
        return text[:start], text[start:]

    def _encode(self, conversations: Sequence[Conversation]) -> list[tuple[_Row, int]]:
        """The model's inputs for each conversation, and how many tokens were cut off."""
        if not conversations:
            return []
        before, rest = zip(*map(self._split, conversations))
        texts = (list(before), list(rest)) if self._text == "pair" else ([a + b for a, b in zip(before, rest)],)
        encoded = self._tokenizer(
            *texts,
            add_special_tokens=self._text != "chat",  # a template writes its own, BOS included
            return_attention_mask=True,
            return_special_tokens_mask=True,
            verbose=False,  # about texts that are too long
        )
        rows = [dict(zip(encoded, columns)) for columns in zip(*encoded.values())]
        return [self._cut(row) for row in rows]

    def _cut(self, row: _Row) -> tuple[_Row, int]:
        """Drop the leftmost tokens that come from the text, and not from the tokenizer, down to the limit."""
        ids, special = row["input_ids"], row["special_tokens_mask"]
        stays = [flag or index == 0 and ids[0] in self._beginnings for index, flag in enumerate(special)]
        droppable = [index for index, flag in enumerate(stays) if not flag]
        cut = set(droppable[: max(len(ids) - self._max_length, 0)])
        taken = {key: values for key, values in row.items() if key in self._takes}
        return {key: [v for i, v in enumerate(values) if i not in cut] for key, values in taken.items()}, len(cut)

    @torch.inference_mode()
    def _logits(self, rows: Sequence[_Row]) -> torch.Tensor:
        """Logits (B, C) of rows that are padded at the right.

        A head on the last token looks for the last one that is not the model's padding. So the *model's* padding is
        used, and not the tokenizer's: then a padded text ends where it does alone, also if that token is the EOS that
        ends texts as well (cf. transformers issue 35352). A model without one reads the last token; an id that is in
        no text of the batch serves.
        """
        used = {token for row in rows for token in row["input_ids"]}
        unused = (token for token in range(self._embeddings) if token not in used)
        padding = next(unused, None) if self._padding is None else self._padding
        if padding is None and len(rows) > 1:
            half = len(rows) // 2
            return torch.cat([self._logits(rows[:half]), self._logits(rows[half:])])
        self._config.pad_token_id = padding
        inputs = {}
        for key in rows[0]:
            fill = padding or 0 if key == "input_ids" else 0
            columns = [torch.tensor(row[key]) for row in rows]
            inputs[key] = pad_sequence(columns, batch_first=True, padding_value=fill).to(self._model.device)
        logits: torch.Tensor = self._model(**inputs).logits
        return logits.float()

    def _reward(self, logits: torch.Tensor) -> torch.Tensor:
        chosen = logits[:, self._label]
        if self._options.output == "logit":
            return chosen
        log_odds = chosen  # of a sigmoid; of a softmax, less the logsumexp of the other logits
        if logits.shape[1] > 1 and self._model.config.problem_type != "multi_label_classification":
            others = torch.cat([logits[:, : self._label], logits[:, self._label + 1 :]], dim=1)
            log_odds = chosen - others.logsumexp(1)
        return log_odds if self._options.output == "log_odds" else log_odds.sigmoid()


def _check_weights(model: Any, missing_keys: Iterable[str], tokens: int, embeddings: int, location: str) -> None:
    """Refuse what transformers only warns of: weights that are random, and tokens that have no embedding."""
    missing = sorted(set(missing_keys) & {name for name, _ in model.named_parameters()})
    if missing:
        lacks = f"its checkpoint lacks {', '.join(missing[:4])}"
        raise ValueError(f"{location} has no trained classification head, or is incomplete: {lacks}")
    if tokens > embeddings:
        raise ValueError(f"the tokenizer of {location} has {tokens} tokens, and its model embeds only {embeddings}")


def _check_tokenizer(tokenizer: Any, location: str) -> None:
    """Refuse a folder without a vocabulary: transformers then makes a tokenizer of special tokens alone."""
    files = set(tokenizer.vocab_files_names.values())
    if files and Path(location).is_dir() and not any((Path(location) / file).is_file() for file in files):
        raise ValueError(f"{location} must hold the model's tokenizer, one of {', '.join(sorted(files))}, found none")


def _find_label(label: int | str | None, names: Mapping[int, str], location: str) -> int:
    known = ", ".join(f"{index}: {name}" for index, name in names.items())
    if label is None and len(names) > 1:
        raise ValueError(f"{location} has {len(names)} logits, so label must be one of {known}")
    if isinstance(label, str):
        found = [index for index, name in names.items() if name == label]
        found = found or [index for index, name in names.items() if name.lower() == label.lower()]
    else:
        found = [index for index in names if index == (label or 0)]
    if len(found) != 1:
        raise ValueError(f"label must be one of those that {location} has ({known}), found {label!r}")
    return found[0]


def _find_limit(asked: int | None, tokenizer: int, positions: int, special: int, location: str) -> int:
    """What is ``asked`` for, or else what ``tokenizer`` and model allow."""
    if asked and positions and asked > positions:
        raise ValueError(f"max_length must be at most {positions}, the positions of {location}, found {asked}")
    limit = min(asked or tokenizer, positions or _NO_LIMIT)
    if limit >= _NO_LIMIT:
        raise ValueError(f"max_length is needed: neither the model nor the tokenizer of {location} has a limit")
    if limit <= special:
        raise ValueError(f"max_length must be more than the {special} special tokens of a text, found {limit}")
    return limit


def _positions(model: Any) -> int:
    """How many tokens the model has positions for; 0 if it does not say."""
    config = model.config.get_text_config()
    known = max(getattr(config, name, None) or 0 for name in ("max_position_embeddings", "n_positions"))
    # RoBERTa and its kin count positions on from the padding's id.
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    starts = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return max(known - max(starts, default=0), 0)


def _as_text(content: Any) -> str:
    """The content of a message, whose text may come in parts; a classifier of text sees no others."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or () if part["type"] == "text")

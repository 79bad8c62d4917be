"""Kind ``hf``: any sequence classifier of transformers, with its own tokenizer and chat template.

The only module outside ``host/`` that imports transformers at the top. It is imported only for ``hf`` objectives.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pama_plugin.rewards.options import HfOptions
from pama_plugin.rewards.response import Conversation, Inspection, score_apart

# Tokenizers without a limit report a number such as 1e30. No model reads as many tokens as this.
_NO_LIMIT = 10**8


_Row = dict[str, list[int]]  # name → input of the model for one conversation


class HfScorer:
    """A loaded classifier. ``score`` equals the output of transformers for each conversation alone, without padding.

    With ``keys``, the labels of several objectives, it gives each conversation a list of rewards, from one forward.

    A text that is too long is truncated on the left: first the prompt and, if the response alone is too long, the
    response. Tokens that the tokenizer adds at the beginning (BOS, CLS) and all tokens after the response are kept. The
    end of the response is kept because a head on the last token reads it there, before the same end-of-text tokens, and
    because a response that never stops would look finished if it were truncated on the right.

    Raises:
        ValueError: the checkpoint has no trained head, the tokenizer belongs to another model, the label is unknown or
            missing, there is no chat template, or ``max_length`` is missing, too short or too long.
    """

    def __init__(
        self, location: str, options: HfOptions, device: str, *, keys: Sequence[int | str | None] | None = None
    ) -> None:
        trust = options.trust_remote_code
        self._options = options
        self._tokenizer: Any = AutoTokenizer.from_pretrained(location, trust_remote_code=trust)
        _check_tokenizer(self._tokenizer, location)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            location, dtype=options.dtype, trust_remote_code=trust, output_loading_info=True
        )
        self._embeddings = model.get_input_embeddings().weight.shape[0]
        _check_weights(model, info["missing_keys"], len(self._tokenizer), self._embeddings, location)
        self._alone = keys is None
        self._labels = [_find_label(key, model.config.id2label, location) for key in keys or (options.label,)]
        self._text = options.text or ("chat" if self._tokenizer.chat_template else "full")
        if self._text == "chat" and not self._tokenizer.chat_template:
            raise ValueError(f"text=chat needs a chat template, and the tokenizer of {location} has none")
        special = 0 if self._text == "chat" else self._tokenizer.num_special_tokens_to_add(self._text == "pair")
        allowed = self._tokenizer.model_max_length
        self._max_length = _find_limit(options.max_length, allowed, _positions(model), special, location)
        self._beginnings = {self._tokenizer.bos_token_id, self._tokenizer.cls_token_id} - {None}

        config = self._config = model.config.get_text_config()
        config.use_cache = False  # the key-value cache would not be used
        padding = getattr(config, "pad_token_id", None)
        self._padding = padding if padding in range(self._embeddings) else None  # some configurations have -1
        self._parameters = set(inspect.signature(model.forward).parameters)
        # XLNet reads the last position even if it is padding; encoder-decoders need as many EOS in each text.
        alone = getattr(config, "summary_type", None) == "last" or model.config.is_encoder_decoder
        self._batch_size = 1 if alone or "attention_mask" not in self._parameters else options.batch_size
        self._model = model.to(device).eval()

    def score(self, conversations: Sequence[Conversation]) -> list[Any]:
        """One reward per conversation, or one for each of the ``keys``, in order; NaN for a text without tokens."""
        rows = [row for row, _ in self._encode(conversations)]
        lengths = [len(row["input_ids"]) for row in rows]
        # Batches have texts of similar length. The longest come first, so that a lack of memory shows immediately.
        order = sorted((index for index, length in enumerate(lengths) if length), key=lambda index: -lengths[index])
        rewards = [[math.nan] * len(self._labels)] * len(rows)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            for index, reward in zip(batch, self._reward(self._logits([rows[index] for index in batch])).tolist()):
                rewards[index] = reward
        return [each for (each,) in rewards] if self._alone else rewards

    def score_each(self, conversations: Sequence[Conversation]) -> list[Any]:
        """As ``score``, but an error of the model or its template concerns only the conversations that cause it."""
        return score_apart(self.score, conversations)

    def inspect(self, conversation: Conversation, tokens: int = 16) -> Inspection:
        """The input of the model for a conversation, with the last ``tokens`` tokens as text.

        The end of the prompt is determined by tokenizing the prompt alone, which may be off by one token if a word
        spans prompt and response. If the template modifies the response, the whole text counts as response.
        """
        ((row, cut),) = self._encode([conversation])
        prompt = self._tokenizer(self._split(conversation)[0], add_special_tokens=False, verbose=False)["input_ids"]
        in_prompt = len(prompt) - sum(token in self._beginnings for token in prompt[:1])
        ids = row["input_ids"]
        tail = self._tokenizer.decode(ids[-tokens:], skip_special_tokens=False)
        return Inspection(tail, len(ids), truncated_prompt=min(cut, in_prompt) > 0, truncated_response=cut > in_prompt)

    def _split(self, conversation: Conversation) -> tuple[str, str]:
        """The text before the response, and the rest of the text."""
        messages, response = conversation
        if self._text == "response":
            return "", response
        contents = [_as_text(message["content"]) for message in messages]
        if self._text != "chat":
            return "\n".join(contents), response
        chat = [{**message, "content": content} for message, content in zip(messages, contents)]
        chat.append({"role": "assistant", "content": response})
        text = str(self._tokenizer.apply_chat_template(chat, tokenize=False))
        start = max(text.rfind(response.strip()), 0)  # templates strip whitespace
        return text[:start], text[start:]

    def _encode(self, conversations: Sequence[Conversation]) -> list[tuple[_Row, int]]:
        """The inputs of the model for each conversation, and the number of truncated tokens."""
        if not conversations:
            return []
        before, rest = zip(*map(self._split, conversations))
        texts = (list(before), list(rest)) if self._text == "pair" else ([a + b for a, b in zip(before, rest)],)
        encoded = self._tokenizer(
            *texts,
            add_special_tokens=self._text != "chat",  # a template contains the special tokens, including BOS
            return_attention_mask=True,
            return_special_tokens_mask=True,
            verbose=False,  # no warnings about long texts
        )
        rows = [dict(zip(encoded, columns)) for columns in zip(*encoded.values())]
        return [self._cut(row) for row in rows]

    def _cut(self, row: _Row) -> tuple[_Row, int]:
        """Truncate to the limit on the left, but keep the tokens that the tokenizer adds."""
        ids, special = row["input_ids"], row["special_tokens_mask"]
        stays = [flag or index == 0 and ids[0] in self._beginnings for index, flag in enumerate(special)]
        droppable = [index for index, flag in enumerate(stays) if not flag]
        cut = set(droppable[: max(len(ids) - self._max_length, 0)])
        taken = {key: values for key, values in row.items() if key in self._parameters}
        return {key: [v for i, v in enumerate(values) if i not in cut] for key, values in taken.items()}, len(cut)

    @torch.inference_mode()
    def _logits(self, rows: Sequence[_Row]) -> torch.Tensor:
        """Logits (B, C) of rows padded on the right.

        A head on the last token uses the last token that is not the *model's* padding token. Rows are padded with that
        token, not with the tokenizer's, so that a text ends at the same position as without padding, even if the token
        is also the EOS of the texts (cf. transformers issue 35352). If the model has no padding token, an id that does
        not occur in the batch is set as its padding token.
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
        """Rewards (B, number of labels)."""
        return torch.stack([self._reward_of(label, logits) for label in self._labels], dim=1)

    def _reward_of(self, label: int, logits: torch.Tensor) -> torch.Tensor:
        chosen = logits[:, label]
        if self._options.output == "logit":
            return chosen
        log_odds = chosen  # for a sigmoid; for a softmax subtract the logsumexp of the other logits
        if logits.shape[1] > 1 and self._model.config.problem_type != "multi_label_classification":
            others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
            log_odds = chosen - others.logsumexp(1)
        return log_odds if self._options.output == "log_odds" else log_odds.sigmoid()


def _check_weights(model: Any, missing_keys: Iterable[str], tokens: int, embeddings: int, location: str) -> None:
    """Refuse randomly initialised weights and tokens without an embedding; transformers only warns of them."""
    missing = sorted(set(missing_keys) & {name for name, _ in model.named_parameters()})
    if missing:
        lacks = f"its checkpoint lacks {', '.join(missing[:4])}"
        raise ValueError(f"{location} has no trained classification head, or is incomplete: {lacks}")
    if tokens > embeddings:
        raise ValueError(
            f"the tokenizer of {location} has {tokens} tokens, but its model has only {embeddings} embeddings"
        )


def _check_tokenizer(tokenizer: Any, location: str) -> None:
    """Refuse a folder without a vocabulary, for which transformers creates a tokenizer of special tokens only."""
    files = set(tokenizer.vocab_files_names.values())
    if files and Path(location).is_dir() and not any((Path(location) / file).is_file() for file in files):
        raise ValueError(f"{location} must hold the model's tokenizer, one of {', '.join(sorted(files))}, found none")


def _find_label(label: int | str | None, names: Mapping[int, str], location: str) -> int:
    known = ", ".join(f"{index}: {name}" for index, name in names.items())
    if label is None and len(names) > 1:
        raise ValueError(f"{location} has {len(names)} logits, so label must be one of {known}")
    if isinstance(label, str):
        matches = [index for index, name in names.items() if name == label]
        matches = matches or [index for index, name in names.items() if name.lower() == label.lower()]
    else:
        matches = [index for index in names if index == (label or 0)]
    if len(matches) != 1:
        raise ValueError(f"label must be one of the labels of {location} ({known}), found {label!r}")
    return matches[0]


def _find_limit(max_length: int | None, tokenizer: int, positions: int, special: int, location: str) -> int:
    """``max_length``, or by default the limit of tokenizer and model."""
    if max_length and positions and max_length > positions:
        raise ValueError(f"max_length must be at most {positions}, the positions of {location}, found {max_length}")
    limit = min(max_length or tokenizer, positions or _NO_LIMIT)
    if limit >= _NO_LIMIT:
        raise ValueError(f"max_length is required: neither the model nor the tokenizer of {location} has a limit")
    if limit <= special:
        raise ValueError(f"max_length must be more than the {special} special tokens of a text, found {limit}")
    return limit


def _positions(model: Any) -> int:
    """Number of tokens for which the model has positions; 0 if unknown."""
    config = model.config.get_text_config()
    known = max(getattr(config, name, None) or 0 for name in ("max_position_embeddings", "n_positions"))
    # RoBERTa and similar models number positions from the id of the padding token on.
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    starts = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return max(known - max(starts, default=0), 0)


def _as_text(content: Any) -> str:
    """The text of a message, whose content may be a list of parts. Parts other than text are ignored."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or () if part["type"] == "text")

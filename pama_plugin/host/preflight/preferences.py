"""The texts of prompts with room for a preference, and the checks of data sets before Ray starts."""

import argparse
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError

from pama_plugin.errors import ConfigError
from pama_plugin.host.preflight.tokenizers import POLICY, NeedsItsOwnCode, load, read_tokenizer
from pama_plugin.settings.preferences import CLOSE, OPEN, Template, fill_slots, read_weights
from pama_plugin.settings.run import PamaConfig


def check_preferences(args: argparse.Namespace, config: PamaConfig, read: Mapping[str, list[Any]]) -> list[str]:
    """Refuse a column without weights, and prompts that have no place for a preference.

    Args:
        args: OpenRLHF's flags, flat.
        config: with --pama.preferences.
        read: flag → rows of each of its data sets.

    Returns:
        A warning if the policy's tokenizer cannot be read here.

    Raises:
        ConfigError: names the flag, the data set, the row and the requirement.
    """
    if getattr(args, "eval.dataset") and find_spec("moocore") is None:
        raise ConfigError(
            "--pama.preferences with --eval.dataset needs pip install 'pama_plugin[report]', for the hypervolume; "
            "found no moocore"
        )
    flag = f"--pama.preferences {config.preferences}"
    column = config.preference_source.column if config.preference_source else ""
    for place, rows in _named(args, read, ["data.prompt_dataset"] if column else []):
        if column not in rows.column_names:
            raise ConfigError(f"{flag}: {place} must have the column {column}, found {', '.join(rows.column_names)}")
        for number, value in enumerate(rows[column]):
            try:
                read_weights(value, config.trained_names)
            except ValueError as error:
                raise ConfigError(f"{flag}: {place}, row {number}: {error}") from None
    key, around, chat = (
        getattr(args, f"data.{name}") for name in ("input_key", "input_template", "apply_chat_template")
    )
    template, tokenizer, policy = config.template, None, getattr(args, POLICY.removeprefix("--"))
    if policy is not None:
        try:
            tokenizer = load(read_tokenizer, POLICY, policy)
        except (LocalEntryNotFoundError, NeedsItsOwnCode) as error:
            return [f"not checked whether every prompt has room for its preference: {error}"]
    longest = getattr(args, "data.max_len") - (getattr(args, "rollout.max_new_tokens") or 1)
    for place, rows in _named(args, read, list(read)):
        seen: set[str] = set()
        for number, row in enumerate(rows):
            content = row[key]
            # The chat template, which takes most time, is asked once for each shape of a conversation.
            shape = "" if isinstance(content, str) else str([message.get("role") for message in content])
            simple = len(str(content)) < longest and OPEN not in str(content)  # a token has a character or more
            try:
                if shape in seen and simple:
                    _place(template, content, number, chat)
                    continue
                text = text_with_slots(template, row, number, tokenizer, key, around, chat)
            except ConfigError as error:
                raise ConfigError(f"{place}: {error}") from error
            seen.add(shape)
            if tokenizer is None:
                continue
            written = fill_slots(text, template, config.evaluated_preferences[0])
            if (tokens := len(tokenizer(written, add_special_tokens=False)["input_ids"])) > longest:
                raise ConfigError(
                    f"{place}, row {number}: a prompt with its preference must have at most {longest} tokens "
                    "(--data.max_len minus --rollout.max_new_tokens), because OpenRLHF cuts off its beginning, found "
                    f"{tokens}"
                )
    return []


def _named(args: argparse.Namespace, read: Mapping[str, list[Any]], flags: list[str]) -> Iterator[tuple[str, Any]]:
    """Each data set of these flags, with the words for it in an error."""
    for flag in flags:
        yield from zip((f"--{flag} {name}" for name in getattr(args, flag).split(",")), read[flag])


def text_with_slots(
    template: Template,
    row: Mapping[str, Any],
    number: int,
    tokenizer: Any,
    input_key: str,
    input_template: str | None,
    chat: bool,
) -> str:
    """The prompt of a row as OpenRLHF makes it, with slots for a preference where the template has them.

    Args:
        template: see ``parse_template``.
        row: of the data set.
        number: of the row, for errors.
        tokenizer: the policy's, with its chat template.
        input_key: OpenRLHF's flags --data.input_key, --data.input_template and (``chat``) --data.apply_chat_template.

    Raises:
        ConfigError: there is no place for the preference, or the chat template drops it.
    """
    from openrlhf.datasets.prompts_dataset import preprocess_data  # late: imports the package datasets

    changed = dict(row) | {input_key: _place(template, row[input_key], number, chat)}
    apply = tokenizer.apply_chat_template if chat else None
    try:
        text, _ = preprocess_data(changed, input_template, input_key, None, apply)
    except Exception as error:  # of a chat template, which may refuse system messages
        raise ConfigError(f"row {number}: the chat template refuses the preference: {error}") from error
    found = [text.count(slot) for slot in template.slots]
    if set(found) != {1} or text.count(OPEN) != len(found) or text.count(CLOSE) != len(found):
        where = "the system message" if template.is_system_message else "the user's text"
        raise ConfigError(
            f"row {number}: the prompt must have the preference once, which --pama.preference_template puts into "
            f"{where}, found it {min(found)} times: {text[:200]!r}"
        )
    return str(text)


def _place(template: Template, content: Any, number: int, chat: bool) -> Any:
    """The prompt of the data set with the template in it: a text, or messages."""
    if isinstance(content, str):
        if not template.is_system_message:
            return template.with_slots(content)
        if chat:
            return [{"role": "system", "content": template.with_slots()}, {"role": "user", "content": content}]
        raise ConfigError(
            "--pama.preference_template must have {prompt}, the text of the user, without --data.apply_chat_template"
        )
    messages = [dict(message) for message in content]
    if template.is_system_message:
        if messages and messages[0].get("role") == "system":
            if not isinstance(messages[0]["content"], str):
                raise ConfigError(
                    f"row {number}: the system message must be a text, found {messages[0]['content']!r:.100}"
                )
            messages[0]["content"] = f"{messages[0]['content']}\n{template.with_slots()}"
            return messages
        return [{"role": "system", "content": template.with_slots()}, *messages]
    last = [message for message in messages if message.get("role") == "user"][-1:]
    if not last or not isinstance(last[0]["content"], str):
        raise ConfigError(f"row {number}: a prompt with a preference must have a user's message of text, found none")
    last[0]["content"] = template.with_slots(last[0]["content"])
    return messages

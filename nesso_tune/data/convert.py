"""From a row of a data set to a conversation or a preference pair, or to the reason why it cannot be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nesso_tune.conversation import UNKNOWN_LANGUAGE, Conversation, Message, PreferencePair
from nesso_tune.data.formats import DataFormat, Row, find
from nesso_tune.recipes.sections import Source

LANGUAGE_NAMES = {"italian": "it", "italiano": "it", "ita": "it", "english": "en", "inglese": "en", "eng": "en"}


class Unusable(Exception):
    """A row that cannot be used. Its text is the reason, a word that drops are counted under."""


def to_conversation(row: Row, fmt: DataFormat, language: str, source: str) -> Conversation:
    """The conversation that a row holds.

    Raises:
        Unusable: with the reason.
    """
    if row.get("tools") or row.get("tool_calls"):
        raise Unusable("tool_calls_not_supported")
    if fmt.kind == "conversation":
        messages = _messages(_column(row, fmt.messages_field), fmt)
    else:
        prompt, extra = _text(_column(row, fmt.prompt_field)), find(row, fmt.input_field)
        further = _text(row[extra]) if extra and row[extra] is not None else ""
        answer = _text(_column(row, fmt.response_field))
        messages = [Message("user", f"{prompt}\n\n{further}" if further.strip() else prompt)]
        messages.append(Message("assistant", answer))
    messages = [*_system(row, fmt, messages), *messages]
    if not any(message.role == "assistant" for message in messages):
        raise Unusable("no_assistant_turn")
    if any(message.role == "assistant" and not message.content.strip() for message in messages):
        raise Unusable("empty_answer")
    return Conversation(tuple(messages), language=language, source=source)


def to_pair(row: Row, fmt: DataFormat, language: str, source: str) -> PreferencePair:
    """The preference pair that a row holds.

    Raises:
        Unusable: with the reason.
    """
    prompt_column = find(row, fmt.prompt_field)
    prompt = _turns(row[prompt_column], "user", fmt) if prompt_column and row[prompt_column] is not None else []
    chosen = _turns(_column(row, fmt.chosen_field), "assistant", fmt)
    rejected = _turns(_column(row, fmt.rejected_field), "assistant", fmt)
    if len(chosen) > 1 or len(rejected) > 1:  # whole dialogues: the prompt is what both begin with
        shared = chosen[:-1]
        if shared != rejected[:-1]:
            raise Unusable("no_common_prompt")
        if prompt and shared[-len(prompt) :] != prompt:
            raise Unusable("prompt_differs_from_dialogue")
        prompt, chosen, rejected = shared, chosen[-1:], rejected[-1:]
    if not prompt:
        raise Unusable("no_prompt")
    prompt = [*_system(row, fmt, prompt), *prompt]
    better, worse = chosen[0], rejected[0]
    if better.role != "assistant" or worse.role != "assistant" or prompt[-1].role == "assistant":
        raise Unusable("answer_not_by_assistant")
    if not better.content.strip() or not worse.content.strip():
        raise Unusable("empty_answer")
    if better.content == worse.content:
        raise Unusable("chosen_equals_rejected")
    return PreferencePair(tuple(prompt), better, worse, language=language, source=source)


def language_of(row: Row, source: Source) -> str:
    """The language code of a row: the source's, or that of the row's own field; `und` if neither says.

    Raises:
        Unusable: if it is not Unicode text.
    """
    if source.language is not None:
        return _code(source.language)
    names = (source.language_field,) if source.language_field else ("language", "lang")
    column = find(row, names)
    said = row[column] if column else None
    if not isinstance(said, str) or not said.strip():
        return UNKNOWN_LANGUAGE
    return _code(_text(said))


def _code(said: str) -> str:
    """`it` for `it`, `IT`, `it-IT`, `ita` and `Italian`."""
    code = said.strip().lower().replace("_", "-").split("-")[0]
    return LANGUAGE_NAMES.get(code, code)


def _column(row: Row, names: Sequence[str]) -> Any:
    column = find(row, names)
    if column is None or row[column] is None:
        raise Unusable("missing_field")
    return row[column]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unusable("content_not_text")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        raise Unusable("invalid_unicode") from None
    return value


def _messages(value: Any, fmt: DataFormat) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Unusable("no_messages")
    return [_message(entry, fmt) for entry in value]


def _message(entry: Any, fmt: DataFormat) -> Message:
    if not isinstance(entry, Mapping):
        raise Unusable("message_not_an_object")
    if entry.get("tool_calls"):
        raise Unusable("tool_calls_not_supported")
    said = _column(entry, fmt.role_field)
    role = fmt.roles.get(said) if isinstance(said, str) else None
    if role is None:
        raise Unusable("unknown_role")
    train = entry.get("train")
    if train is not None and not isinstance(train, bool):
        raise Unusable("train_not_true_or_false")
    name = entry.get("name")
    return Message(
        role, _text(_column(entry, fmt.content_field)), name=name if isinstance(name, str) else None, train=train
    )


def _turns(value: Any, role: str, fmt: DataFormat) -> list[Message]:
    """A text as one turn of `role`, one message, or a list of messages."""
    if isinstance(value, str):
        return [Message(role, _text(value))]
    return [_message(value, fmt)] if isinstance(value, Mapping) else _messages(value, fmt)


def _system(row: Row, fmt: DataFormat, messages: Sequence[Message]) -> list[Message]:
    column = find(row, fmt.system_field)
    text = row[column] if column else None
    if not isinstance(text, str) or not text.strip() or messages[0].role == "system":
        return []
    return [Message("system", _text(text))]

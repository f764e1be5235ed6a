"""From a row of a data set to a conversation or a preference pair, or to the reason why it cannot be used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nesso_tune.conversation import UNKNOWN_LANGUAGE, Conversation, Message, PreferencePair
from nesso_tune.data.formats import DataFormat, Row, find
from nesso_tune.data.tools import Tool, Unusable, read_calls, read_json, read_tools
from nesso_tune.recipes.sections import Source

AUTO = "auto"  # of a source's language
LANGUAGE_NAMES = {
    "italian": "it", "italiano": "it", "ita": "it", "english": "en", "inglese": "en", "eng": "en", "french": "fr",
    "german": "de", "spanish": "es", "portuguese": "pt",
}  # fmt: skip
CODE = re.compile(r"[a-z]{2,3}")


def to_conversation(row: Row, fmt: DataFormat, language: str, source: str) -> Conversation:
    """The conversation that a row holds.

    Raises:
        Unusable: with the reason.
    """
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
    if any(_says_nothing(message) for message in messages if message.role == "assistant"):
        raise Unusable("empty_answer")
    return Conversation(tuple(messages), _tools(row, fmt), language, source)


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
    if _says_nothing(better) or _says_nothing(worse):
        raise Unusable("empty_answer")
    if (better.content, better.tool_calls) == (worse.content, worse.tool_calls):
        raise Unusable("chosen_equals_rejected")
    return PreferencePair(tuple(prompt), better, worse, language, source, _tools(row, fmt))


def language_of(row: Row, source: Source) -> str:
    """The language code of a row: the source's, or that of the row's own field; `und` if neither says.

    `language: auto` is the row's own too; where a row says nothing, its words are asked (`languages.py`).

    Raises:
        Unusable: if it is not Unicode text.
    """
    if source.language not in (None, AUTO):
        return _code(source.language)
    names = (source.language_field,) if source.language_field else ("language", "lang")
    column = find(row, names)
    said = row[column] if column else None
    if not isinstance(said, str) or not said.strip():
        return UNKNOWN_LANGUAGE
    return _code(_text(said))


def _code(said: str) -> str:
    """`it` for `it`, `IT`, `it-IT`, `ita` and `Italian`; `und` for what is no code, e.g. `Python`."""
    code = said.strip().lower().replace("_", "-").split("-")[0]
    code = LANGUAGE_NAMES.get(code, code)
    return code if CODE.fullmatch(code) else UNKNOWN_LANGUAGE


def _column(row: Row, names: Sequence[str]) -> Any:
    column = find(row, names)
    if column is None or row[column] is None:
        raise Unusable("missing_field", f"no {' or '.join(names)} in {', '.join(row) or 'an empty object'}")
    return row[column]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unusable("content_not_text", type(value).__name__)
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        raise Unusable("invalid_unicode") from None
    return value


def _messages(value: Any, fmt: DataFormat) -> list[Message]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = read_json(value, "no_messages")
    if not isinstance(value, list) or not value:
        raise Unusable("no_messages")
    messages: list[Message] = []
    for entry in value:
        message, last = _message(entry, fmt), messages[-1] if messages else None
        of_one_turn = last is not None and last.role == "assistant" and last.train == message.train
        if last is not None and of_one_turn and _is_call(entry, fmt):  # its words, then its calls
            messages.pop()
            message = replace(last, tool_calls=(*last.tool_calls, *message.tool_calls))
        messages.append(message)
    return messages


def _message(entry: Any, fmt: DataFormat) -> Message:
    if not isinstance(entry, Mapping):
        raise Unusable("message_not_an_object")
    said = _column(entry, fmt.role_field)
    train = entry.get("train")
    if train is not None and not isinstance(train, bool):
        raise Unusable("train_not_true_or_false")
    if _is_call(entry, fmt):
        return Message("assistant", "", read_calls(_column(entry, fmt.content_field)), train=train)
    role = fmt.role_of(said)
    if role is None:
        raise Unusable("unknown_role", f"`{said}`")
    calls = read_calls(entry["tool_calls"]) if entry.get("tool_calls") else ()
    if calls and role != "assistant":
        raise Unusable("tool_call_not_by_assistant")
    column = find(entry, fmt.content_field)
    silent = bool(calls) and (column is None or entry[column] is None)  # a turn that only calls
    content = "" if silent else _content(_column(entry, fmt.content_field))
    name = entry.get("name")
    return Message(role, content, calls, name if isinstance(name, str) else None, train)


def _content(value: Any) -> str:
    """A message's text: as it is, or as parts `[{"type": "text", "text": …}]`, which follow each other."""
    if not isinstance(value, list) or not value or not all(isinstance(part, Mapping) for part in value):
        return _text(value)
    kinds = [str(part.get("type", "text")) for part in value]
    if foreign := next((kind for kind in kinds if kind != "text"), None):
        raise Unusable("content_part_not_text", foreign)
    return "".join(_text(part.get("text")) for part in value)


def _is_call(entry: Mapping[str, Any], fmt: DataFormat) -> bool:
    """Whether the whole message is a call, as sharegpt writes it: the role says so, the content is JSON."""
    column = find(entry, fmt.role_field)
    return column is not None and entry[column] in fmt.call_roles


def _says_nothing(message: Message) -> bool:
    return not message.content.strip() and not message.tool_calls


def _tools(row: Row, fmt: DataFormat) -> tuple[Tool, ...]:
    column = find(row, fmt.tools_field)
    return read_tools(row[column]) if column else ()


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

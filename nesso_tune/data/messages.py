"""Messages of a record: lists of objects with a role and a text, exchanges, and texts with marked turns."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nesso_tune.conversation import Message
from nesso_tune.data.columns import Found, Row, Unusable, check_text, missing
from nesso_tune.data.formats import DataFormat, split_turns
from nesso_tune.data.tools import Tool, parse_list, read_calls

NUMBER_AS_TEXT, OBJECT_AS_TEXT = "number_as_text", "object_as_text"  # names of anomalies
_TEXT_PARTS, _REASONING_PARTS = ("text", "input_text", "output_text"), ("reasoning", "thinking")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_CALL_PARTS = ("tool_call", "function_call")
_FLAGS, _MASKS = ("train", "training", "loss", "masked"), ("weight", "loss_mask")  # true or false; 1 or 0
_SUPERVISION_KEYS = (*_FLAGS, *_MASKS)
_ROLE_DECIDES = ("weight", "masked")  # weight 1 and masked false exclude nothing, so the role of the turn decides
_RESULT_KEYS = ("name", "tool_call_id")  # of a tool result: which call it answers, which its position says too


def to_messages(value: Any, data_format: DataFormat, row: Row | None = None, path: str = "messages") -> list[Message]:
    """The messages of a list, of a JSON text of one, or of one text with marked turns.

    Args:
        value: the list or text.
        data_format: names of keys and roles.
        row: the record, which notes unread keys.
        path: name of the column, which the names of unread keys begin with.

    Raises:
        Unusable: with the reason.
    """
    row = row or Row({})
    if isinstance(value, str):
        if (turns := split_turns(value, data_format.turn_markers)) is not None:
            return [Message(role, check_text(text)) for role, text in turns]
        value = parse_list(value, "no_messages") if value.lstrip().startswith("[") else value
    if not isinstance(value, list) or not value:
        raise Unusable("no_messages")
    if data_format.turn_fields:
        return [message for entry in value for message in _exchange(entry, data_format, row, path)]
    messages: list[Message] = []
    if data_format.speakers:
        value = _assign_speakers(value, data_format)
    for entry in value:
        message = to_message(entry, data_format, row, path)
        if message.tool_calls and messages and _is_call(entry, data_format):
            last = messages[-1]
            if (last.role, last.train, message.reasoning) == ("assistant", message.train, None):  # a text, its calls
                messages.pop()
                message = replace(last, tool_calls=(*last.tool_calls, *message.tool_calls))
        messages.append(message)
    return messages


def answer_text(value: Any, row: Row) -> str:
    """The text of an answer; a number or truth value is written as in JSON, and noted as an anomaly.

    Raises:
        Unusable: for other types.
    """
    if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        row.anomalies.add(NUMBER_AS_TEXT)
        return json.dumps(value)
    return check_text(value)


def _result_text(value: Any, row: Row) -> str:
    """The text of a tool's result: as of an answer; an object or a list is written as JSON, and noted as an anomaly."""
    if not isinstance(value, (list, Mapping)):
        return answer_text(value, row)
    row.anomalies.add(OBJECT_AS_TEXT)
    return check_text(json.dumps(value, ensure_ascii=False, default=str))


def text_of_parts(value: Any, row: Row, path: str) -> str:
    """The text of a list of parts that are all texts. Raises Unusable for others."""
    text, calls, thoughts = _read_content(value, "system", row, path)
    if calls or thoughts:
        raise Unusable("content_part_not_text")
    return text


def _assign_speakers(value: list[Any], data_format: DataFormat) -> list[dict[str, Any]]:
    """Texts without roles as messages, with the format's speakers in turn."""
    texts = [text for entry in value for text in (entry if isinstance(entry, list) else [entry])]
    role, content = data_format.role_keys[0], data_format.content_keys[0]
    if not texts:
        raise Unusable("no_messages")
    speakers = data_format.speakers
    return [{role: speakers[i % len(speakers)], content: text} for i, text in enumerate(texts)]


def _exchange(entry: Any, data_format: DataFormat, row: Row, path: str) -> list[Message]:
    """The turns of an object with one text per role, `{"input": …, "output": …}`."""
    if not isinstance(entry, Mapping):
        raise Unusable("message_not_an_object")
    turns = [(role, *first_key(entry, names)) for role, names in data_format.turn_fields.items()]
    row.note_unread(path, entry, [key for _, key, _ in turns])
    if all(value is None for _, _, value in turns):
        raise missing(entry, [name for names in data_format.turn_fields.values() for name in names])
    return [
        Message(role, answer_text(value, row) if role == "assistant" else check_text(value))
        for role, _, value in turns
        if value is not None
    ]


def to_message(entry: Any, data_format: DataFormat, row: Row, path: str) -> Message:
    """One message. All keys of messages are read here; those that are not are noted in the row."""
    if not isinstance(entry, Mapping):
        raise Unusable("message_not_an_object")
    if len(entry) == 2 and (message := _plain_message(entry, data_format)) is not None:
        return message
    role_key, data_role = first_key(entry, data_format.role_keys)
    if data_role is None:
        raise missing(entry, data_format.role_keys)
    content_key, value = first_key(entry, data_format.content_keys)
    train = _supervision(entry) if len(entry) > 2 else None
    is_call = isinstance(data_role, str) and data_role in data_format.call_roles
    role = "assistant" if is_call else data_role if data_role in data_format.speakers else None
    role = role or data_format.role_of(data_role)
    if role is None:
        raise Unusable("unknown_role", f"`{data_role}`")
    calls_key = None if is_call else _calls_key(entry)
    if value is None and calls_key is None:  # a message with calls needs no content
        raise missing(entry, data_format.content_keys)
    calls = () if calls_key is None else read_calls(entry[calls_key], row, f"{path}.{calls_key}")
    thoughts: list[str] = []
    if is_call:
        content, calls_in_content = "", read_calls(value, row, f"{path}.{content_key}")
    elif value is None:
        content, calls_in_content = "", ()
    else:
        content, calls_in_content, thoughts = _read_content(value, role, row, f"{path}.{content_key}")
    reasoning = _read_reasoning(entry, thoughts) if len(entry) > 2 or thoughts else None
    if reasoning is not None and role != "assistant":
        raise Unusable("reasoning_not_by_assistant")
    if (calls or calls_in_content) and role != "assistant":
        raise Unusable("tool_call_not_by_assistant")
    name = entry["name"] if isinstance(entry.get("name"), str) else None
    if len(entry) > 2:
        keys = {
            role_key,
            content_key or data_format.content_keys[0],
            "tool_calls",
            *_SUPERVISION_KEYS,
            *_REASONING_KEYS,
        }
        keys |= {*(_RESULT_KEYS if role == "tool" else ()), calls_key or "function_call"}
        row.note_unread(path, entry, keys)
    return Message(role, content, (*calls, *calls_in_content), name, train, reasoning)


def _plain_message(entry: Mapping[str, Any], data_format: DataFormat) -> Message | None:
    """The message of an object with nothing but a role and a text, as most have; None for others."""
    role, content = entry.get(data_format.role_keys[0]), entry.get(data_format.content_keys[0])
    if type(role) is not str or type(content) is not str or role in data_format.call_roles:
        return None
    known = role if role in data_format.speakers else data_format.role_of(role)
    return None if known is None else Message(known, content if content.isascii() else check_text(content))


def first_key(entry: Mapping[str, Any], names: Sequence[str]) -> Found:
    """The first of these keys of a message that is not null."""
    for name in names:
        if (value := entry.get(name)) is not None:
            return name, value
    return None, None


def _calls_key(entry: Mapping[str, Any]) -> str | None:
    """The key with the calls of a message: `tool_calls`, or the older `function_call` with one call."""
    return next((key for key in ("tool_calls", "function_call") if entry.get(key)), None)


def _supervision(entry: Mapping[str, Any]) -> bool | None:
    """Whether a message says that it is supervised; None if the role decides.

    Raises:
        Unusable: if a value is none of those of its key (a weight of 0.5, say), or two keys contradict each other.
    """
    said: dict[str, bool] = {}
    for key in _SUPERVISION_KEYS:
        value = entry.get(key)
        if value is None:
            continue
        if key in _FLAGS and not isinstance(value, bool):
            raise Unusable(f"{key}_not_true_or_false", f"{value!r}")
        if key in _MASKS and value not in (0, 1):
            raise Unusable(f"{key}_not_0_or_1", f"{value!r}")
        said[key] = bool(value) != (key == "masked")
    if len(set(said.values())) > 1:
        raise Unusable("supervision_contradictory", ", ".join(f"{key} {entry[key]!r}" for key in said))
    if False in said.values():
        return False
    return True if said.keys() - _ROLE_DECIDES else None


def _is_call(entry: Mapping[str, Any], data_format: DataFormat) -> bool:
    """Whether a message is a tool call by its role and its content is JSON, as in sharegpt."""
    role = first_key(entry, data_format.role_keys)[1]
    return isinstance(role, str) and role in data_format.call_roles


def _read_reasoning(entry: Mapping[str, Any], thoughts: Sequence[str]) -> str | None:
    """The reasoning of a message, under keys or in parts. Raises Unusable if it is not a text, or texts differ."""
    found = [text for key in _REASONING_KEYS if (text := entry.get(key)) is not None]
    if not found and not thoughts:
        return None
    if not all(isinstance(text, str) for text in found):
        raise Unusable("reasoning_not_text")
    texts = dict.fromkeys(check_text(text) for text in (*found, "".join(thoughts)) if text.strip())
    if len(texts) > 1:
        raise Unusable("reasoning_given_twice")
    return next(iter(texts), None)


def is_parts(value: Any) -> bool:
    """Whether a value is a list of objects, such as the parts of a content."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, Mapping) for part in value)


def _read_content(value: Any, role: str, row: Row, path: str) -> tuple[str, tuple[Tool, ...], list[str]]:
    """The text, calls and reasoning of a message: a text, or a list of parts `[{"type": "text", "text": …}]`.

    Texts are concatenated. Tags such as `<think>` in a text are text.
    """
    if isinstance(value, str) and value.isascii():
        return value, (), []
    if not is_parts(value) or (role == "tool" and not all("type" in part for part in value)):
        text_of = {"assistant": answer_text, "tool": _result_text}.get(role)
        return (check_text(value) if text_of is None else text_of(value, row)), (), []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Tool] = []
    for part in value:
        kind = part.get("type", "text")
        key, content = first_key(part, ("text", "value", str(kind)))
        row.note_unread(path, part, ("type", key))
        if kind in _TEXT_PARTS:
            texts.append(check_text(content))
        elif kind in _REASONING_PARTS:
            thoughts.append(check_text(content))
        elif kind in _CALL_PARTS:
            calls += read_calls(content, row, f"{path}.{key}")
        else:
            raise Unusable("content_part_not_text", str(kind))
    return "".join(texts), tuple(calls), thoughts

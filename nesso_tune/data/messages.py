"""The turns of a row: messages with roles, texts said in turn, content as text or in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nesso_tune.conversation import Message
from nesso_tune.data.formats import DataFormat, Row, lookup
from nesso_tune.data.tools import Tool, Unusable, read_calls, read_json

TEXT_PARTS, THOUGHT_PARTS = ("text", "input_text", "output_text"), ("reasoning", "thinking")
CALL_PARTS = ("tool_call", "function_call")


def column_of(row: Row, names: Sequence[str]) -> Any:
    """The value of the first of these columns. Raises Unusable if a row has none."""
    value = lookup(row, names)
    if value is None:
        raise Unusable("missing_field", f"no {' or '.join(names)} in {', '.join(map(str, row)) or 'an empty object'}")
    return value


def text_of(value: Any) -> str:
    """A value that must be a text. Raises Unusable for anything else."""
    if not isinstance(value, str):
        raise Unusable("content_not_text", type(value).__name__)
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        raise Unusable("invalid_unicode") from None
    return value


def messages_of(value: Any, fmt: DataFormat) -> list[Message]:
    """The messages of a list, or of one as JSON text. Raises Unusable with the reason."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = read_json(value, "no_messages")
    if not isinstance(value, list) or not value:
        raise Unusable("no_messages")
    messages: list[Message] = []
    if fmt.speakers:
        value = _spoken(value, fmt)
    for entry in value:
        message = _message(entry, fmt)
        if messages and _is_call(entry, fmt):
            last = messages[-1]
            if last.role == "assistant" and last.train == message.train:  # its words, then its calls
                messages.pop()
                message = replace(last, tool_calls=(*last.tool_calls, *message.tool_calls))
        messages.append(message)
    return messages


def _spoken(value: list[Any], fmt: DataFormat) -> list[dict[str, Any]]:
    """Texts without roles as messages, said in turn by the format's speakers."""
    texts = [text for entry in value for text in (entry if isinstance(entry, list) else [entry])]
    role, content = fmt.role_keys[0], fmt.content_keys[0]
    if not texts:
        raise Unusable("no_messages")
    return [{role: fmt.speakers[i % len(fmt.speakers)], content: text} for i, text in enumerate(texts)]


def _message(entry: Any, fmt: DataFormat) -> Message:
    if not isinstance(entry, Mapping):
        raise Unusable("message_not_an_object")
    said = column_of(entry, fmt.role_keys)
    train = entry.get("train")
    if train is not None and not isinstance(train, bool):
        raise Unusable("train_not_true_or_false")
    if isinstance(said, str) and said in fmt.call_roles:
        return Message("assistant", "", read_calls(column_of(entry, fmt.content_keys)), train=train)
    role = said if said in fmt.speakers else fmt.role_of(said)
    if role is None:
        raise Unusable("unknown_role", f"`{said}`")
    calls = read_calls(entry["tool_calls"]) if entry.get("tool_calls") else ()
    words = lookup(entry, fmt.content_keys)
    if words is None and not calls:  # with calls it is a turn that only calls
        column_of(entry, fmt.content_keys)
    content, within = ("", ()) if words is None else (words, ()) if _is_plain(words) else _content(words)
    if (calls or within) and role != "assistant":
        raise Unusable("tool_call_not_by_assistant")
    name = entry.get("name")
    return Message(role, content, (*calls, *within), name if isinstance(name, str) else None, train)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and value.isascii()


def _content(value: Any) -> tuple[str, tuple[Tool, ...]]:
    """A message's text and calls: a text as it is, or parts `[{"type": "text", "text": …}]`, which follow each other.

    Reasoning is written between `<think>` and `</think>`, as the Qwen and DeepSeek models write it.
    """
    if not isinstance(value, list) or not value or not all(isinstance(part, Mapping) for part in value):
        return text_of(value), ()
    texts: list[str] = []
    calls: list[Tool] = []
    for part in value:
        kind = part.get("type", "text")
        said = lookup(part, ("text", "value", str(kind)))
        if kind in TEXT_PARTS:
            texts.append(text_of(said))
        elif kind in THOUGHT_PARTS:
            texts.append(f"<think>\n{text_of(said)}\n</think>\n\n")
        elif kind in CALL_PARTS:
            calls += read_calls(said)
        else:
            raise Unusable("content_part_not_text", str(kind))
    text = "".join(texts)
    return (text.removesuffix("\n\n") if calls else text), tuple(calls)


def _is_call(entry: Mapping[str, Any], fmt: DataFormat) -> bool:
    """Whether the whole message is a call, as sharegpt writes it: the role says so, the content is JSON."""
    said = lookup(entry, fmt.role_keys)
    return isinstance(said, str) and said in fmt.call_roles


def turns_of(value: Any, role: str, fmt: DataFormat) -> list[Message]:
    """A text as one turn of `role`, one message, or a list of messages."""
    if isinstance(value, str):
        return [Message(role, text_of(value))]
    return [_message(value, fmt)] if isinstance(value, Mapping) else messages_of(value, fmt)


def system_of(row: Row, fmt: DataFormat, messages: Sequence[Message]) -> list[Message]:
    """The system message of a row's own column: a text, or a list of texts as lines."""
    said = lookup(row, fmt.system_field)
    if isinstance(said, list) and all(isinstance(line, str) for line in said):
        said = "\n".join(said)
    if not isinstance(said, str) or not said.strip() or messages[0].role == "system":
        return []
    return [Message("system", text_of(said))]


def is_empty(message: Message) -> bool:
    """Whether a turn neither says nor calls anything."""
    return not message.content.strip() and not message.tool_calls

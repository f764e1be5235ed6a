"""Converts a record to an example: a conversation, preference pair, plain text or sequence of token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nesso_tune.chat.encoding import IGNORE_INDEX
from nesso_tune.conversation import (
    UNKNOWN_LANGUAGE,
    Completion,
    Conversation,
    Message,
    PreferencePair,
    Tokenized,
    language_code,
)
from nesso_tune.data.files import Record
from nesso_tune.data.formats import TEMPLATE_COLUMN, DataFormat, find_column, lookup
from nesso_tune.errors import DataError
from nesso_tune.recipes.sections import AUTO, Source

Tool = Mapping[str, Any]
Example = Conversation | Completion | Tokenized | PreferencePair

_MAX_DETAIL = 200  # characters of the data that a reason quotes
_TEXT_PARTS, _REASONING_PARTS = ("text", "input_text", "output_text"), ("reasoning", "thinking")
_CALL_PARTS = ("tool_call", "function_call")


class Unusable(Exception):
    """A record that cannot be used. Its text is the reason, the keyword of the drop counts; `detail` adds to it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail.encode("utf-8", "backslashreplace").decode()[:_MAX_DETAIL]


def to_example(record: Record, data_format: DataFormat, method: str, language: str, source: str) -> Example:
    """The example of a record: a preference pair for `dpo`, any other kind for `sft`.

    Raises:
        Unusable: with the reason.
    """
    if method == "dpo":
        return to_pair(record, data_format, language, source)
    if data_format.kind == "completion":
        text = _check_text(_require(record, data_format.text_field))
        if not text.strip():
            raise Unusable("empty_text")
        return Completion(text, language, source)
    if data_format.kind == "pretokenized":
        return _to_tokenized(record, data_format, language, source)
    return to_conversation(record, data_format, language, source)


def to_conversation(record: Record, data_format: DataFormat, language: str, source: str) -> Conversation:
    """The conversation of a record.

    Raises:
        Unusable: with the reason.
    """
    if data_format.kind == "conversation":
        messages = to_messages(_require(record, data_format.messages_field), data_format)
    else:
        answer = Message("assistant", _check_text(_require(record, data_format.response_field)))
        messages = [Message("user", _prompt(record, data_format)), answer]
    messages = [*_system_message(record, data_format, messages), *messages]
    if not any(message.role == "assistant" for message in messages):
        raise Unusable("no_assistant_turn")
    if any(is_empty(message) for message in messages if message.role == "assistant"):
        raise Unusable("empty_answer")
    return Conversation(tuple(messages), _tools(record, data_format), language, source)


def to_pair(record: Record, data_format: DataFormat, language: str, source: str) -> PreferencePair:
    """The preference pair of a record.

    Raises:
        Unusable: with the reason.
    """
    prompt, chosen, rejected = _prompt_and_answers(record, data_format)
    if len(chosen) > 1 or len(rejected) > 1:  # whole conversations: the prompt is their common beginning
        shared = chosen[:-1]
        if shared != rejected[:-1]:
            raise Unusable("no_common_prompt")
        if prompt and shared[-len(prompt) :] != prompt:
            raise Unusable("prompt_differs_from_dialogue")
        prompt, chosen, rejected = shared, chosen[-1:], rejected[-1:]
    if not prompt:
        raise Unusable("no_prompt")
    prompt = [*_system_message(record, data_format, prompt), *prompt]
    better, worse = chosen[0], rejected[0]
    if better.role != "assistant" or worse.role != "assistant" or prompt[-1].role == "assistant":
        raise Unusable("answer_not_by_assistant")
    if is_empty(better) or is_empty(worse):
        raise Unusable("empty_answer")
    if (better.content, better.tool_calls) == (worse.content, worse.tool_calls):
        raise Unusable("chosen_equals_rejected")
    return PreferencePair(tuple(prompt), better, worse, language, source, _tools(record, data_format))


def to_messages(value: Any, data_format: DataFormat) -> list[Message]:
    """The messages of a list, or of a JSON text of one. Raises Unusable with the reason."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parse_json(value, "no_messages")
    if not isinstance(value, list) or not value:
        raise Unusable("no_messages")
    messages: list[Message] = []
    if data_format.speakers:
        value = _assign_speakers(value, data_format)
    for entry in value:
        message = _to_message(entry, data_format)
        if messages and _is_call(entry, data_format):
            last = messages[-1]
            if last.role == "assistant" and last.train == message.train:  # one turn: a text, then its calls
                messages.pop()
                message = replace(last, tool_calls=(*last.tool_calls, *message.tool_calls))
        messages.append(message)
    return messages


def record_language(record: Record, source: Source) -> str:
    """The language code of a record: that of its source, or of its language column; `und` if neither is set.

    With `language: auto` it is that of the column too; where that is empty, the language is detected later.

    Raises:
        Unusable: if the column is not valid Unicode.
    """
    if source.language not in (None, AUTO):
        return language_code(source.language) or UNKNOWN_LANGUAGE
    columns = (source.language_field,) if source.language_field else ("language", "lang")
    value = lookup(record, columns)
    if not isinstance(value, str) or not value.strip():
        return UNKNOWN_LANGUAGE
    return language_code(_check_text(value)) or UNKNOWN_LANGUAGE


def is_empty(message: Message) -> bool:
    """Whether a message has neither text nor tool calls."""
    return not message.content.strip() and not message.tool_calls


def read_tool_file(file: Path) -> tuple[Tool, ...]:
    """The tools in a JSON file: a list of schemas, as in the `tools` column of a data set.

    Raises:
        DataError: if it cannot be read, or does not contain such a list.
    """
    try:
        parsed: Any = json.loads(file.read_text(encoding="utf-8"))
        tools = _read_tools(parsed.get("tools", [parsed]) if isinstance(parsed, dict) else parsed)
    except OSError as error:
        raise DataError(str(file), f"cannot be read ({error.strerror})", "check the path") from None
    except (ValueError, RecursionError, Unusable) as error:
        what = f"is not a list of tools ({error})"
        raise DataError(str(file), what, 'write [{"name": …, "parameters": {…}}]') from None
    if not tools:
        raise DataError(str(file), "contains no tools", 'write [{"name": …, "parameters": {…}}], or remove the key')
    return tools


def _to_tokenized(record: Record, data_format: DataFormat, language: str, source: str) -> Tokenized:
    """The token ids of a record, with its labels, or with labels from its mask.

    Raises:
        Unusable: if they are not integers or differ in length, or a label is neither its token nor -100.
    """
    fields = (data_format.ids_field, data_format.labels_field, data_format.mask_field)
    ids, labels, mask = (lookup(record, names) for names in fields)
    if not _are_integers(ids):
        raise Unusable("ids_not_numbers")
    if labels is None:
        if not isinstance(mask, list) or len(mask) != len(ids) or not all(m in (0, 1) for m in mask):
            raise Unusable("no_labels")
        labels = [token if m else IGNORE_INDEX for token, m in zip(ids, mask, strict=True)]
    if not _are_integers(labels) or len(labels) != len(ids):
        raise Unusable("labels_do_not_fit")
    if any(label not in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True)):
        raise Unusable("labels_do_not_fit", "a label is neither its token nor -100")
    return Tokenized(tuple(ids), tuple(labels), language, source)


def _are_integers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(number) is int for number in value)


def _prompt(record: Record, data_format: DataFormat) -> str:
    """The prompt of a record without messages: its prompt and input columns, or the filled-in template."""
    if data_format.prompt_template is not None:
        return TEMPLATE_COLUMN.sub(
            lambda match: _check_text(_require(record, (match.group(1),))), data_format.prompt_template
        )
    prompt = _check_text(_require(record, data_format.prompt_field))
    further = lookup(record, data_format.input_field)
    columns = (data_format.prompt_field, data_format.input_field)
    if further is None or find_column(record, columns[0]) == find_column(record, columns[1]):
        return prompt
    further = _check_text(further)
    return f"{prompt}\n\n{further}" if further.strip() else prompt


def _prompt_and_answers(record: Record, data_format: DataFormat) -> tuple[list[Message], list[Message], list[Message]]:
    """The prompt of a pair, and the chosen and the rejected answer, either of which may be a whole conversation."""
    if data_format.kind == "choice":
        prompt = [Message("user", _prompt(record, data_format))]
        better, worse = _answers_by_vote(record, data_format)
        return prompt, [Message("assistant", better)], [Message("assistant", worse)]
    value = lookup(record, data_format.prompt_field)
    prompt = [] if value is None else _to_turns(value, "user", data_format)
    chosen = _to_turns(_require(record, data_format.chosen_field), "assistant", data_format)
    rejected = _to_turns(_require(record, data_format.rejected_field), "assistant", data_format)
    return prompt, chosen, rejected


def _to_turns(value: Any, role: str, data_format: DataFormat) -> list[Message]:
    """A text as one message of `role`, a single message, or a list of messages."""
    if isinstance(value, str):
        return [Message(role, _check_text(value))]
    return [_to_message(value, data_format)] if isinstance(value, Mapping) else to_messages(value, data_format)


def _answers_by_vote(record: Record, data_format: DataFormat) -> tuple[str, str]:
    """The better and the worse of two answers, by label or by majority vote."""
    first, second = (_check_text(_require(record, (name,))) for name in data_format.choice_fields)
    votes = [lookup(record, (name,)) for name in data_format.label_fields]
    if all(vote is None for vote in votes):
        raise Unusable("missing_field", f"no {' or '.join(data_format.label_fields)}")
    counts = [sum(_is_label(vote, label) for vote in votes) for label in data_format.labels]
    if counts[0] == counts[1]:
        raise Unusable("no_preferred_answer", "a tie, or no label that the recipe names")
    return (first, second) if counts[0] > counts[1] else (second, first)


def _is_label(vote: Any, label: Any) -> bool:
    """Whether a vote equals a label; 1, 1.0 and "1" are equal, true is not."""
    if isinstance(vote, bool) or isinstance(label, bool):
        return vote is label
    return bool(vote == label or str(vote).strip() == str(label))


def _system_message(record: Record, data_format: DataFormat, messages: Sequence[Message]) -> list[Message]:
    """The system message in a column of its own, a text or a list of lines; none if the messages begin with one."""
    value = lookup(record, data_format.system_field)
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if not isinstance(value, str) or not value.strip() or messages[0].role == "system":
        return []
    return [Message("system", _check_text(value))]


def _assign_speakers(value: list[Any], data_format: DataFormat) -> list[dict[str, Any]]:
    """Texts without roles as messages, with the format's speakers in turn."""
    texts = [text for entry in value for text in (entry if isinstance(entry, list) else [entry])]
    role, content = data_format.role_keys[0], data_format.content_keys[0]
    if not texts:
        raise Unusable("no_messages")
    speakers = data_format.speakers
    return [{role: speakers[i % len(speakers)], content: text} for i, text in enumerate(texts)]


def _to_message(entry: Any, data_format: DataFormat) -> Message:
    if not isinstance(entry, Mapping):
        raise Unusable("message_not_an_object")
    data_role = _require(entry, data_format.role_keys)
    train = entry.get("train")
    if train is not None and not isinstance(train, bool):
        raise Unusable("train_not_true_or_false")
    if isinstance(data_role, str) and data_role in data_format.call_roles:
        return Message("assistant", "", _read_calls(_require(entry, data_format.content_keys)), train=train)
    role = data_role if data_role in data_format.speakers else data_format.role_of(data_role)
    if role is None:
        raise Unusable("unknown_role", f"`{data_role}`")
    calls = _read_calls(entry["tool_calls"]) if entry.get("tool_calls") else ()
    value = lookup(entry, data_format.content_keys)
    if value is None and not calls:  # a message with calls needs no content
        _require(entry, data_format.content_keys)
    content, calls_in_content = ("", ()) if value is None else _read_content(value)
    if (calls or calls_in_content) and role != "assistant":
        raise Unusable("tool_call_not_by_assistant")
    name = entry.get("name")
    return Message(role, content, (*calls, *calls_in_content), name if isinstance(name, str) else None, train)


def _is_call(entry: Mapping[str, Any], data_format: DataFormat) -> bool:
    """Whether a message is a tool call by its role and its content is JSON, as in sharegpt."""
    role = lookup(entry, data_format.role_keys)
    return isinstance(role, str) and role in data_format.call_roles


def _read_content(value: Any) -> tuple[str, tuple[Tool, ...]]:
    """The text and calls of a message: a text, or a list of parts `[{"type": "text", "text": …}]`, concatenated.

    Reasoning is written between `<think>` and `</think>`, as the Qwen and DeepSeek models do.
    """
    if isinstance(value, str) and value.isascii():
        return value, ()
    if not isinstance(value, list) or not value or not all(isinstance(part, Mapping) for part in value):
        return _check_text(value), ()
    texts: list[str] = []
    calls: list[Tool] = []
    for part in value:
        kind = part.get("type", "text")
        content = lookup(part, ("text", "value", str(kind)))
        if kind in _TEXT_PARTS:
            texts.append(_check_text(content))
        elif kind in _REASONING_PARTS:
            texts.append(f"<think>\n{_check_text(content)}\n</think>\n\n")
        elif kind in _CALL_PARTS:
            calls += _read_calls(content)
        else:
            raise Unusable("content_part_not_text", str(kind))
    text = "".join(texts)
    return (text.removesuffix("\n\n") if calls else text), tuple(calls)


def _tools(record: Record, data_format: DataFormat) -> tuple[Tool, ...]:
    return _read_tools(lookup(record, data_format.tools_field))


def _read_tools(value: Any) -> tuple[Tool, ...]:
    """The tools of a column: a list of schemas, or a JSON text of one; each with or without its `function` key.

    Raises:
        Unusable: if it is neither, or a tool has no name or an invalid schema.
    """
    listed = _parse_json(value, "tools_not_readable")
    if listed in (None, "", {}):
        return ()
    if not isinstance(listed, list) or not all(isinstance(tool, Mapping) for tool in listed):
        raise Unusable("tools_not_readable")
    functions = [tool.get("function", tool) for tool in listed]
    if not all(isinstance(f, Mapping) and isinstance(f.get("name"), str) and f["name"] for f in functions):
        raise Unusable("tool_without_name")
    for function in functions:
        if (fault := _schema_fault(function)) is not None:
            raise Unusable("tool_schema_wrong", f"{function['name']}: {fault}")
    return tuple(_check_encodable({"type": "function", "function": dict(f)}, "tools_not_readable") for f in functions)


def _schema_fault(function: Mapping[str, Any]) -> str | None:
    """A description of what is wrong with the parameters of a tool; None if they are valid."""
    parameters = function.get("parameters")
    if parameters in (None, {}):
        return None
    if not isinstance(parameters, Mapping):
        return "its parameters are not an object"
    properties, required = parameters.get("properties") or {}, parameters.get("required") or []
    if parameters.get("type", "object") not in ("object", "dict"):  # BFCL writes `dict`
        return f"its parameters are of type {parameters['type']}"
    if not isinstance(properties, Mapping) or not all(isinstance(schema, Mapping) for schema in properties.values()):
        return "its properties are not schemas"
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return "`required` is not a list of names"
    unknown = [name for name in required if name not in properties]
    return f"it requires {unknown[0]}, which is not among its properties" if unknown else None


def _read_calls(value: Any) -> tuple[Tool, ...]:
    """The tool calls of a message in order: one or a list, as objects or as JSON text.

    Raises:
        Unusable: if a call has no name, or its arguments are not a JSON object.
    """
    listed = _parse_json(value, "tool_call_not_readable")
    calls = listed if isinstance(listed, list) else [listed]
    return tuple(_read_call(call) for call in calls)


def _read_call(call: Any) -> Tool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise Unusable("tool_call_not_readable")
    value = function["arguments"] if "arguments" in function else function.get("parameters", {})  # Llama 3's name
    arguments = _parse_json(value, "tool_call_not_readable")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise Unusable("tool_call_not_readable")
    return _check_encodable({"name": function["name"], "arguments": dict(arguments)}, "tool_call_not_readable")


def _require(record: Record, names: Sequence[str]) -> Any:
    """The value of the first of these columns. Raises Unusable if the record has none of them."""
    value = lookup(record, names)
    if value is None:
        columns = ", ".join(map(str, record)) or "an empty object"
        raise Unusable("missing_field", f"no {' or '.join(names)} in {columns}")
    return value


def _check_text(value: Any) -> str:
    """Returns a text. Raises Unusable for other types, and for text with lone surrogates."""
    if not isinstance(value, str):
        raise Unusable("content_not_text", type(value).__name__)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable("invalid_unicode") from None
    return value


def _check_encodable(tool: Tool, reason: str) -> Tool:
    """Returns a tool or call. Raises Unusable if it is not valid JSON in UTF-8: NaN, dates, bytes, lone surrogates."""
    try:
        json.dumps(tool, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise Unusable(reason) from None
    return tool


def _parse_json(value: Any, reason: str) -> Any:
    """The value of a JSON text, "" for a blank text; other types are returned as they are.

    Raises:
        Unusable: with the reason, if the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return ""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise Unusable(reason) from None

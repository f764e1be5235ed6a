"""Tools and calls as data sets write them down, in the one form that is rendered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nesso_tune.chat.encoding import IGNORED
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

MOST = 200  # characters of a row that a reason quotes


class Unusable(Exception):
    """A row that cannot be used. Its text is the reason, a word that drops are counted under; `detail` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail.encode("utf-8", "backslashreplace").decode()[:MOST]  # it may quote the data


Tool = Mapping[str, Any]


def read_tools(value: Any) -> tuple[Tool, ...]:
    """The tools that a column holds: a list of schemas, or one as JSON text; each with or without its `function` key.

    Raises:
        Unusable: if it is neither, or a tool has no name.
    """
    listed = read_json(value, "tools_not_readable")
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
    return tuple(_writable({"type": "function", "function": dict(f)}, "tools_not_readable") for f in functions)


def _schema_fault(function: Mapping[str, Any]) -> str | None:
    """What is wrong with the parameters of a tool, in words; None if nothing is."""
    parameters = function.get("parameters")
    if parameters in (None, {}):
        return None
    if not isinstance(parameters, Mapping):
        return "its parameters are no object"
    properties, required = parameters.get("properties") or {}, parameters.get("required") or []
    if parameters.get("type", "object") not in ("object", "dict"):  # `dict` is what BFCL writes
        return f"its parameters are of type {parameters['type']}"
    if not isinstance(properties, Mapping) or not all(isinstance(schema, Mapping) for schema in properties.values()):
        return "its properties are no schemas"
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return "`required` is no list of names"
    unknown = [name for name in required if name not in properties]
    return f"it requires {unknown[0]}, which is not among its properties" if unknown else None


def read_calls(value: Any) -> tuple[Tool, ...]:
    """The calls that a message holds: one or a list, as objects or as JSON text, in the order they are made.

    Raises:
        Unusable: if a call has no name, or its arguments are no JSON object.
    """
    listed = read_json(value, "tool_call_not_readable")
    calls = listed if isinstance(listed, list) else [listed]
    return tuple(_call(call) for call in calls)


def _call(call: Any) -> Tool:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise Unusable("tool_call_not_readable")
    said = inner["arguments"] if "arguments" in inner else inner.get("parameters", {})  # as Llama 3 calls them
    arguments = read_json(said, "tool_call_not_readable")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise Unusable("tool_call_not_readable")
    return _writable({"name": inner["name"], "arguments": dict(arguments)}, "tool_call_not_readable")


def _writable(data: Tool, reason: str) -> Tool:
    """The same, if it can be written as JSON and as UTF-8: no NaN, dates or bytes of a Parquet file, surrogates."""
    try:
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise Unusable(reason) from None
    return data


def read_json(value: Any, reason: str) -> Any:
    """What a JSON text says; "" for a blank one, and anything else as it is.

    Raises:
        Unusable: with the reason, if it is no JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return ""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise Unusable(reason) from None


def read_tool_file(file: Path) -> tuple[Tool, ...]:
    """The tools of a JSON file: a list of schemas, as a data set's `tools` column has them.

    Raises:
        DataError: if it is not one.
    """
    try:
        parsed: Any = json.loads(file.read_text(encoding="utf-8"))
        tools = read_tools(parsed.get("tools", [parsed]) if isinstance(parsed, dict) else parsed)
    except OSError as error:
        raise DataError(str(file), f"cannot be read ({error.strerror})", "check the path") from None
    except (ValueError, RecursionError, Unusable) as error:
        raise DataError(str(file), f"is no list of tools ({error})", 'write [{"name": …, "parameters": {…}}]') from None
    if not tools:
        raise DataError(str(file), "holds no tools", 'write [{"name": …, "parameters": {…}}], or remove the key')
    return tools


TEXT_PARTS, THOUGHT_PARTS = ("text", "input_text", "output_text"), ("reasoning", "thinking")
CALL_PARTS = ("tool_call", "function_call")


def column_of(row: Record, names: Sequence[str]) -> Any:
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


def to_messages(value: Any, fmt: DataFormat) -> list[Message]:
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
    return [_message(value, fmt)] if isinstance(value, Mapping) else to_messages(value, fmt)


def system_of(row: Record, fmt: DataFormat, messages: Sequence[Message]) -> list[Message]:
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


Example = Conversation | Completion | Tokenized | PreferencePair


def to_example(row: Record, fmt: DataFormat, method: str, language: str, source: str) -> Example:
    """What a row holds for a method: `sft` learns conversations and texts, `dpo` pairs.

    Raises:
        Unusable: with the reason.
    """
    if method == "dpo":
        return to_pair(row, fmt, language, source)
    if fmt.kind == "completion":
        text = text_of(column_of(row, fmt.text_field))
        if not text.strip():
            raise Unusable("empty_text")
        return Completion(text, language, source)
    return (
        tokenized(row, fmt, language, source)
        if fmt.kind == "pretokenized"
        else to_conversation(row, fmt, language, source)
    )


def to_conversation(row: Record, fmt: DataFormat, language: str, source: str) -> Conversation:
    """The conversation that a row holds.

    Raises:
        Unusable: with the reason.
    """
    if fmt.kind == "conversation":
        messages = to_messages(column_of(row, fmt.messages_field), fmt)
    else:
        answer = Message("assistant", text_of(column_of(row, fmt.response_field)))
        messages = [Message("user", _prompt(row, fmt)), answer]
    messages = [*system_of(row, fmt, messages), *messages]
    if not any(message.role == "assistant" for message in messages):
        raise Unusable("no_assistant_turn")
    if any(is_empty(message) for message in messages if message.role == "assistant"):
        raise Unusable("empty_answer")
    return Conversation(tuple(messages), _tools(row, fmt), language, source)


def to_pair(row: Record, fmt: DataFormat, language: str, source: str) -> PreferencePair:
    """The preference pair that a row holds.

    Raises:
        Unusable: with the reason.
    """
    if fmt.kind == "choice":
        prompt = [Message("user", _prompt(row, fmt))]
        better, worse = _voted(row, fmt)
        chosen, rejected = [Message("assistant", better)], [Message("assistant", worse)]
    else:
        said = lookup(row, fmt.prompt_field)
        prompt = [] if said is None else turns_of(said, "user", fmt)
        chosen = turns_of(column_of(row, fmt.chosen_field), "assistant", fmt)
        rejected = turns_of(column_of(row, fmt.rejected_field), "assistant", fmt)
    if len(chosen) > 1 or len(rejected) > 1:  # whole dialogues: the prompt is what both begin with
        shared = chosen[:-1]
        if shared != rejected[:-1]:
            raise Unusable("no_common_prompt")
        if prompt and shared[-len(prompt) :] != prompt:
            raise Unusable("prompt_differs_from_dialogue")
        prompt, chosen, rejected = shared, chosen[-1:], rejected[-1:]
    if not prompt:
        raise Unusable("no_prompt")
    prompt = [*system_of(row, fmt, prompt), *prompt]
    answer, other = chosen[0], rejected[0]
    if answer.role != "assistant" or other.role != "assistant" or prompt[-1].role == "assistant":
        raise Unusable("answer_not_by_assistant")
    if is_empty(answer) or is_empty(other):
        raise Unusable("empty_answer")
    if (answer.content, answer.tool_calls) == (other.content, other.tool_calls):
        raise Unusable("chosen_equals_rejected")
    return PreferencePair(tuple(prompt), answer, other, language, source, _tools(row, fmt))


def tokenized(row: Record, fmt: DataFormat, language: str, source: str) -> Tokenized:
    """The token ids that a row holds, with labels or a mask.

    Raises:
        Unusable: if they are no whole numbers, of different length, or a label is not its token.
    """
    ids, labels, mask = (lookup(row, names) for names in (fmt.ids_field, fmt.labels_field, fmt.mask_field))
    if not _numbers(ids):
        raise Unusable("ids_not_numbers")
    if labels is None:
        if not isinstance(mask, list) or len(mask) != len(ids) or not all(m in (0, 1) for m in mask):
            raise Unusable("no_labels")
        labels = [token if m else IGNORED for token, m in zip(ids, mask, strict=True)]
    if not _numbers(labels) or len(labels) != len(ids):
        raise Unusable("labels_do_not_fit")
    if any(label not in (IGNORED, token) for token, label in zip(ids, labels, strict=True)):
        raise Unusable("labels_do_not_fit", "a label is neither its token nor -100")
    return Tokenized(tuple(ids), tuple(labels), language, source)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(number) is int for number in value)


def _prompt(row: Record, fmt: DataFormat) -> str:
    """The prompt of a row without turns: its column and further input, or the template filled in."""
    if fmt.prompt_template is not None:
        return TEMPLATE_COLUMN.sub(lambda match: text_of(column_of(row, (match.group(1),))), fmt.prompt_template)
    prompt, further = text_of(column_of(row, fmt.prompt_field)), lookup(row, fmt.input_field)
    if further is None or find_column(row, fmt.prompt_field) == find_column(row, fmt.input_field):
        return prompt
    further = text_of(further)
    return f"{prompt}\n\n{further}" if further.strip() else prompt


def _voted(row: Record, fmt: DataFormat) -> tuple[str, str]:
    """The better and the worse of two answers, by label or by the majority of the votes."""
    first, second = (text_of(column_of(row, (name,))) for name in fmt.choice_fields)
    votes = [lookup(row, (name,)) for name in fmt.label_fields]
    if all(vote is None for vote in votes):
        raise Unusable("missing_field", f"no {' or '.join(fmt.label_fields)}")
    counts = [sum(_same(vote, label) for vote in votes) for label in fmt.labels]
    if counts[0] == counts[1]:
        raise Unusable("no_preferred_answer", "a tie, or no label that the recipe names")
    return (first, second) if counts[0] > counts[1] else (second, first)


def _same(vote: Any, label: Any) -> bool:
    """Whether a vote is a label: 1, 1.0 and "1" are, true is not."""
    if isinstance(vote, bool) or isinstance(label, bool):
        return vote is label
    return bool(vote == label or str(vote).strip() == str(label))


def record_language(row: Record, source: Source) -> str:
    """The language code of a row: the source's, or that of the row's own field; `und` if neither says.

    `language: auto` is the row's own too; where a row says nothing, its words are asked (`languages.py`).

    Raises:
        Unusable: if it is not Unicode text.
    """
    if source.language not in (None, AUTO):
        return _code(source.language)
    names = (source.language_field,) if source.language_field else ("language", "lang")
    said = lookup(row, names)
    if not isinstance(said, str) or not said.strip():
        return UNKNOWN_LANGUAGE
    return _code(text_of(said))


def _code(said: str) -> str:
    return language_code(said) or UNKNOWN_LANGUAGE


def _tools(row: Record, fmt: DataFormat) -> tuple[Tool, ...]:
    return read_tools(lookup(row, fmt.tools_field))

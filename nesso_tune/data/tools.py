"""Tools and tool calls of a record: reads schemas and calls, as objects or JSON text, and removes null properties."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nesso_tune.data.blocks import json_error, load_json, load_list
from nesso_tune.data.columns import Row, Unusable, is_null
from nesso_tune.errors import DataError

Tool = Mapping[str, Any]

NULL_PROPERTY = "null_property_removed"  # name of the anomaly
_TOOL_KEYS, _CALL_KEYS = ("type", "function"), ("type", "function", "id", "index")  # `id` links a call to its result


def read_tool_file(file: Path) -> tuple[Tool, ...]:
    """The tools in a JSON file: a list of schemas, as in the `tools` column of a data set.

    Raises:
        DataError: if it cannot be read, or does not contain such a list.
    """
    try:
        parsed: Any = load_json(file.read_text(encoding="utf-8"))
        tools = read_tools(parsed.get("tools", [parsed]) if isinstance(parsed, dict) else parsed, Row({}), "tools")
    except OSError as error:
        raise DataError(str(file), f"cannot be read ({error.strerror})", "check the path") from None
    except (ValueError, RecursionError, Unusable) as error:
        what = f"is not a list of tools ({error})"
        raise DataError(str(file), what, 'write [{"name": …, "parameters": {…}}]') from None
    if not tools:
        raise DataError(str(file), "contains no tools", 'write [{"name": …, "parameters": {…}}], or remove the key')
    return tools


def read_tools(value: Any, row: Row, path: str) -> tuple[Tool, ...]:
    """The tools of a column: a list of schemas, or a JSON text of one or of each; with or without their `function` key.

    Args:
        value: the value of the column.
        row: the record, which notes unread keys and removed nulls.
        path: name of the column.

    Raises:
        Unusable: if it is neither, or a tool has no name or an invalid schema.
    """
    listed = parse_list(value, "tools_not_readable")
    if listed in (None, "", {}):
        return ()
    listed = [parse_list(tool, "tools_not_readable") for tool in listed] if isinstance(listed, list) else listed
    if not isinstance(listed, list) or not all(isinstance(tool, Mapping) for tool in listed):
        raise Unusable("tools_not_readable")
    listed = _without_nulls(listed, row, "tools_not_readable")
    functions = [tool.get("function", tool) for tool in listed]
    if not all(isinstance(f, Mapping) and isinstance(f.get("name"), str) and f["name"] for f in functions):
        raise Unusable("tool_without_name")
    for tool, function in zip(listed, functions, strict=True):
        if (fault := _schema_fault(function)) is not None:
            raise Unusable("tool_schema_wrong", f"{function['name']}: {fault}")
        if tool is not function:
            row.note_unread(path, tool, _TOOL_KEYS)
    return tuple(_check_encodable({"type": "function", "function": dict(f)}, "tools_not_readable") for f in functions)


def read_calls(value: Any, row: Row, path: str) -> tuple[Tool, ...]:
    """The tool calls of a message in order: one or a list, as objects or as JSON text.

    Args:
        value: the value of the message's key.
        row: the record, which notes unread keys and removed nulls.
        path: where the calls are, e.g. `messages.tool_calls`.

    Raises:
        Unusable: if a call has no name, or its arguments are not a JSON object.
    """
    listed = parse_json(value, "tool_call_not_readable")
    calls = listed if isinstance(listed, list) else [listed]
    return tuple(_read_call(call, row, path) for call in calls)


def parse_json(value: Any, reason: str) -> Any:
    """The value of a JSON text, "" for a blank text; other types are returned as they are.

    Raises:
        Unusable: with the reason, if the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return ""
    try:
        return load_json(value)
    except (ValueError, RecursionError) as error:
        raise Unusable(reason, json_error(error)) from None


def parse_list(value: Any, reason: str) -> Any:
    """As `parse_json`, also for a list or an object as Python writes it."""
    if not isinstance(value, str) or not value.strip():
        return parse_json(value, reason)
    try:
        return load_list(value)
    except (ValueError, RecursionError) as error:
        raise Unusable(reason, json_error(error)) from None


def _read_call(call: Any, row: Row, path: str) -> Tool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise Unusable("tool_call_not_readable")
    key = "arguments" if "arguments" in function else "parameters"  # Llama 3's name
    arguments = parse_json(function.get(key, {}), "tool_call_not_readable")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise Unusable("tool_call_not_readable")
    arguments = _without_nulls(arguments, row, "tool_call_not_readable")
    if function is call:
        row.note_unread(path, call, ("name", key, *_CALL_KEYS))
    else:
        row.note_unread(path, call, _CALL_KEYS)
        row.note_unread(f"{path}.function", function, ("name", key))
    return _check_encodable({"name": function["name"], "arguments": dict(arguments)}, "tool_call_not_readable")


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


def _without_nulls(value: Any, row: Row, reason: str) -> Any:
    """A value without the null properties of its objects, at every depth.

    Tables (`datasets`, pandas) give every object of a column the same keys, and write null, or NaN, for those that an
    object did not have. JSON text is treated as objects are: a CSV file has the same objects as text.

    Raises:
        Unusable: with the reason, if the value is nested too deeply.
    """

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            kept = {key: cleaned(item) for key, item in value.items() if not is_null(item)}
            if len(kept) < len(value):
                row.anomalies.add(NULL_PROPERTY)
            return kept
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    try:
        return cleaned(value)
    except RecursionError:
        raise Unusable(reason) from None


def _check_encodable(tool: Tool, reason: str) -> Tool:
    """Returns a tool or call. Raises Unusable if it is not valid JSON in UTF-8: NaN, dates, bytes, lone surrogates."""
    try:
        json.dumps(tool, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise Unusable(reason) from None
    return tool

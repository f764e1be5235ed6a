"""Tools and calls as data sets write them down, in the one form that is rendered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nesso_tune.errors import DataError

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

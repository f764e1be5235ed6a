"""Tools and calls as data sets write them down, in the one form that is rendered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class Unusable(Exception):
    """A row that cannot be used. Its text is the reason, a word that drops are counted under."""


Tool = Mapping[str, Any]


def read_tools(value: Any) -> tuple[Tool, ...]:
    """The tools that a column holds: a list of schemas, or one as JSON text; each with or without its `function` key.

    Raises:
        Unusable: if it is neither, or a tool has no name.
    """
    listed = _parsed(value, "tools_not_readable")
    if listed in (None, "", {}):
        return ()
    if not isinstance(listed, list) or not all(isinstance(tool, Mapping) for tool in listed):
        raise Unusable("tools_not_readable")
    functions = [tool.get("function", tool) for tool in listed]
    if not all(isinstance(f, Mapping) and isinstance(f.get("name"), str) and f["name"] for f in functions):
        raise Unusable("tool_without_name")
    return tuple({"type": "function", "function": dict(function)} for function in functions)


def read_calls(value: Any) -> tuple[Tool, ...]:
    """The calls that a message holds: one or a list, as objects or as JSON text, in the order they are made.

    Raises:
        Unusable: if a call has no name, or its arguments are no JSON object.
    """
    listed = _parsed(value, "tool_call_not_readable")
    calls = listed if isinstance(listed, list) else [listed]
    return tuple(_call(call) for call in calls)


def _call(call: Any) -> Tool:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise Unusable("tool_call_not_readable")
    arguments = _parsed(inner.get("arguments", {}), "tool_call_not_readable")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise Unusable("tool_call_not_readable")
    return {"name": inner["name"], "arguments": dict(arguments)}


def _parsed(value: Any, reason: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        parsed = json.loads(value)
        json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # not JSON, or a lone surrogate in it
        raise Unusable(reason) from None
    return parsed

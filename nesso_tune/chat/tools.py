"""Tools in a conversation: how they are offered, called and answered, as text.

The text of a call is content like any other: it is encoded in one piece with the words around it, so that a call
that the data holds as structure and one that it holds as text have the same token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nesso_tune.chat.template import ChatTemplate, ToolFormat
from nesso_tune.conversation import Conversation, Message
from nesso_tune.errors import RecipeError

CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)  # in the Hermes manner


def with_tools(conversation: Conversation, template: ChatTemplate) -> Conversation:
    """The conversation with its tools written into its system message, which is made if there is none.

    Raises:
        RecipeError: if there are tools and the template does not say how they are written.
    """
    if not conversation.tools:
        return conversation
    lines = "\n".join(json.dumps(function_of(tool), ensure_ascii=False) for tool in conversation.tools)
    offer = _format(template).offer.replace("{tools}", lines)
    first, *rest = conversation.messages or (None,)
    if first is not None and first.role == "system":
        system = replace(first, content=f"{first.content}\n\n{offer}" if first.content else offer)
        return replace(conversation, messages=(system, *rest))
    return replace(conversation, messages=(Message("system", offer), *conversation.messages))


def body_of(message: Message, template: ChatTemplate) -> str:
    """What stands between the header of a turn and its end: the words, the calls, or a tool's result.

    Raises:
        RecipeError: if there are calls or results and the template does not say how they are written.
    """
    if message.role == "tool" and template.tools is not None:
        before, after = template.tools.result.split("{result}")
        said = message.content
        return said if before and said.startswith(before) else f"{before}{said}{after}"
    if not message.tool_calls:
        return message.content
    calls = [_format(template).call.replace("{call}", _call(call)) for call in message.tool_calls]
    return "\n".join([*([message.content] if message.content else []), *calls])


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool as `{"type": "function", "function": {"name": …, "description": …, "parameters": …}}`."""
    return tool if "function" in tool else {"type": "function", "function": tool}


def _call(call: Mapping[str, Any]) -> str:
    """A call as JSON, its arguments in the order they were given; `{"function": {…}}` around it is taken off."""
    inner = call.get("function", call)
    name, arguments = (json.dumps(inner[key], ensure_ascii=False) for key in ("name", "arguments"))
    said = inner["arguments"] if isinstance(inner["arguments"], str) else arguments
    return f'{{"name": {name}, "arguments": {said}}}'


def calls_in(text: str) -> list[dict[str, Any]]:
    """The calls that an answer makes, as `{"name": …, "arguments": {…}}`; what is not whole JSON is no call."""
    calls = []
    for block in CALL.findall(text):
        try:
            call = json.loads(block)
        except ValueError:
            continue
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            arguments = call.get("arguments")
            calls.append({"name": call["name"], "arguments": arguments if isinstance(arguments, dict) else {}})
    return calls


def _format(template: ChatTemplate) -> ToolFormat:
    if template.tools is None:
        raise RecipeError(
            "chat.template", "does not say how tools are written, but the data has some",
            "add a `tools` section to it (see data_templates/chat/chatml.yaml), or use chatml",
        )  # fmt: skip
    return template.tools

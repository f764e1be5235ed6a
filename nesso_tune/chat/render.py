"""Renders a conversation as segments: control tokens, fixed template text, and content from the data.

Tool calls are content: a call is encoded together with the text around it, so structured calls and calls that the data
has as text get the same token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from nesso_tune.chat.template import ChatTemplate, DefaultSystem, ToolFormat, split_at_control_tokens
from nesso_tune.conversation import UNKNOWN_LANGUAGE, Conversation, Message
from nesso_tune.errors import RecipeError

TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)  # Hermes format


def with_tools(conversation: Conversation, template: ChatTemplate) -> Conversation:
    """The conversation with its tools in the system message, which is added if there is none.

    Raises:
        RecipeError: if there are tools and the template has no tool format.
    """
    if not conversation.tools:
        return conversation
    lines = "\n".join(json.dumps(openai_tool(tool), ensure_ascii=False) for tool in conversation.tools)
    offer = _tool_format(template).offer.replace("{tools}", lines)
    first, *rest = conversation.messages or (None,)
    if first is not None and first.role == "system":
        system = replace(first, content=f"{first.content}\n\n{offer}" if first.content else offer)
        return replace(conversation, messages=(system, *rest))
    return replace(conversation, messages=(Message("system", offer), *conversation.messages))


def turn_text(message: Message, template: ChatTemplate) -> str:
    """The text between the header and the end of a turn: content, tool calls, or a tool result.

    Raises:
        RecipeError: if there are tool calls and the template has no tool format.
    """
    if message.role == "tool" and template.tools is not None:
        before, after = template.tools.result.split("{result}")
        result = message.content
        return result if before and result.startswith(before) else f"{before}{result}{after}"
    if not message.tool_calls:
        return message.content
    calls = [_tool_format(template).call.replace("{call}", _call(call)) for call in message.tool_calls]
    return "\n".join([*([message.content] if message.content else []), *calls])


def openai_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool as `{"type": "function", "function": {"name": …, "description": …, "parameters": …}}`."""
    return tool if "function" in tool else {"type": "function", "function": tool}


def _call(call: Mapping[str, Any]) -> str:
    """A call as JSON with its arguments in their order; an enclosing `{"function": {…}}` is removed."""
    inner = call.get("function", call)
    name, arguments = (json.dumps(inner[key], ensure_ascii=False) for key in ("name", "arguments"))
    if isinstance(inner["arguments"], str):  # JSON already
        arguments = inner["arguments"]
    return f'{{"name": {name}, "arguments": {arguments}}}'


def parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """The tool calls in an answer as `{"name": …, "arguments": {…}}`; calls with invalid JSON are ignored."""
    calls = []
    for block in TOOL_CALL.findall(text):
        try:
            call = json.loads(block)
        except ValueError:
            continue
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            arguments = call.get("arguments")
            calls.append({"name": call["name"], "arguments": arguments if isinstance(arguments, dict) else {}})
    return calls


def _tool_format(template: ChatTemplate) -> ToolFormat:
    if template.tools is None:
        raise RecipeError(
            "chat.template", "has no tool format, but the data contains tools",
            "add a `tools` section to the template (see data_templates/chat/chatml.yaml), or use chatml",
        )  # fmt: skip
    return template.tools


TrainOnEos = Literal["turn", "all", "last", "none"]
BOS = "bos_token"  # placeholder for the BOS token of the tokenizer


class Segment(NamedTuple):
    """A piece of a rendered conversation.

    Attributes:
        text: the text, or the name of a control token.
        kind: `control` is one token, looked up by name; `template` is fixed text; `content` comes from the data and is
            encoded without control tokens.
        trained: whether its tokens are supervised.
        ends_turn: whether this segment is the last one of a turn.
    """

    text: str
    kind: Literal["control", "template", "content"]
    trained: bool = False
    ends_turn: bool = False


def with_system_and_tools(
    conversation: Conversation, template: ChatTemplate, default_system: DefaultSystem
) -> Conversation:
    """The conversation as rendered: with the default system message and with its tools in the system message."""
    return with_tools(with_default_system(conversation, default_system), template)


def with_default_system(conversation: Conversation, default_system: DefaultSystem) -> Conversation:
    """The conversation, with the default system message if it has no system message."""
    if default_system is None or (conversation.messages and conversation.messages[0].role == "system"):
        return conversation
    if isinstance(default_system, Mapping):
        first = next(iter(default_system.values())) if conversation.language == UNKNOWN_LANGUAGE else None
        default_system = default_system.get(conversation.language, first)  # None for a language without a default
        if default_system is None:
            return conversation
    system = Message("system", default_system)
    return replace(conversation, messages=(system, *conversation.messages))


def segments(
    conversation: Conversation,
    template: ChatTemplate,
    roles_to_train: Collection[str] = ("assistant",),
    train_on_eos: TrainOnEos = "turn",
) -> list[Segment]:
    """The rendered conversation.

    The content of the turns in `roles_to_train` is supervised, and the end tokens as `train_on_eos` selects:
    those of supervised turns (`turn`), of all turns, of the last supervised turn, or none.
    """
    trained = [
        message.role in roles_to_train if message.train is None else message.train for message in conversation.messages
    ]
    last = max((i for i, yes in enumerate(trained) if yes), default=-1)
    out = [Segment(BOS, "control")] if template.bos else []
    for i, message in enumerate(conversation.messages):
        learn_end = {"turn": trained[i], "all": True, "last": i == last, "none": False}[train_on_eos]
        out += _template_segments(template, template.header_of(message.role))
        out += answer_segments(turn_text(message, template), template, trained[i], learn_end)
        out += _template_segments(template, template.separator)
    return out


def answer_segments(content: str, template: ChatTemplate, trained: bool, learn_end: bool) -> list[Segment]:
    """The content of a turn and its end token."""
    text = [Segment(content, "content", trained)] if content else []
    end = _template_segments(template, template.end, learn_end)
    return [*text, *end[:-1], end[-1]._replace(ends_turn=True)]


def prompt_segments(conversation: Conversation, template: ChatTemplate) -> list[Segment]:
    """The rendered conversation and the header of the assistant's next turn, without supervised tokens."""
    header = _template_segments(template, template.header_of("assistant"))
    return [*segments(conversation, template, roles_to_train=(), train_on_eos="none"), *header]


def _template_segments(template: ChatTemplate, text: str, trained: bool = False) -> tuple[Segment, ...]:
    return _pieces(text, tuple(template.control_tokens), trained)


@lru_cache(maxsize=256)  # few distinct texts per template, millions of turns per data set
def _pieces(text: str, control_tokens: tuple[str, ...], trained: bool) -> tuple[Segment, ...]:
    pieces = split_at_control_tokens(text, control_tokens)
    return tuple(Segment(piece, "control" if control else "template", trained) for piece, control in pieces)

"""Tools in a conversation: how they are offered, called and answered, as text.

The text of a call is content like any other: it is encoded in one piece with the words around it, so that a call
that the data holds as structure and one that it holds as text have the same token ids.
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

TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)  # in the Hermes manner


def with_tools(conversation: Conversation, template: ChatTemplate) -> Conversation:
    """The conversation with its tools written into its system message, which is made if there is none.

    Raises:
        RecipeError: if there are tools and the template does not say how they are written.
    """
    if not conversation.tools:
        return conversation
    lines = "\n".join(json.dumps(openai_tool(tool), ensure_ascii=False) for tool in conversation.tools)
    offer = _format(template).offer.replace("{tools}", lines)
    first, *rest = conversation.messages or (None,)
    if first is not None and first.role == "system":
        system = replace(first, content=f"{first.content}\n\n{offer}" if first.content else offer)
        return replace(conversation, messages=(system, *rest))
    return replace(conversation, messages=(Message("system", offer), *conversation.messages))


def turn_text(message: Message, template: ChatTemplate) -> str:
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


def openai_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool as `{"type": "function", "function": {"name": …, "description": …, "parameters": …}}`."""
    return tool if "function" in tool else {"type": "function", "function": tool}


def _call(call: Mapping[str, Any]) -> str:
    """A call as JSON, its arguments in the order they were given; `{"function": {…}}` around it is taken off."""
    inner = call.get("function", call)
    name, arguments = (json.dumps(inner[key], ensure_ascii=False) for key in ("name", "arguments"))
    said = inner["arguments"] if isinstance(inner["arguments"], str) else arguments
    return f'{{"name": {name}, "arguments": {said}}}'


def parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """The calls that an answer makes, as `{"name": …, "arguments": {…}}`; what is not whole JSON is no call."""
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


def _format(template: ChatTemplate) -> ToolFormat:
    if template.tools is None:
        raise RecipeError(
            "chat.template", "does not say how tools are written, but the data has some",
            "add a `tools` section to it (see data_templates/chat/chatml.yaml), or use chatml",
        )  # fmt: skip
    return template.tools


TrainOnEos = Literal["turn", "all", "last", "none"]
BOS = "bos_token"  # stands for whatever the tokenizer calls its BOS


class Segment(NamedTuple):
    """A piece of a rendered conversation.

    Attributes:
        text: the piece.
        kind: `control` is one token looked up by name; `template` is fixed text; `content` comes from the data and
            is encoded so that no text in it can become a control token.
        trained: whether the model learns to write it.
        ends_turn: whether a turn is complete with this segment.
    """

    text: str
    kind: Literal["control", "template", "content"]
    trained: bool = False
    ends_turn: bool = False


def with_system_and_tools(
    conversation: Conversation, template: ChatTemplate, default_system: DefaultSystem
) -> Conversation:
    """The conversation as it is written down: with the default system message, and with its tools in it."""
    return with_tools(with_default_system(conversation, default_system), template)


def with_default_system(conversation: Conversation, default_system: DefaultSystem) -> Conversation:
    """The conversation, opened by the default system message if it has no system message of its own."""
    if default_system is None or (conversation.messages and conversation.messages[0].role == "system"):
        return conversation
    if isinstance(default_system, Mapping):
        first = next(iter(default_system.values())) if conversation.language == UNKNOWN_LANGUAGE else None
        default_system = default_system.get(conversation.language, first)  # of a language not listed, none
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
    """The rendered conversation. Learned are the contents of the trained turns and, by `train_on_eos`, end tokens."""
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
    """The content of a turn and its end."""
    text = [Segment(content, "content", trained)] if content else []
    end = _template_segments(template, template.end, learn_end)
    return [*text, *end[:-1], end[-1]._replace(ends_turn=True)]


def prompt_segments(conversation: Conversation, template: ChatTemplate) -> list[Segment]:
    """The rendered conversation up to where the assistant begins to write. Nothing of it is learned."""
    header = _template_segments(template, template.header_of("assistant"))
    return [*segments(conversation, template, roles_to_train=(), train_on_eos="none"), *header]


def _template_segments(template: ChatTemplate, text: str, trained: bool = False) -> tuple[Segment, ...]:
    return _pieces(text, tuple(template.control_tokens), trained)


@lru_cache(maxsize=256)  # a template has a few of them, a data set millions
def _pieces(text: str, control_tokens: tuple[str, ...], trained: bool) -> tuple[Segment, ...]:
    pieces = split_at_control_tokens(text, control_tokens)
    return tuple(Segment(piece, "control" if control else "template", trained) for piece, control in pieces)

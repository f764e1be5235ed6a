"""Renders a conversation as segments: control tokens, fixed template text, and content from the data.

Reasoning and tool calls are content: they are encoded together with the text around them, as the model generates them,
so structured calls and calls that the data has as text get the same token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from nesso_tune.chat.template import ChatTemplate, DefaultSystem, Strip, ToolFormat, split_at_control_tokens
from nesso_tune.conversation import UNKNOWN_LANGUAGE, Conversation, Message
from nesso_tune.errors import RecipeError

TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)  # Hermes format
TrainOnEos = Literal["turn", "all", "last", "none"]
TurnsToTrain = Literal["all", "last"]
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


# The conversation as the template arranges it


def with_system_and_tools(
    conversation: Conversation, template: ChatTemplate, default_system: DefaultSystem = None
) -> Conversation:
    """The conversation with the contents of its messages as the template writes them.

    White space is stripped, the default system message and the tools are added, and the system message is formatted.

    Raises:
        RecipeError: if there are tools and the template has no tool format, or the template folds the system message
            into the first user turn, and another turn is first.
    """
    if template.strip:
        stripped = tuple(_stripped(message, template) for message in conversation.messages)
        conversation = replace(conversation, messages=stripped)
    if not conversation.messages or conversation.messages[0].role != "system":
        default = _default_system(conversation.language, default_system)
        conversation = _with_system(conversation, template.system.default if default is None else default)
    elif template.system.default is not None and not conversation.messages[0].content:
        default = _default_system(conversation.language, default_system)
        system = replace(conversation.messages[0], content=template.system.default if default is None else default)
        conversation = replace(conversation, messages=(system, *conversation.messages[1:]))
    conversation = _with_offer(conversation, template)
    first, *rest = conversation.messages or (None,)
    if first is None or first.role != "system" or template.system.text == "{system}":
        return conversation
    text = template.system.text.replace("{system}", first.content)
    if template.system.placement == "turn":
        return replace(conversation, messages=(replace(first, content=text), *rest))
    if not rest or rest[0].role != "user":
        raise RecipeError(
            "chat.template", "writes the system message into the first user turn, but another turn comes first",
            "remove the system message or the first turn of such conversations, or use another template",
        )  # fmt: skip
    return replace(conversation, messages=(replace(rest[0], content=text + rest[0].content), *rest[1:]))


def _default_system(language: str, default_system: DefaultSystem) -> str | None:
    """The recipe's default system message for a language; None for a language without one."""
    if not isinstance(default_system, Mapping):
        return default_system
    first = next(iter(default_system.values())) if language == UNKNOWN_LANGUAGE else None
    return default_system.get(language, first)


def _with_system(conversation: Conversation, system: str | None) -> Conversation:
    if system is None:
        return conversation
    return replace(conversation, messages=(Message("system", system), *conversation.messages))


def _with_offer(conversation: Conversation, template: ChatTemplate) -> Conversation:
    """The conversation with its tools in the system message, if the template writes them there."""
    if not conversation.tools or _tool_format(template).placement != "system":
        return conversation
    tools = _tool_format(template)
    offer = tools.offer.replace("{tools}", _definitions(conversation.tools, tools))
    first, *rest = conversation.messages or (None,)
    if first is None or first.role != "system":
        return _with_system(conversation, offer)
    system = replace(first, content=f"{first.content}\n\n{offer}" if first.content else offer)
    return replace(conversation, messages=(system, *rest))


def _definitions(tools: Sequence[Mapping[str, Any]], tool_format: ToolFormat) -> str:
    as_json = tool_format.definition == "json"
    written = (json.dumps(tool, ensure_ascii=False) if as_json else str(tool) for tool in map(openai_tool, tools))
    return tool_format.separator.join(written)


def _stripped(message: Message, template: ChatTemplate) -> Message:
    how: Strip | None = template.strip.get(message.role)  # type: ignore[call-overload]
    if how is None:
        return message
    text = message.content
    stripped = {"both": text.strip, "end": text.rstrip, "leading_lines": lambda: text.lstrip("\n")}[how]()
    return replace(message, content=stripped)


# The segments of a conversation


def segments(
    conversation: Conversation,
    template: ChatTemplate,
    roles_to_train: Collection[str] = ("assistant",),
    train_on_eos: TrainOnEos = "turn",
    turns_to_train: TurnsToTrain = "all",
) -> list[Segment]:
    """The rendered conversation, arranged by `with_system_and_tools`.

    The content of the turns in `roles_to_train` is supervised, and the end tokens as `train_on_eos` selects:
    those of supervised turns (`turn`), of all turns, of the last supervised turn, or none. With `turns_to_train: last`,
    only the last of these turns is supervised, and the turns after it are left out.

    Raises:
        RecipeError: if a supervised turn does not follow a prompt for generation, see `unreachable_answer`.
    """
    messages = conversation.messages
    trained = _trained_turns(messages, roles_to_train)
    last = max((i for i, yes in enumerate(trained) if yes), default=-1)
    if turns_to_train == "last" and last >= 0:
        messages, trained = messages[: last + 1], [False] * last + [True]
    if (fault := _unreachable_turn(messages, template, trained)) is not None:
        raise RecipeError("data.turns_to_train", f"{fault}: no prompt leads to them", "set it to last")
    out = [Segment(BOS, "control")] if template.bos else []
    offer_at = int(bool(messages) and messages[0].role == "system")
    for i in range(len(messages)):
        if i == offer_at:
            out += _offer_after_system(conversation, template)
        learn_end = {"turn": trained[i], "all": True, "last": i == last, "none": False}[train_on_eos]
        out += _turn(messages, i, template, trained[i], learn_end)
    return out + _offer_after_system(conversation, template) if len(messages) == offer_at else out


def _trained_turns(messages: Sequence[Message], roles_to_train: Collection[str]) -> list[bool]:
    """For each message, whether it is supervised: by its own flag, or by its role."""
    return [message.role in roles_to_train if message.train is None else message.train for message in messages]


def unreachable_answer(
    conversation: Conversation, template: ChatTemplate, roles_to_train: Collection[str]
) -> str | None:
    """Why a supervised answer is not what the model generates after the prompt for it; None if all are.

    With `reasoning.history: drop`, an answer that another user turn follows is written without its reasoning, and with
    `prompt`, an answer that is not the last turn is written without the text that every prompt ends with.
    """
    if not (template.drops_history or template.prompt):
        return None
    return _unreachable_turn(conversation.messages, template, _trained_turns(conversation.messages, roles_to_train))


def _unreachable_turn(messages: Sequence[Message], template: ChatTemplate, trained: Sequence[bool]) -> str | None:
    if not (template.drops_history or template.prompt):
        return None
    for i in (i for i, yes in enumerate(trained) if yes and messages[i].role == "assistant"):
        if template.drops_history and any(message.role == "user" for message in messages[i + 1 :]):
            return "the chat template writes answers before the last user turn otherwise than the model generates them"
        if template.prompt and _reasoning_text(messages, i, template) != template.prompt:
            return "the chat template writes answers before the last turn otherwise than the model generates them"
    return None


def prompt_segments(conversation: Conversation, template: ChatTemplate) -> list[Segment]:
    """The rendered conversation and the header of the assistant's next turn, without supervised tokens."""
    header = _template_segments(template, template.start_of("assistant") + template.prompt)
    return [*segments(conversation, template, roles_to_train=(), train_on_eos="none"), *header]


def answer_segments(prompt: Sequence[Message], answer: Message, template: ChatTemplate) -> list[Segment]:
    """An answer to a prompt and its end token, all supervised.

    Raises:
        RecipeError: if the answer has reasoning, and prompts for generation end with an empty one.
    """
    message, reasoning = _with_reasoning([*prompt, _stripped(answer, template)], len(prompt), template)
    if template.prompt and reasoning != template.prompt:
        raise RecipeError(
            "chat.template", "ends prompts with an empty reasoning, but an answer has reasoning",
            "set data.reasoning: drop, or use a template that generates it",
        )  # fmt: skip
    body = _body_segments(message, template, "" if template.prompt else reasoning, True)
    return [*body, *_end_segments(template.end, template, True)]


def text_segments(text: str, template: ChatTemplate, learn_end: bool) -> list[Segment]:
    """A plain text, supervised, and the end token."""
    return [Segment(text, "content", True), *_end_segments(template.end, template, learn_end)]


def _turn(messages: Sequence[Message], i: int, template: ChatTemplate, trained: bool, learn_end: bool) -> list[Segment]:
    """One turn with its header and end; consecutive tool results can share them."""
    message, reasoning = _with_reasoning(messages, i, template)
    start, end, separator = template.frame(message.role)
    if template.prompt and reasoning == template.prompt:  # it ends the prompt, so it is not generated
        start, reasoning = start + reasoning, ""
    if _joins_results(messages, i, template):
        assert template.tools is not None
        start = template.tools.result_separator or ""
    out = [*_template_segments(template, start), *_body_segments(message, template, reasoning, trained)]
    if not _joins_results(messages, i + 1, template):
        out += _end_segments(end, template, learn_end)
        out += _template_segments(template, separator)
    return out


def _joins_results(messages: Sequence[Message], i: int, template: ChatTemplate) -> bool:
    """Whether a message is a tool result in the same turn as the result before it."""
    if not 0 < i < len(messages) or messages[i].role != "tool":
        return False
    if template.tools is None or template.tools.result_separator is None:
        return False
    return messages[i - 1].role == "tool"


def _with_reasoning(messages: Sequence[Message], i: int, template: ChatTemplate) -> tuple[Message, str]:
    """A message, and the text of its reasoning. Line breaks that this text ends with are removed from the content."""
    message = messages[i]
    if template.reasoning is None and message.reasoning is None:
        return message, ""
    reasoning = _reasoning_text(messages, i, template)
    if reasoning.endswith("\n"):
        message = replace(message, content=message.content.lstrip("\n"))
    return message, reasoning


def _reasoning_text(messages: Sequence[Message], i: int, template: ChatTemplate) -> str:
    """The text before the content of a message: its reasoning, an empty one, or nothing.

    Raises:
        RecipeError: if there is reasoning and the template has no format for it.
    """
    message, style = messages[i], template.reasoning
    if style is None and not message.reasoning:
        return ""
    if style is None:
        raise RecipeError("chat.template", *NO_REASONING_FORMAT)
    if message.role != "assistant":
        return ""
    if style.history == "drop":
        last_user = max((k for k, other in enumerate(messages) if other.role == "user"), default=len(messages))
        if i < last_user:
            return ""
    reasoning = message.reasoning or ""
    if style.start.endswith("\n"):
        reasoning = reasoning.strip("\n")
    if not reasoning and not (style.empty and i == len(messages) - 1):
        return ""
    return f"{style.start}{reasoning}{style.end}"


NO_REASONING_FORMAT = (
    "has no format for reasoning, but the data contains reasoning",
    "set data.reasoning: drop, or a chat.template with a `reasoning` section: qwen3, smollm3, mistral or your own file",
)


def _body_segments(message: Message, template: ChatTemplate, reasoning: str, trained: bool) -> list[Segment]:
    """The segments between the header and the end of a turn."""
    if not reasoning and not message.tool_calls and message.role != "tool":
        return [Segment(message.content, "content", trained)] if message.content else []
    return _merged(_body(message, template, reasoning), template, trained)


def _merged(pieces: Iterable[tuple[str, bool]], template: ChatTemplate, trained: bool = False) -> list[Segment]:
    """Pieces as segments; the text between two control tokens is one segment, encoded as one text."""
    out: list[Segment] = []
    text = ""
    for piece, from_template in pieces:
        for part, is_control in template.pieces(piece) if from_template else ((piece, False),):
            if not is_control:
                text += part
                continue
            out += [Segment(text, "content", trained)] if text else []
            out.append(Segment(part, "control", trained))
            text = ""
    return [*out, Segment(text, "content", trained)] if text else out


def _body(message: Message, template: ChatTemplate, reasoning: str) -> Iterator[tuple[str, bool]]:
    """Pieces of a turn's content: (text, whether it comes from the template and can contain control tokens).

    Raises:
        RecipeError: if there are tool calls and the template has no tool format.
    """
    content = message.content
    if message.role == "tool" and template.tools is not None:
        before, after = template.tools.result.split("{result}")
        yield content if before and content.startswith(before) else f"{before}{content}{after}", False
        return
    if reasoning:
        assert template.reasoning is not None
        start, end = template.reasoning.start, template.reasoning.end
        yield from ((start, True), (reasoning[len(start) : -len(end)], False), (end, True))
    yield content, False
    for i, call in enumerate(message.tool_calls):
        tools = _tool_format(template)
        if content or i:
            yield tools.call_separator, True
        yield from _call(call, tools)


def _call(call: Mapping[str, Any], tools: ToolFormat) -> Iterator[tuple[str, bool]]:
    """A call with its arguments in their order; an enclosing `{"function": {…}}` is removed."""
    inner = call.get("function", call)
    name, arguments = (json.dumps(inner[key], ensure_ascii=False) for key in ("name", "arguments"))
    if isinstance(inner["arguments"], str):  # JSON already
        arguments = inner["arguments"]
    values = {
        "{call}": f'{{"name": {name}, "arguments": {arguments}}}', "{name}": inner["name"], "{arguments}": arguments,
    }  # fmt: skip
    for piece in re.split(r"(\{call\}|\{name\}|\{arguments\})", tools.call):
        yield (values[piece], False) if piece in values else (piece, True)


def openai_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool as `{"type": "function", "function": {"name": …, "description": …, "parameters": …}}`."""
    return tool if "function" in tool else {"type": "function", "function": tool}


def _tool_format(template: ChatTemplate) -> ToolFormat:
    if template.tools is None:
        raise RecipeError(
            "chat.template", "has no tool format, but the data contains tools",
            "add a `tools` section to the template (see data_templates/chat/chatml.yaml), or use chatml",
        )  # fmt: skip
    return template.tools


def _offer_after_system(conversation: Conversation, template: ChatTemplate) -> list[Segment]:
    """The tools between the system message and the other turns, if the template writes them there."""
    if not conversation.tools or template.tools is None or template.tools.placement != "after_system":
        return []
    before, after = template.tools.offer.split("{tools}")
    definitions = _definitions(conversation.tools, template.tools)
    return _merged(((before, True), (definitions, False), (after, True)), template)


def _end_segments(end: str, template: ChatTemplate, learn_end: bool) -> tuple[Segment, ...]:
    return _pieces(end, template.tokens, learn_end, True)


def _template_segments(template: ChatTemplate, text: str, trained: bool = False) -> tuple[Segment, ...]:
    return _pieces(text, template.tokens, trained)


@lru_cache(maxsize=256)  # few distinct texts per template, millions of turns per data set
def _pieces(text: str, control_tokens: tuple[str, ...], trained: bool, ends_turn: bool = False) -> tuple[Segment, ...]:
    split = split_at_control_tokens(text, control_tokens)
    pieces = [Segment(piece, "control" if control else "template", trained) for piece, control in split]
    return (*pieces[:-1], pieces[-1]._replace(ends_turn=ends_turn)) if pieces else ()


# An answer as the model generates it


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


def parse_answer(text: str, template: ChatTemplate) -> Message:
    """The message that renders to a generated answer: its reasoning, its content, and calls with control tokens.

    Calls in plain text stay in the content, which renders to the same tokens.

    Args:
        text: the answer with its control tokens, without the end token.
        template: the chat template.
    """
    reasoning, content = None, text
    if (style := template.reasoning) is not None:
        start, end = style.start.strip(), style.end.strip()
        opened, found, rest = text.partition(end)
        if found and opened.lstrip().startswith(start):
            reasoning = opened.lstrip().removeprefix(start).strip("\n") or None
            content = rest.lstrip("\n") if style.end.endswith("\n") else rest
    if template.tools is None or not template.has_control_token(template.tools.call):
        return Message("assistant", content, reasoning=reasoning)
    calls, first = _calls_with_control_tokens(content, template.tools)
    return Message("assistant", content[:first], tuple(calls), reasoning=reasoning)


def _calls_with_control_tokens(text: str, tools: ToolFormat) -> tuple[list[dict[str, Any]], int]:
    """The calls in an answer, and where the first one starts; a call that is not JSON ends the list."""
    pattern = re.escape(tools.call)
    for name in ("call", "name", "arguments"):
        pattern = pattern.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>.+?)")
    start = re.escape(tools.call_separator) + re.escape(tools.call.split("{")[0])
    calls: list[dict[str, Any]] = []
    first = len(text)
    for match in re.finditer(f"{pattern}(?=\\s*\\Z|{start})", text, re.DOTALL):
        found = match.groupdict()
        try:
            call = json.loads(found["call"]) if "call" in found else {
                "name": found["name"], "arguments": json.loads(found["arguments"])
            }  # fmt: skip
        except ValueError:
            break
        first = min(first, match.start())
        calls.append(call)
    return calls, first

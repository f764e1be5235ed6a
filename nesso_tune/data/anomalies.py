"""Anomalies of texts and turns."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from nesso_tune.chat.render import openai_tool
from nesso_tune.conversation import Conversation
from nesso_tune.data.convert import Example, is_empty

_ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_ENTITY = re.compile(r"&(?:[a-zA-Z]{2,8}|#\d{2,6}|#x[0-9a-fA-F]{2,6});")
_MOJIBAKE = re.compile("Ã[\x80-\xbf]|â€|Â[\xa0-\xbf]")  # UTF-8 decoded as Latin-1 or Windows-1252
_PLACEHOLDER = re.compile(r"\{\{.*?\}\}")
_STAND_IN = re.compile(r"\s*__[A-Z_]+__\s*")

# Checks of a text, by the name of the anomaly. Each begins with a cheap test that most texts fail.
_TEXT_CHECKS: dict[str, Callable[[str], bool]] = {
    "no_break_space": lambda text: "\xa0" in text,
    "zero_width_character": lambda text: not text.isascii() and any(c in text for c in _ZERO_WIDTH),
    "control_character": lambda text: _CONTROL.search(text) is not None,
    "html_entity": lambda text: "&" in text and _ENTITY.search(text) is not None,
    "mojibake": lambda text: not text.isascii() and _MOJIBAKE.search(text) is not None,
    "template_placeholder": lambda text: "{{" in text and _PLACEHOLDER.search(text) is not None,
}


def find_anomalies(example: Example, control_tokens: Collection[str]) -> list[str]:
    """The names of the anomalies of an example.

    Args:
        example: the conversation, text or pair.
        control_tokens: control tokens of the chat template; in the text of an example they are encoded as plain text.
    """
    text = "\n".join(turn.content for turn in example.turns)
    found = [name for name, has_anomaly in _TEXT_CHECKS.items() if has_anomaly(text)]
    if any(token in text for token in control_tokens):
        found.append("control_token_as_text")
    if "__" in text and any(_STAND_IN.fullmatch(turn.content) for turn in example.turns):
        found.append("stand_in_turn")
    if example.tools and _calls_unknown_tool(example):
        found.append("call_of_a_tool_not_offered")
    if isinstance(example, Conversation):
        first_role = next((turn.role for turn in example.messages if turn.role != "system"), "")
        if first_role == "assistant":
            found.append("opens_with_assistant")
        if example.messages[-1].role != "assistant":
            found.append("ends_without_answer")
        if any(is_empty(turn) and turn.role in ("user", "system") for turn in example.messages):
            found.append("empty_turn")
    return found


def _calls_unknown_tool(example: Example) -> bool:
    """Whether a call names a tool that is not offered."""
    offered = {openai_tool(tool)["function"]["name"] for tool in example.tools}
    return any(call["name"] not in offered for turn in example.turns for call in turn.tool_calls)

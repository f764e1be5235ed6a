"""Oddities of rows that are kept: what a person would want to know of, and often to look at."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from nesso_tune.chat.tools import function_of
from nesso_tune.conversation import Conversation
from nesso_tune.data.convert import Item
from nesso_tune.data.messages import is_empty

ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
ENTITY = re.compile(r"&(?:[a-zA-Z]{2,8}|#\d{2,6}|#x[0-9a-fA-F]{2,6});")
MOJIBAKE = re.compile("Ã[\x80-\xbf]|â€|Â[\xa0-\xbf]")  # UTF-8 that was read as Latin-1 or Windows-1252
PLACEHOLDER = re.compile(r"\{\{.*?\}\}")
STAND_IN = re.compile(r"\s*__[A-Z_]+__\s*")

# What is looked for in the text of a row, by the name it is reported under. The cheap question comes first.
IN_TEXT: dict[str, Callable[[str], bool]] = {
    "no_break_space": lambda text: "\xa0" in text,
    "zero_width_character": lambda text: not text.isascii() and any(c in text for c in ZERO_WIDTH),
    "control_character": lambda text: CONTROL.search(text) is not None,
    "html_entity": lambda text: "&" in text and ENTITY.search(text) is not None,
    "mojibake": lambda text: not text.isascii() and MOJIBAKE.search(text) is not None,
    "template_placeholder": lambda text: "{{" in text and PLACEHOLDER.search(text) is not None,
}


def marks_of(item: Item, control_tokens: Collection[str]) -> list[str]:
    """The oddities of an item by name.

    Args:
        item: the conversation, text or pair.
        control_tokens: of the template; where a text spells one, it is read as plain text.
    """
    text = "\n".join(turn.content for turn in item.turns)
    found = [name for name, is_in in IN_TEXT.items() if is_in(text)]
    if any(token in text for token in control_tokens):
        found.append("control_token_as_text")
    if "__" in text and any(STAND_IN.fullmatch(turn.content) for turn in item.turns):
        found.append("stand_in_turn")
    if item.tools and _calls_another(item):
        found.append("call_of_a_tool_not_offered")
    if isinstance(item, Conversation):
        first = next((turn.role for turn in item.messages if turn.role != "system"), "")
        if first == "assistant":
            found.append("opens_with_assistant")
        if item.messages[-1].role != "assistant":
            found.append("ends_without_answer")
        if any(is_empty(turn) and turn.role in ("user", "system") for turn in item.messages):
            found.append("empty_turn")
    return found


def _calls_another(item: Item) -> bool:
    """Whether a tool is called that is not on offer."""
    offered = {function_of(tool)["function"]["name"] for tool in item.tools}
    return any(call["name"] not in offered for turn in item.turns for call in turn.tool_calls)

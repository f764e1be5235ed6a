"""What is done to an item before it is encoded, as `data.clean` asks: characters, empty turns, the order of roles."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from nesso_tune.chat.tools import CALL
from nesso_tune.conversation import Completion, Conversation, Message, PreferencePair
from nesso_tune.data.convert import Item
from nesso_tune.data.messages import is_empty
from nesso_tune.data.tools import Unusable
from nesso_tune.recipes.data import CleanSection

# Zero-width and control characters without tab, line feed and carriage return; soft hyphens, and marks of direction.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"
    # the two joiners have a meaning inside emoji and in Arabic and Indian scripts, not beside a Latin letter or a space
    "|(?<![^\x00-\u024f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\u024f])"
)


def clean(item: Item, settings: CleanSection) -> Item:
    """The item, cleaned.

    Raises:
        Unusable: if a step asks for it to be dropped, or nothing is left of a text.
    """
    steps = _steps(settings)
    if isinstance(item, Completion):
        text = _through(item.text, steps)
        if not text.strip():
            raise Unusable("empty_text")
        return item if text is item.text else replace(item, text=text)
    if isinstance(item, Conversation):
        messages = _turns(item.messages, settings, steps)
        return item if messages is item.messages else replace(item, messages=messages)
    if isinstance(item, PreferencePair):
        return _pair(item, settings, steps)
    return item


def _pair(pair: PreferencePair, settings: CleanSection, steps: Sequence[Callable[[str], str]]) -> PreferencePair:
    """The prompt's turns with either answer after them."""
    one, other = (_turns((*pair.prompt, answer), settings, steps) for answer in (pair.chosen, pair.rejected))
    if len(one) < 2:
        raise Unusable("no_prompt")
    if (one[-1].content, one[-1].tool_calls) == (other[-1].content, other[-1].tool_calls):
        raise Unusable("chosen_equals_rejected")
    return replace(pair, prompt=one[:-1], chosen=one[-1], rejected=other[-1])


def _steps(settings: CleanSection) -> list[Callable[[str], str]]:
    steps: list[Callable[[str], str]] = []
    if settings.invisible == "remove":
        steps.append(partial(INVISIBLE.sub, ""))
    if settings.unicode == "nfc":
        steps.append(_composed)
    return steps


def _composed(text: str) -> str:
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _through(text: str, steps: Sequence[Callable[[str], str]]) -> str:
    for step in steps:
        text = step(text)
    return text


def _turns(
    messages: tuple[Message, ...], settings: CleanSection, steps: Sequence[Callable[[str], str]]
) -> tuple[Message, ...]:
    if steps:
        messages = tuple(replace(m, content=_through(m.content, steps)) for m in messages)
        if any(m.role == "assistant" and is_empty(m) for m in messages):
            raise Unusable("empty_answer")
    if settings.empty_turns != "keep" and any(is_empty(m) and m.role in ("user", "system") for m in messages):
        if settings.empty_turns == "drop":
            raise Unusable("empty_turn")
        messages = tuple(m for m in messages if not (is_empty(m) and m.role in ("user", "system")))
    fault = None if settings.role_order == "keep" else disorder(messages)
    if fault is not None and settings.role_order == "merge":
        messages = merged(messages)
        fault = disorder(messages)
    if fault is not None:
        raise Unusable("roles_out_of_order", fault)
    return messages


def disorder(messages: Sequence[Message]) -> str | None:
    """What is wrong with the order of the roles, in words; None if nothing is."""
    before, speaker = "", None
    for message in messages:
        role = message.role
        if role == before and role != "tool":
            return f"{role} twice in a row"
        if role == "system" and before:
            return f"system after {before}"
        if role == "tool" and not _calls(speaker):
            return "a tool's result without a call"
        if role != "tool":
            speaker = message
        before = role
    return None


def _calls(message: Message | None) -> bool:
    if message is None or message.role != "assistant":
        return False
    return bool(message.tool_calls) or CALL.search(message.content) is not None


def merged(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Neighbours of one role put together, a blank line between their texts; results of tools stay apart."""
    out: list[Message] = []
    for message in messages:
        last = out[-1] if out else None
        if last is None or last.role != message.role or message.role == "tool" or last.train != message.train:
            out.append(message)
            continue
        text = "\n\n".join(m.content for m in (last, message) if m.content)
        out[-1] = replace(last, content=text, tool_calls=(*last.tool_calls, *message.tool_calls))
    return tuple(out)

"""Cleaning of examples: characters, empty turns, and the order of roles."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from nesso_tune.chat.render import TOOL_CALL
from nesso_tune.conversation import Completion, Conversation, Message, PreferencePair
from nesso_tune.data.columns import Unusable
from nesso_tune.data.convert import Example, is_empty
from nesso_tune.recipes.sections import CleanSection

# Zero-width and control characters except tab, line feed and carriage return; soft hyphens; directional marks
INVISIBLE_CHARACTERS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"
    # The two joiners have a meaning in emoji and in Arabic and Indic scripts, but not next to Latin letters or spaces
    "|(?<![^\x00-\u024f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\u024f])"
)

_TextStep = Callable[[str], str]


def clean(example: Example, settings: CleanSection) -> Example:
    """Applies the cleaning steps to characters, empty turns and the order of roles.

    Raises:
        Unusable: if a step drops the example, or a text becomes empty.
    """
    steps = _text_steps(settings)
    if isinstance(example, Completion):
        text = _apply(steps, example.text)
        if not text.strip():
            raise Unusable("empty_text")
        return example if text is example.text else replace(example, text=text)
    if isinstance(example, Conversation):
        messages = _clean_messages(example.messages, settings, steps)
        return example if messages is example.messages else replace(example, messages=messages)
    if isinstance(example, PreferencePair):
        return _clean_pair(example, settings, steps)
    return example


def _text_steps(settings: CleanSection) -> list[_TextStep]:
    steps: list[_TextStep] = []
    if settings.invisible == "remove":
        steps.append(partial(INVISIBLE_CHARACTERS.sub, ""))
    if settings.unicode == "nfc":
        steps.append(_normalize_nfc)
    return steps


def _normalize_nfc(text: str) -> str:
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _apply(steps: Sequence[_TextStep], text: str) -> str:
    for step in steps:
        text = step(text)
    return text


def _clean_pair(pair: PreferencePair, settings: CleanSection, steps: Sequence[_TextStep]) -> PreferencePair:
    """Cleans the prompt with each of the two answers after it."""
    first, second = (
        _clean_messages((*pair.prompt, answer), settings, steps) for answer in (pair.chosen, pair.rejected)
    )
    if len(first) < 2:
        raise Unusable("no_prompt")
    one, other = ((answer.content, answer.tool_calls, answer.reasoning) for answer in (first[-1], second[-1]))
    if one == other:
        raise Unusable("chosen_equals_rejected")
    return replace(pair, prompt=first[:-1], chosen=first[-1], rejected=second[-1])


def _clean_messages(
    messages: tuple[Message, ...], settings: CleanSection, steps: Sequence[_TextStep]
) -> tuple[Message, ...]:
    if steps:
        messages = tuple(
            replace(m, content=_apply(steps, m.content), reasoning=m.reasoning and _apply(steps, m.reasoning))
            for m in messages
        )
        if any(m.role == "assistant" and is_empty(m) for m in messages):
            raise Unusable("empty_answer")
    if settings.empty_turns != "keep" and any(is_empty(m) and m.role in ("user", "system") for m in messages):
        if settings.empty_turns == "drop":
            raise Unusable("empty_turn")
        messages = tuple(m for m in messages if not (is_empty(m) and m.role in ("user", "system")))
    fault = None if settings.role_order == "keep" else role_order_fault(messages)
    if fault is not None and settings.role_order == "merge":
        messages = merge_consecutive_turns(messages)
        fault = role_order_fault(messages)
    if fault is not None:
        raise Unusable("roles_out_of_order", fault)
    return messages


def role_order_fault(messages: Sequence[Message]) -> str | None:
    """A description of the first fault in the order of roles; None if the order is valid."""
    previous_role, speaker = "", None
    for message in messages:
        role = message.role
        if role == previous_role and role != "tool":
            return f"{role} twice in a row"
        if role == "system" and previous_role:
            return f"system after {previous_role}"
        if role == "tool" and not _calls_tool(speaker):
            return "a tool's result without a call"
        if role != "tool":
            speaker = message
        previous_role = role
    return None


def _calls_tool(message: Message | None) -> bool:
    if message is None or message.role != "assistant":
        return False
    return bool(message.tool_calls) or TOOL_CALL.search(message.content) is not None


def merge_consecutive_turns(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Merges consecutive messages of one role, with a blank line between their texts; tool results stay separate."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last is None or last.role != message.role or message.role == "tool" or last.train != message.train:
            merged.append(message)
            continue
        text = "\n\n".join(m.content for m in (last, message) if m.content)
        thought = "\n\n".join(m.reasoning for m in (last, message) if m.reasoning) or None
        calls = (*last.tool_calls, *message.tool_calls)
        merged[-1] = replace(last, content=text, tool_calls=calls, reasoning=thought)
    return tuple(merged)

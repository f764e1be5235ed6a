"""The data types of a record: messages, conversations, preference pairs, plain texts and tokenized records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNKNOWN_LANGUAGE = "und"  # ISO 639-2 code of an undetermined language
LANGUAGE_NAMES = {
    "italian": "it", "italiano": "it", "ita": "it", "english": "en", "inglese": "en", "eng": "en", "french": "fr",
    "german": "de", "spanish": "es", "portuguese": "pt",
}  # fmt: skip
OTHER_LANGUAGES = ("other", "und")  # all languages that are not listed; records without a language
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: `system`, `user`, `assistant` or `tool`.
        content: the text, exactly as the model reads or writes it.
        tool_calls: tool calls of the assistant in this turn, each `{"name": …, "arguments": {…}}`; OpenAI's form
            `{"function": {…}}` is accepted too.
        name: name of the speaker or the tool, if the data has one.
        train: whether the turn is supervised; None decides by the role.
        reasoning: what the assistant thinks before the content; None or empty without reasoning.
    """

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str | None = None
    train: bool | None = None
    reasoning: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages in order, the available tools, the language and the name of the source."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    language: str = UNKNOWN_LANGUAGE
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "tools", tuple(self.tools or ()))

    @property
    def turns(self) -> tuple[Message, ...]:
        """All messages."""
        return self.messages


@dataclass(frozen=True)
class PreferencePair:
    """A prompt (messages before the answer, and tools) with a chosen and a rejected answer."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    language: str = UNKNOWN_LANGUAGE
    source: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))
        object.__setattr__(self, "tools", tuple(self.tools or ()))

    @property
    def turns(self) -> tuple[Message, ...]:
        """All messages: the prompt and both answers."""
        return (*self.prompt, self.chosen, self.rejected)


@dataclass(frozen=True)
class Completion:
    """A plain text without turns; every token is supervised."""

    text: str
    language: str = UNKNOWN_LANGUAGE
    source: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def turns(self) -> tuple[Message, ...]:
        """The text as an assistant message."""
        return (Message("assistant", self.text),)


@dataclass(frozen=True)
class Tokenized:
    """A record that is tokenized already: token ids and unshifted labels, -100 where not supervised."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    language: str = UNKNOWN_LANGUAGE
    source: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def turns(self) -> tuple[Message, ...]:
        """Empty: there is no text."""
        return ()


def language_code(name: str) -> str | None:
    """`it` for `it`, `IT`, `it-IT`, `ita` and `Italian`; None if it is not a language code, e.g. `Python`."""
    code = name.strip().lower().replace("_", "-").split("-")[0]
    code = LANGUAGE_NAMES.get(code, code)
    return code if LANGUAGE_CODE.fullmatch(code) else None

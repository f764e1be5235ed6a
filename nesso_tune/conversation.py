"""The words everyone shares: a message, a conversation, a preference pair."""

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
OTHER_LANGUAGES = ("other", "und")  # every language that is not named; records that name none
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: `system`, `user`, `assistant` or `tool`.
        content: the text, exactly as the model should read or write it.
        tool_calls: calls that the assistant makes in this turn, in order, each `{"name": …, "arguments": {…}}`; the
            form `{"function": {…}}` of OpenAI is read too.
        name: the name of the speaker or the tool, where the data has one.
        train: False keeps this turn out of the loss even if its role is trained; None leaves that to the role.
    """

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str | None = None
    train: bool | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages in order, with the tools offered, the language they are in and the source they come from."""

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
    """A prompt (messages up to and without the answer, and tools) with a better and a worse answer to it."""

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
        """All messages: the prompt's, and both answers."""
        return (*self.prompt, self.chosen, self.rejected)


@dataclass(frozen=True)
class Completion:
    """A plain text without turns, learned whole."""

    text: str
    language: str = UNKNOWN_LANGUAGE
    source: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def turns(self) -> tuple[Message, ...]:
        """The text, as if the assistant said it."""
        return (Message("assistant", self.text),)


@dataclass(frozen=True)
class Tokenized:
    """Token ids that someone else made, with labels: the id where it is learned, -100 elsewhere; unshifted."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    language: str = UNKNOWN_LANGUAGE
    source: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def turns(self) -> tuple[Message, ...]:
        """None: there is no text."""
        return ()


def language_code(said: str) -> str | None:
    """`it` for `it`, `IT`, `it-IT`, `ita` and `Italian`; None for what is no code, e.g. `Python`."""
    code = said.strip().lower().replace("_", "-").split("-")[0]
    code = LANGUAGE_NAMES.get(code, code)
    return code if LANGUAGE_CODE.fullmatch(code) else None

"""A chat template as data: what stands around the text of each turn, and which of it is a control token.

Everything comes from this one spec: the segments that are trained on, and the `chat_template.jinja` that the
finished model is served with (`jinja.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated

from pydantic import Field

from nesso_tune.errors import RecipeError
from nesso_tune.recipes.load import find_spec, read_spec
from nesso_tune.recipes.sections import NonEmpty, Role, Section
from nesso_tune.recipes.yaml_source import KeyPath

DefaultSystem = str | Mapping[str, str] | None


class ToolFormat(Section):
    """How tools are written: those on offer, calls, and results."""

    offer: Annotated[str, Field(pattern=r"\{tools\}")]
    """What the system message says of the tools; {tools} is replaced by their JSON, one a line."""
    call: Annotated[str, Field(pattern=r"\{call\}")]
    """A call in the assistant's turn; {call} is replaced by {"name": …, "arguments": …}."""
    result: Annotated[str, Field(pattern=r"\{result\}")]
    """The turn of a tool; {result} is replaced by what the tool answered."""


class ChatTemplate(Section):
    """How a conversation is written down."""

    bos: bool = False
    """Begin with the tokenizer's BOS token."""
    header: Annotated[str, Field(pattern=r"\{role\}")]
    """What opens a turn; {role} is replaced by its role."""
    end: NonEmpty
    """What closes a turn: the token that the model must learn to end with."""
    separator: str = ""
    """What follows the end of every turn; never learned."""
    role_names: dict[Role, NonEmpty] = Field(default_factory=dict)
    """What a header calls a role, where that is not the role's own name."""
    tools: ToolFormat | None = None
    """How tools are written; a template without it takes no conversations with tools."""
    control_tokens: Annotated[dict[NonEmpty, NonEmpty], Field(min_length=1)]
    """Control tokens, each with words from whose embeddings a new one starts."""
    eos_token: NonEmpty
    """The token that ends a generation."""
    pad_token: NonEmpty
    """The token that fills a batch."""

    def header_of(self, role: str) -> str:
        """The header of a turn of `role`."""
        return self.header.replace("{role}", self.role_names.get(role, role))  # type: ignore[call-overload]

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Template text in pieces: each with whether it is a control token."""
        return split_at_control_tokens(text, tuple(self.control_tokens))


def split_at_control_tokens(text: str, control_tokens: Collection[str]) -> Iterator[tuple[str, bool]]:
    """A text cut at control tokens: each piece with whether it is one."""
    tokens = sorted(control_tokens, key=len, reverse=True)
    for piece in re.split(f"({'|'.join(map(re.escape, tokens))})", text):
        if piece:
            yield piece, piece in control_tokens


def load_template(name: str) -> ChatTemplate:
    """A shipped template by name, or a file of that kind.

    Raises:
        RecipeError: if there is none, or if the file is wrong.
    """
    path = find_spec("chat", name, "chat.template")
    template, document = read_spec(path, ChatTemplate)
    once: list[tuple[KeyPath, str, str]] = [(("header",), template.header, "{role}")]
    if template.tools is not None:
        once += [(("tools", name), getattr(template.tools, name), f"{{{word}}}")
                 for name, word in (("offer", "tools"), ("call", "call"), ("result", "result"))]  # fmt: skip
    for key in ("offer", "call", "result") if template.tools is not None else ():
        if any(control for _, control in template.pieces(getattr(template.tools, key))):
            raise RecipeError(
                document.where(("tools", key)), f"`tools.{key}` holds a control token",
                "write tags as plain text: answers are decoded without control tokens",
            )  # fmt: skip
    for place, text, word in once:
        if text.count(word) > 1:
            key = ".".join(map(str, place))
            raise RecipeError(document.where(place), f"`{key}` holds {word} more than once", "keep one")
    for key in ("eos_token", "end"):
        if getattr(template, key) not in template.control_tokens:
            raise RecipeError(
                document.where((key,)), f"`{key}` is not among control_tokens", "add it there, so that it is one token"
            )
    if template.eos_token != template.end:
        raise RecipeError(
            document.where(("eos_token",)),
            f"turns end with {template.end}, but generation would wait for {template.eos_token}",
            "make the two equal",
        )
    return template

"""Chat templates as data: the text around each turn, and the control tokens in it.

Both the segments for training (`render.py`) and the `chat_template.jinja` of the final model (`jinja.py`) are derived
from this specification.
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
    """The text format of tool definitions, tool calls and tool results."""

    offer: Annotated[str, Field(pattern=r"\{tools\}")]
    """Text that the system message gets for tools; {tools} is replaced by their JSON, one per line."""
    call: Annotated[str, Field(pattern=r"\{call\}")]
    """A tool call in an assistant turn; {call} is replaced by {"name": …, "arguments": …}."""
    result: Annotated[str, Field(pattern=r"\{result\}")]
    """The content of a tool turn; {result} is replaced by the result."""


class ChatTemplate(Section):
    """The text format of a conversation."""

    bos: bool = False
    """Start with the BOS token of the tokenizer."""
    header: Annotated[str, Field(pattern=r"\{role\}")]
    """Start of a turn; {role} is replaced by its role."""
    end: NonEmpty
    """End of a turn, which the model learns to generate."""
    separator: str = ""
    """Text after the end of every turn; never supervised."""
    role_names: dict[Role, NonEmpty] = Field(default_factory=dict)
    """Names of roles in headers, where they differ from the role."""
    tools: ToolFormat | None = None
    """Format of tools; without it, conversations with tools are errors."""
    control_tokens: Annotated[dict[NonEmpty, NonEmpty], Field(min_length=1)]
    """Control tokens, each with a text; the embedding of a new token starts from the mean of that text's embeddings."""
    eos_token: NonEmpty
    """Token that stops generation."""
    pad_token: NonEmpty
    """Padding token."""

    def header_of(self, role: str) -> str:
        """The header of a turn with this role."""
        return self.header.replace("{role}", self.role_names.get(role, role))  # type: ignore[call-overload]

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Splits template text into (piece, whether it is a control token)."""
        return split_at_control_tokens(text, tuple(self.control_tokens))


def split_at_control_tokens(text: str, control_tokens: Collection[str]) -> Iterator[tuple[str, bool]]:
    """Splits a text at control tokens into (piece, whether it is a control token)."""
    tokens = sorted(control_tokens, key=len, reverse=True)
    for piece in re.split(f"({'|'.join(map(re.escape, tokens))})", text):
        if piece:
            yield piece, piece in control_tokens


def load_template(name: str) -> ChatTemplate:
    """Loads a bundled template by name, or a template file.

    Raises:
        RecipeError: if it does not exist or is invalid.
    """
    template, document = read_spec(find_spec("chat", name, "chat.template"), ChatTemplate)
    if template.tools is not None:
        for key in ("offer", "call", "result"):
            if any(is_control for _, is_control in template.pieces(getattr(template.tools, key))):
                raise RecipeError(
                    document.where(("tools", key)), f"`tools.{key}` contains a control token",
                    "write tags as plain text: answers are decoded without control tokens",
                )  # fmt: skip
    for place, text, placeholder in _placeholders(template):
        if text.count(placeholder) > 1:
            key = ".".join(map(str, place))
            raise RecipeError(document.where(place), f"`{key}` contains {placeholder} more than once", "keep one")
    for key in ("eos_token", "end"):
        if getattr(template, key) not in template.control_tokens:
            raise RecipeError(
                document.where((key,)), f"`{key}` is not in control_tokens", "add it there, to make it a single token"
            )
    if template.eos_token != template.end:
        raise RecipeError(
            document.where(("eos_token",)),
            f"turns end with {template.end}, but generation stops at {template.eos_token}",
            "set both to the same token",
        )
    return template


def _placeholders(template: ChatTemplate) -> list[tuple[KeyPath, str, str]]:
    """(key, its text, the placeholder in it) of every text with a placeholder."""
    found: list[tuple[KeyPath, str, str]] = [(("header",), template.header, "{role}")]
    if template.tools is not None:
        keys = {"offer": "{tools}", "call": "{call}", "result": "{result}"}
        found += [(("tools", key), getattr(template.tools, key), placeholder) for key, placeholder in keys.items()]
    return found

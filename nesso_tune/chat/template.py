"""Chat templates as data: the text around each turn, and the control tokens in it.

Both the segments for training (`render.py`) and the `chat_template.jinja` of the final model (`jinja.py`) are derived
from this specification; tests compare the two token by token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from nesso_tune.errors import RecipeError
from nesso_tune.recipes.load import find_spec, read_spec
from nesso_tune.recipes.sections import NonEmpty, Role, Section
from nesso_tune.recipes.yaml_source import Document, KeyPath

DefaultSystem = str | Mapping[str, str] | None
Strip = Literal["both", "end", "leading_lines"]


class _Format(Section):
    """A section whose later keys are written only where they are set.

    The serialized specification is part of the tokenizer's fingerprint, which must stay the same for runs that began
    before a key was added.
    """

    later_keys: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_unused_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        unused = {
            name for name in self.later_keys
            if getattr(self, name) == fields[name].get_default(call_default_factory=True)
        }  # fmt: skip
        return {name: value for name, value in written.items() if name not in unused}


class Turn(Section):
    """Start and end of the turns of one role, where they differ from `header`, `end` and `separator`."""

    start: str | None = None
    """Text before the content. null writes the header."""
    end: str | None = None
    """Text after the content, instead of `end` and `separator`. Not for the assistant, whose turns end with `end`."""


class SystemFormat(Section):
    """Where the system message is written, and the text around it."""

    placement: Literal["turn", "fold_into_user"] = "turn"
    """turn writes it as a turn of its own, fold_into_user at the start of the first user turn."""
    text: Annotated[str, Field(pattern=r"\{system\}")] = "{system}"
    """Text of the message; {system} is replaced by the message of the conversation."""
    default: NonEmpty | None = None
    """Message of conversations that have none, unless the recipe sets `chat.default_system`."""


class ToolFormat(_Format):
    """The text format of tool definitions, tool calls and tool results."""

    later_keys = ("placement", "definition", "separator", "call_separator", "result_separator")

    offer: Annotated[str, Field(pattern=r"\{tools\}")]
    """Text that offers the tools; {tools} is replaced by their definitions."""
    call: Annotated[str, Field(pattern=r"\{call\}|\{name\}.*\{arguments\}")]
    """A tool call in an assistant turn. {call} is replaced by {"name": …, "arguments": …}, {name} by the name alone and
    {arguments} by their JSON."""
    result: Annotated[str, Field(pattern=r"\{result\}")]
    """The content of a tool turn; {result} is replaced by the result."""
    placement: Literal["system", "after_system"] = "system"
    """system writes the offer at the end of the system message, which is added if there is none; after_system writes it
    after the turn of the system message."""
    definition: Literal["json", "python"] = "json"
    """How a definition is written: as JSON, or as a Python dict."""
    separator: str = "\n"
    """Text between two definitions."""
    call_separator: str = "\n"
    """Text between the content of a turn and its first call, and between two calls."""
    result_separator: str | None = None
    """Text between consecutive results in one turn. null writes each result as a turn of its own."""


class ReasoningFormat(Section):
    """The text format of an assistant's reasoning, which stands before the content of its turn.

    Line breaks at the edges of the reasoning, and at the start of the content after it, are not written where `start`
    and `end` contain them.
    """

    start: NonEmpty
    """Text before the reasoning."""
    end: NonEmpty
    """Text after the reasoning."""
    history: Literal["keep", "drop"] = "keep"
    """drop writes reasoning only after the last user turn, so an answer loses it in later turns."""
    empty: bool = False
    """Write start and end around nothing in a last answer that has no reasoning."""


class ChatTemplate(_Format):
    """The text format of a conversation."""

    later_keys = ("turns", "prompt", "strip", "system", "reasoning")

    bos: bool = False
    """Start with the BOS token of the tokenizer."""
    header: Annotated[str, Field(pattern=r"\{role\}")] | None = None
    """Start of a turn; {role} is replaced by its role. null requires a start for each role in `turns`."""
    end: NonEmpty
    """End of a turn, which the model learns to generate."""
    separator: str = ""
    """Text after the end of every turn; never supervised."""
    role_names: dict[Role, NonEmpty] = Field(default_factory=dict)
    """Names of roles in headers, where they differ from the role."""
    turns: dict[Role, Turn] = Field(default_factory=dict)
    """Start and end of turns by role, where they differ."""
    prompt: str = ""
    """Text after the assistant's header in a prompt for generation, and in the last answer; never supervised."""
    strip: dict[Role, Strip] = Field(default_factory=dict)
    """White space that is removed from contents, by role: both sides, the end, or leading line breaks."""
    system: SystemFormat = SystemFormat()
    """Format of the system message."""
    tools: ToolFormat | None = None
    """Format of tools; without it, conversations with tools are errors."""
    reasoning: ReasoningFormat | None = None
    """Format of reasoning; without it, `data.reasoning: keep` is an error."""
    control_tokens: Annotated[dict[NonEmpty, NonEmpty], Field(min_length=1)]
    """Control tokens, each with a text; the embedding of a new token starts from the mean of that text's embeddings."""
    eos_token: NonEmpty
    """Token that stops generation."""
    pad_token: NonEmpty
    """Padding token."""

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The control tokens."""
        return tuple(self.control_tokens)

    def frame(self, role: str) -> tuple[str, str, str]:
        """The text before the content of turns with this role, their end, and the text after it."""
        if role not in self._frames:
            self._frames[role] = (self.start_of(role), *self.end_of(role))
        return self._frames[role]

    @cached_property
    def _frames(self) -> dict[str, tuple[str, str, str]]:
        return {}

    def start_of(self, role: str) -> str:
        """The text before the content of a turn with this role."""
        turn = self.turns.get(role)  # type: ignore[call-overload]
        return self.header_of(role) if turn is None or turn.start is None else turn.start

    def header_of(self, role: str) -> str:
        """The header of a turn with this role."""
        name = self.role_names.get(role, role)  # type: ignore[call-overload]
        return (self.header or "{role}").replace("{role}", name)

    def end_of(self, role: str) -> tuple[str, str]:
        """The text after the content of a turn with this role: its end, and what follows it."""
        turn = self.turns.get(role)  # type: ignore[call-overload]
        return (self.end, self.separator) if turn is None or turn.end is None else (turn.end, "")

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Splits template text into (piece, whether it is a control token)."""
        return split_at_control_tokens(text, self.tokens)

    def has_control_token(self, text: str) -> bool:
        """Whether a template text contains a control token."""
        return any(is_control for _, is_control in self.pieces(text))

    @property
    def drops_history(self) -> bool:
        """Whether an answer is written otherwise once a user turn follows it."""
        return self.reasoning is not None and self.reasoning.history == "drop"


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
    _check_roles(template, document)
    _check_control_tokens(template, document)
    for place, text, placeholder in _placeholders(template):
        if text.count(placeholder) > 1:
            key = ".".join(map(str, place))
            raise RecipeError(document.where(place), f"`{key}` contains {placeholder} more than once", "keep one")
    if template.eos_token != template.end:
        raise RecipeError(
            document.where(("eos_token",)),
            f"turns end with {template.end}, but generation stops at {template.eos_token}",
            "set both to the same token",
        )
    return template


def _check_roles(template: ChatTemplate, document: Document) -> None:
    """Raises RecipeError if the turns of a role have no start, or the assistant's another end."""
    if template.header is None:
        folded = ("system",) if template.system.placement == "fold_into_user" else ()
        roles = [role for role in get_args(Role) if role not in folded]
        missing = [role for role in roles if role not in template.turns or template.turns[role].start is None]
        if missing:
            what = f"the key `header` is missing, and turns of {missing[0]} have no start"
            raise RecipeError(
                document.where(("header",)), what,
                "add `header`, or a start for every role in `turns`",
            )  # fmt: skip
    if "assistant" in template.turns and template.turns["assistant"].end is not None:
        raise RecipeError(
            document.where(("turns", "assistant", "end")), "`turns.assistant.end` has no effect", "set `end`"
        )
    if template.prompt and (template.reasoning is None or not template.reasoning.empty):
        raise RecipeError(
            document.where(("prompt",)), "`prompt` is not in the answers of conversations",
            "add `reasoning` with `empty: true`, or write the text into `turns.assistant.start`",
        )  # fmt: skip


def _check_control_tokens(template: ChatTemplate, document: Document) -> None:
    """Raises RecipeError for a control token in text that is encoded as text, and for an end that is none."""
    if (tools := template.tools) is not None:
        keys = ["result", *(["offer"] if tools.placement == "system" else [])]
        wrong = next((key for key in keys if template.has_control_token(getattr(tools, key))), None)
        if wrong is None and template.end in tools.call:
            wrong = "call"
        if wrong is not None:
            what = f"`tools.{wrong}` contains a control token"
            raise RecipeError(document.where(("tools", wrong)), what, "write tags as plain text")
    for key in ("eos_token", "end"):
        if getattr(template, key) not in template.control_tokens:
            raise RecipeError(
                document.where((key,)), f"`{key}` is not in control_tokens", "add it there, to make it a single token"
            )


def _placeholders(template: ChatTemplate) -> list[tuple[KeyPath, str, str]]:
    """(key, its text, the placeholder in it) of every text with a placeholder."""
    found: list[tuple[KeyPath, str, str]] = [
        (("header",), template.header or "", "{role}"), (("system", "text"), template.system.text, "{system}"),
    ]  # fmt: skip
    if (tools := template.tools) is not None:
        found += [(("tools", "offer"), tools.offer, "{tools}"), (("tools", "result"), tools.result, "{result}")]
        found += [(("tools", "call"), tools.call, name) for name in ("{call}", "{name}", "{arguments}")]
    return found

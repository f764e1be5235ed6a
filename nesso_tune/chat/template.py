"""A chat template as data: what stands around the text of each turn, and which of it is a control token.

Everything comes from this one spec: the segments that are trained on, and the `chat_template.jinja` that the
finished model is served with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import Field

from nesso_tune.chat.spec import find_spec, read_spec
from nesso_tune.conversation import UNKNOWN_LANGUAGE
from nesso_tune.errors import RecipeError
from nesso_tune.recipes.sections import NonEmpty, Section

DefaultSystem = str | Mapping[str, str] | None


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
    control_tokens: Annotated[dict[NonEmpty, NonEmpty], Field(min_length=1)]
    """Control tokens, each with words from whose embeddings a new one starts."""
    eos_token: NonEmpty
    """The token that ends a generation."""
    pad_token: NonEmpty
    """The token that fills a batch."""

    def header_of(self, role: str) -> str:
        """The header of a turn of `role`."""
        return self.header.replace("{role}", role)

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Template text in pieces: each with whether it is a control token."""
        tokens = sorted(self.control_tokens, key=len, reverse=True)
        for piece in re.split(f"({'|'.join(map(re.escape, tokens))})", text):
            if piece:
                yield piece, piece in self.control_tokens


def load_template(name: str) -> ChatTemplate:
    """A shipped template by name, or a file of that kind.

    Raises:
        RecipeError: if there is none, or if the file is wrong.
    """
    path = find_spec("chat", name, "chat.template")
    template, document = read_spec(path, ChatTemplate)
    if template.header.count("{role}") > 1:
        raise RecipeError(document.where(("header",)), "`header` holds {role} more than once", "keep one")
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


def to_jinja(template: ChatTemplate, default_system: DefaultSystem = None) -> str:
    """The template as Jinja, for `tokenizer.apply_chat_template` and every server that reads it.

    Assistant text and its end stand in a `generation` block, so that transformers can return the assistant's mask.
    """

    def quoted(text: str) -> str:
        escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
        return f"'{escaped}'"

    before, after = template.header.split("{role}")
    body = f"(message['content'] or '') + {quoted(template.end)}"
    lines = ["{{- bos_token -}}"] if template.bos else []
    if default_system is not None:
        if isinstance(default_system, str):
            lines.append(f"{{%- set default_system = {quoted(default_system)} -%}}")
        else:
            texts = ", ".join(f"{quoted(k)}: {quoted(v)}" for k, v in default_system.items())
            first = quoted(next(iter(default_system)))
            lines.append(f"{{%- set systems = {{{texts}}} -%}}")
            unknown = f"language is not defined or language == {quoted(UNKNOWN_LANGUAGE)}"
            lines.append(
                "{%- set default_system = systems[language] if language is defined and language in systems "
                f"else systems[{first}] if {unknown} else none -%}}"
            )
        system = quoted(template.header_of("system"))
        lines.append(
            "{%- if default_system is not none and (not messages or messages[0]['role'] != 'system') -%}"
            f"{{{{- {system} + default_system + {quoted(template.end + template.separator)} -}}}}{{%- endif -%}}"
        )
    lines += [
        "{%- for message in messages -%}",
        f"{{{{- {quoted(before)} + message['role'] + {quoted(after)} -}}}}",
        "{%- if message['role'] == 'assistant' -%}",
        f"{{%- generation -%}}{{{{- {body} -}}}}{{%- endgeneration -%}}",
        f"{{%- else -%}}{{{{- {body} -}}}}{{%- endif -%}}",
        f"{{{{- {quoted(template.separator)} -}}}}" if template.separator else "",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {quoted(template.header_of('assistant'))} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(line for line in lines if line) + "\n"

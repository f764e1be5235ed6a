"""Chat templates as data (the text around each turn, and the control tokens in it), and their Jinja form.

Both the segments for training (`render.py`) and the `chat_template.jinja` of the final model (`to_jinja`) are derived
from this specification; tests compare the two token by token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated

from pydantic import Field

from nesso_tune.conversation import UNKNOWN_LANGUAGE
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


# JSON must be written as by the `tojson` filter of transformers. The filter of plain Jinja sorts keys and escapes `<`
# and non-ASCII characters; PLAIN_JSON detects it, and the macro AS_JSON replaces it.
PLAIN_JSON = "{%- set plain_json = ({'b': '<è', 'a': 1} | tojson) == '{\"b\": \"<è\", \"a\": 1}' -%}"
AS_JSON = r"""
{%- macro as_json(value) -%}
{%- if value is string -%}
{%- set text = namespace(escaped=value | replace('\\', '\\\\') | replace('"', '\\"')) -%}
{%- set short = {8: 'b', 9: 't', 10: 'n', 12: 'f', 13: 'r'} -%}
{%- for code in range(32) -%}
{%- set escape = '\\' + short[code] if code in short else '\\u%04x' | format(code) -%}
{%- set text.escaped = text.escaped | replace('%c' | format(code), escape) -%}
{%- endfor -%}
{{- '"' + text.escaped + '"' -}}
{%- elif value is none -%}
{{- 'null' -}}
{%- elif value is boolean -%}
{{- 'true' if value else 'false' -}}
{%- elif value is mapping -%}
{{- '{' -}}
{%- for key in value -%}
{{- ('' if loop.first else ', ') + as_json(key | string) + ': ' + as_json(value[key]) -}}
{%- endfor -%}
{{- '}' -}}
{%- elif value is iterable -%}
{{- '[' -}}
{%- for item in value -%}
{{- ('' if loop.first else ', ') + as_json(item) -}}
{%- endfor -%}
{{- ']' -}}
{%- else -%}
{{- value -}}
{%- endif -%}
{%- endmacro -%}""".strip()


def to_jinja(template: ChatTemplate, default_system: DefaultSystem = None, masks: bool = False) -> str:
    """The text of `chat_template.jinja`; plain Jinja and transformers render it to the same text.

    Variables: `messages` (with `tool_calls` in the OpenAI form), `tools`, `add_generation_prompt`, and `language` if
    the default system message depends on it.

    Args:
        template: the chat template.
        default_system: system message of conversations without one.
        masks: for transformers only: wraps assistant turns in `generation` blocks, which give the assistant mask, and
            uses its `tojson` filter.
    """
    end, separator = template.end, template.separator
    before, after = template.header.split("{role}")
    lines = [
        *(["{{- bos_token -}}"] if template.bos else []),
        *([PLAIN_JSON, AS_JSON] if template.tools is not None and not masks else []),
        *_system(default_system),
        *(_tool_definitions(template.tools, masks) if template.tools is not None else []),
        "{%- if system is not none -%}",
        f"{{{{- {_quoted(template.header_of('system'))} + system + {_quoted(end + separator)} -}}}}",
        "{%- endif -%}",
        "{%- for message in rest -%}",
        "{%- set turn = namespace(body=message['content'] or '') -%}",
        *(_body(template.tools, masks) if template.tools is not None else []),
        f"{{{{- {_quoted(before)} + {_role(template)} + {_quoted(after)} -}}}}",
        *_turn(f"{{{{- turn.body + {_quoted(end)} -}}}}", masks),
        *([f"{{{{- {_quoted(separator)} -}}}}"] if separator else []),
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {_quoted(template.header_of('assistant'))} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(lines) + "\n"


def _turn(body: str, masks: bool) -> list[str]:
    """The body of a turn and its end token; with `masks`, assistant turns are in a `generation` block."""
    if not masks:
        return [body]
    supervised = f"{{%- generation -%}}{body}{{%- endgeneration -%}}"
    return ["{%- if message['role'] == 'assistant' -%}", supervised, f"{{%- else -%}}{body}{{%- endif -%}}"]


def _json(value: str, masks: bool) -> str:
    """A Jinja expression for the JSON of a value."""
    return f"({value} | tojson)" if masks else f"({value} | tojson if plain_json else as_json({value}))"


def _quoted(text: str) -> str:
    """A text as a Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _system(default_system: DefaultSystem) -> Iterator[str]:
    """Sets `system` (the system message, the default, or none) and `rest` (the other messages)."""
    if isinstance(default_system, Mapping):
        texts = ", ".join(f"{_quoted(k)}: {_quoted(v)}" for k, v in default_system.items())
        first = _quoted(next(iter(default_system)))
        unknown = f"language is not defined or language == {_quoted(UNKNOWN_LANGUAGE)}"
        yield f"{{%- set systems = {{{texts}}} -%}}"
        yield (
            "{%- set default_system = systems[language] if language is defined and language in systems "
            f"else systems[{first}] if {unknown} else none -%}}"
        )
    else:
        yield f"{{%- set default_system = {'none' if default_system is None else _quoted(default_system)} -%}}"
    yield "{%- set has_system = messages and messages[0]['role'] == 'system' -%}"
    yield "{%- set system = (messages[0]['content'] or '') if has_system else default_system -%}"
    yield "{%- set rest = messages[1:] if has_system else messages -%}"


def _tool_definitions(tools: ToolFormat, masks: bool) -> Iterator[str]:
    """Appends the tool definitions to `system`."""
    before, after = (_quoted(part) for part in tools.offer.split("{tools}"))
    tool = "tool if tool['function'] is defined else {'type': 'function', 'function': tool}"
    yield "{%- if tools -%}"
    yield "{%- set offered = namespace(lines='') -%}"
    yield "{%- for tool in tools -%}"
    yield "{%- set line_break = '' if loop.first else '\\n' -%}"
    yield f"{{%- set offered.lines = offered.lines + line_break + {_json(f'({tool})', masks)} -%}}"
    yield "{%- endfor -%}"
    yield f"{{%- set offer = {before} + offered.lines + {after} -%}}"
    yield "{%- set system = system + '\\n\\n' + offer if system else offer -%}"
    yield "{%- endif -%}"


def _body(tools: ToolFormat, masks: bool) -> Iterator[str]:
    """Appends tool calls to `turn.body`, and wraps tool results."""
    before, after = (_quoted(part) for part in tools.call.split("{call}"))
    opens, closes = (_quoted(part) for part in tools.result.split("{result}"))
    wrapped = f"{opens} + turn.body + {closes}"
    if opens != "''":
        wrapped = f"turn.body if turn.body.startswith({opens}) else {wrapped}"
    name, arguments = _json("call['name']", masks), _json("call['arguments']", masks)
    call = f"'{{\"name\": ' + {name} + ', \"arguments\": ' + said + '}}'"
    yield f"{{%- if message['role'] == 'tool' -%}}{{%- set turn.body = {wrapped} -%}}{{%- endif -%}}"
    yield "{%- if message['tool_calls'] is defined and message['tool_calls'] -%}"
    yield "{%- for entry in message['tool_calls'] -%}"
    yield "{%- set call = entry['function'] if entry['function'] is defined else entry -%}"
    yield (
        f"{{%- set said = call['arguments'] if call['arguments'] is string else {arguments} -%}}"
        "{%- set line_break = '\\n' if turn.body else '' -%}"
    )
    yield f"{{%- set turn.body = turn.body + line_break + {before} + {call} + {after} -%}}"
    yield "{%- endfor -%}"
    yield "{%- endif -%}"


def _role(template: ChatTemplate) -> str:
    if not template.role_names:
        return "message['role']"
    names = ", ".join(f"{_quoted(role)}: {_quoted(name)}" for role, name in template.role_names.items())
    return f"({{{names}}}[message['role']] if message['role'] in {{{names}}} else message['role'])"

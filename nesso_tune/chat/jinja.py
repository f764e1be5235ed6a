"""A chat template as Jinja, for `tokenizer.apply_chat_template` and every server that reads it.

It says the same as the segments that are trained on; tests hold the two equal, token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nesso_tune.chat.template import ChatTemplate, DefaultSystem, ToolFormat
from nesso_tune.conversation import UNKNOWN_LANGUAGE

# The text of JSON as `tojson` writes it under transformers. Plain Jinja's own filter sorts keys and escapes `<` and all
# that is not ASCII; where a probe shows such a filter, a macro writes the JSON instead.
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
    """The template's `chat_template.jinja`, which plain Jinja renders to the same text as transformers.

    It takes `messages` (with `tool_calls` in the OpenAI form), `tools`, `add_generation_prompt`, and `language` where
    the default system message depends on it.

    Args:
        template: the chat template.
        default_system: system message of conversations without one.
        masks: for transformers alone: puts assistant text and its end into a `generation` block, from which it makes
            the assistant's mask, and leaves JSON to its filter.
    """
    end, separator = template.end, template.separator
    before, after = template.header.split("{role}")
    lines = [
        *(["{{- bos_token -}}"] if template.bos else []),
        *([PLAIN_JSON, AS_JSON] if template.tools is not None and not masks else []),
        *_system(default_system),
        *(_offer(template.tools, masks) if template.tools is not None else []),
        "{%- if system is not none -%}",
        f"{{{{- {quoted(template.header_of('system'))} + system + {quoted(end + separator)} -}}}}",
        "{%- endif -%}",
        "{%- for message in rest -%}",
        "{%- set turn = namespace(body=message['content'] or '') -%}",
        *(_body(template.tools, masks) if template.tools is not None else []),
        f"{{{{- {quoted(before)} + {_role(template)} + {quoted(after)} -}}}}",
        *_turn(f"{{{{- turn.body + {quoted(end)} -}}}}", masks),
        *([f"{{{{- {quoted(separator)} -}}}}"] if separator else []),
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {quoted(template.header_of('assistant'))} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(lines) + "\n"


def _turn(body: str, masks: bool) -> list[str]:
    """The body of a turn and its end; of an assistant's turn in a `generation` block if a mask is wanted."""
    if not masks:
        return [body]
    learned = f"{{%- generation -%}}{body}{{%- endgeneration -%}}"
    return ["{%- if message['role'] == 'assistant' -%}", learned, f"{{%- else -%}}{body}{{%- endif -%}}"]


def _json(value: str, masks: bool) -> str:
    """The JSON of a Jinja expression, as an expression."""
    return f"({value} | tojson)" if masks else f"({value} | tojson if plain_json else as_json({value}))"


def quoted(text: str) -> str:
    """A text as a Jinja string."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _system(default_system: DefaultSystem) -> Iterator[str]:
    """Sets `system` (the system message, the default one, or none) and `rest` (the other messages)."""
    if isinstance(default_system, Mapping):
        texts = ", ".join(f"{quoted(k)}: {quoted(v)}" for k, v in default_system.items())
        first = quoted(next(iter(default_system)))
        unknown = f"language is not defined or language == {quoted(UNKNOWN_LANGUAGE)}"
        yield f"{{%- set systems = {{{texts}}} -%}}"
        yield (
            "{%- set default_system = systems[language] if language is defined and language in systems "
            f"else systems[{first}] if {unknown} else none -%}}"
        )
    else:
        yield f"{{%- set default_system = {'none' if default_system is None else quoted(default_system)} -%}}"
    yield "{%- set has_system = messages and messages[0]['role'] == 'system' -%}"
    yield "{%- set system = (messages[0]['content'] or '') if has_system else default_system -%}"
    yield "{%- set rest = messages[1:] if has_system else messages -%}"


def _offer(tools: ToolFormat, masks: bool) -> Iterator[str]:
    """Adds the tools to `system`."""
    before, after = (quoted(part) for part in tools.offer.split("{tools}"))
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
    """Adds the calls of an assistant's message to `turn.body`, and what stands around a tool's result."""
    before, after = (quoted(part) for part in tools.call.split("{call}"))
    opens, closes = (quoted(part) for part in tools.result.split("{result}"))
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
    names = ", ".join(f"{quoted(role)}: {quoted(name)}" for role, name in template.role_names.items())
    return f"({{{names}}}[message['role']] if message['role'] in {{{names}}} else message['role'])"

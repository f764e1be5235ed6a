"""The Jinja form of a chat template: the text of `chat_template.jinja`.

Templates are written for plain Jinja as well as for transformers, and the features of a specification that it does not
use leave no trace in its Jinja: the text is part of the tokenizer's fingerprint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import get_args

from nesso_tune.chat.template import ChatTemplate, DefaultSystem, ReasoningFormat, ToolFormat
from nesso_tune.conversation import UNKNOWN_LANGUAGE
from nesso_tune.recipes.sections import Role

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

    Variables: `messages` (with `tool_calls` in the OpenAI form, and reasoning as `reasoning_content`, `reasoning` or
    `thinking`), `tools`, `add_generation_prompt`, and `language` if the default system message depends on it.

    Args:
        template: the chat template.
        default_system: system message of conversations without one.
        masks: for transformers only: wraps assistant turns in `generation` blocks, which give the assistant mask, and
            uses its `tojson` filter.
    """
    tools, reasoning = template.tools, template.reasoning
    lines = [
        *(["{{- bos_token -}}"] if template.bos else []),
        *([PLAIN_JSON, AS_JSON] if tools is not None and not masks else []),
        *_system(template, default_system),
        *(_tool_definitions(tools, masks) if tools is not None else []),
        *_system_turn(template),
        *(_last_user() if reasoning is not None and reasoning.history == "drop" else []),
        "{%- for message in rest -%}",
        "{%- set turn = namespace(body=message['content'] or '') -%}",
        *_strip(template),
        *(_joined_results() if _joins_results(tools) else []),
        *(_reasoning(reasoning, template) if reasoning is not None else []),
        *(_body(tools, masks) if tools is not None else []),
        *_start(template),
        *_turn(template, masks),
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}{{- "
        f"{_quoted(template.start_of('assistant') + template.prompt)} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(lines) + "\n"


def _json(value: str, masks: bool) -> str:
    """A Jinja expression for the JSON of a value."""
    return f"({value} | tojson)" if masks else f"({value} | tojson if plain_json else as_json({value}))"


def _quoted(text: str) -> str:
    """A text as a Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _mapping(texts: Mapping[str, str] | Mapping[Role, str]) -> str:
    """A Jinja mapping of texts."""
    return "{" + ", ".join(f"{_quoted(key)}: {_quoted(text)}" for key, text in texts.items()) + "}"


def _system(template: ChatTemplate, default_system: DefaultSystem) -> Iterator[str]:
    """Sets `system` (the system message, the default, or none) and `rest` (the other messages)."""
    if isinstance(default_system, Mapping):
        first = _quoted(next(iter(default_system)))
        unknown = f"language is not defined or language == {_quoted(UNKNOWN_LANGUAGE)}"
        yield f"{{%- set systems = {_mapping(default_system)} -%}}"
        yield (
            "{%- set default_system = systems[language] if language is defined and language in systems "
            f"else systems[{first}] if {unknown} else none -%}}"
        )
    else:
        yield f"{{%- set default_system = {'none' if default_system is None else _quoted(default_system)} -%}}"
    default = template.system.default
    if default is not None:
        yield f"{{%- set default_system = {_quoted(default)} if default_system is none else default_system -%}}"
    yield "{%- set has_system = messages and messages[0]['role'] == 'system' -%}"
    yield "{%- set system = (messages[0]['content'] or '') if has_system else default_system -%}"
    if "system" in template.strip:
        yield f"{{%- set system = {_stripped('system', template.strip['system'])} if has_system else system -%}}"
    if default is not None:
        yield "{%- set system = system or default_system -%}"
    yield "{%- set rest = messages[1:] if has_system else messages -%}"


def _tool_definitions(tools: ToolFormat, masks: bool) -> Iterator[str]:
    """Sets `offer`, the text with the tool definitions, and appends it to `system` if it belongs there."""
    before, after = (_quoted(part) for part in tools.offer.split("{tools}"))
    tool = "(tool if tool['function'] is defined else {'type': 'function', 'function': tool})"
    written = _json(tool, masks) if tools.definition == "json" else f"({tool} | string)"
    yield "{%- if tools -%}"
    yield "{%- set offered = namespace(lines='') -%}"
    yield "{%- for tool in tools -%}"
    yield f"{{%- set line_break = '' if loop.first else {_quoted(tools.separator)} -%}}"
    yield f"{{%- set offered.lines = offered.lines + line_break + {written} -%}}"
    yield "{%- endfor -%}"
    yield f"{{%- set offer = {before} + offered.lines + {after} -%}}"
    if tools.placement == "system":
        yield "{%- set system = system + '\\n\\n' + offer if system else offer -%}"
    yield "{%- endif -%}"


def _system_turn(template: ChatTemplate) -> Iterator[str]:
    """Writes the system message, or sets `folded`, its text in the first user turn; then the offer of tools."""
    before, after = template.system.text.split("{system}")
    system = " + ".join([*([_quoted(before)] if before else []), "system", *([_quoted(after)] if after else [])])
    if template.system.placement == "fold_into_user":
        yield f"{{%- set folded = {system} if system is not none else '' -%}}"
        yield "{%- if system is not none and not (rest and rest[0]['role'] == 'user') -%}"
        yield "{{- raise_exception('The system message needs a user turn after it') -}}"
        yield "{%- endif -%}"
    else:
        end = "".join(template.end_of("system"))
        closed = f" + {_quoted(end)}" if end else ""
        yield "{%- if system is not none -%}"
        yield f"{{{{- {_quoted(template.start_of('system'))} + {system}{closed} -}}}}"
        yield "{%- endif -%}"
    if template.tools is not None and template.tools.placement == "after_system":
        yield "{%- if tools -%}{{- offer -}}{%- endif -%}"


def _last_user() -> Iterator[str]:
    """Sets `last_user`, the index of the last user turn in `rest`; the number of turns if there is none."""
    yield "{%- set last_user = namespace(index=rest | length) -%}"
    yield "{%- for message in rest -%}"
    yield "{%- if message['role'] == 'user' -%}{%- set last_user.index = loop.index0 -%}{%- endif -%}"
    yield "{%- endfor -%}"


def _stripped(text: str, how: str) -> str:
    """A Jinja expression for a text without white space at its sides."""
    return text + {"both": " | trim", "end": ".rstrip()", "leading_lines": ".lstrip('\\n')"}[how]


def _strip(template: ChatTemplate) -> Iterator[str]:
    """Strips the content of a turn, and adds the folded system message to the first."""
    for role, how in template.strip.items():
        if role != "system":
            yield (
                f"{{%- if message['role'] == {_quoted(role)} -%}}"
                f"{{%- set turn.body = {_stripped('turn.body', how)} -%}}{{%- endif -%}}"
            )
    if template.system.placement == "fold_into_user":
        yield "{%- if loop.first -%}{%- set turn.body = folded + turn.body -%}{%- endif -%}"


def _joins_results(tools: ToolFormat | None) -> bool:
    return tools is not None and tools.result_separator is not None


def _joined_results() -> Iterator[str]:
    """Sets whether a tool result is in one turn with the result before it, and with the next one."""
    for name, first, other in (("joins", "loop.first", "- 1"), ("continues", "loop.last", "+ 1")):
        role = f"rest[loop.index0 {other}]['role']"
        yield f"{{%- set turn.{name} = not {first} and message['role'] == 'tool' and {role} == 'tool' -%}}"


def _reasoning(style: ReasoningFormat, template: ChatTemplate) -> Iterator[str]:
    """Sets `turn.reasoning`, the text before the content of an assistant turn, and strips the content after it."""
    said = "message['reasoning_content'] or message['reasoning'] or message['thinking'] or ''"
    said = f"({said}).strip('\\n')" if style.start.endswith("\n") else f"({said})"
    yield f"{{%- set turn.reasoning = {said} if message['role'] == 'assistant' else '' -%}}"
    written = ["message['role'] == 'assistant'"]
    written += ["loop.index0 > last_user.index"] if style.history == "drop" else []
    written += ["(turn.reasoning or loop.last)" if style.empty else "turn.reasoning"]
    yield f"{{%- if {' and '.join(written)} -%}}"
    yield f"{{%- set turn.reasoning = {_quoted(style.start)} + turn.reasoning + {_quoted(style.end)} -%}}"
    if style.end.endswith("\n"):
        yield "{%- set turn.body = turn.body.lstrip('\\n') -%}"
    yield "{%- else -%}{%- set turn.reasoning = '' -%}{%- endif -%}"
    if template.prompt:
        yield f"{{%- set turn.prompt = {_quoted(template.prompt)} -%}}"
        yield "{%- if turn.reasoning == turn.prompt -%}{%- set turn.reasoning = '' -%}"
        yield "{%- else -%}{%- set turn.prompt = '' -%}{%- endif -%}"


def _body(tools: ToolFormat, masks: bool) -> Iterator[str]:
    """Appends tool calls to `turn.body`, and wraps tool results."""
    opens, closes = (_quoted(part) for part in tools.result.split("{result}"))
    wrapped = f"{opens} + turn.body + {closes}"
    if opens != "''":
        wrapped = f"turn.body if turn.body.startswith({opens}) else {wrapped}"
    name, arguments = _json("call['name']", masks), _json("call['arguments']", masks)
    values = {
        "{call}": f"'{{\"name\": ' + {name} + ', \"arguments\": ' + said + '}}'",
        "{name}": "call['name']",
        "{arguments}": "said",
    }
    pieces = re.split(r"(\{call\}|\{name\}|\{arguments\})", tools.call)
    call = " + ".join(values.get(piece) or _quoted(piece) for piece in pieces)
    yield f"{{%- if message['role'] == 'tool' -%}}{{%- set turn.body = {wrapped} -%}}{{%- endif -%}}"
    yield "{%- if message['tool_calls'] is defined and message['tool_calls'] -%}"
    yield "{%- for entry in message['tool_calls'] -%}"
    yield "{%- set call = entry['function'] if entry['function'] is defined else entry -%}"
    yield (
        f"{{%- set said = call['arguments'] if call['arguments'] is string else {arguments} -%}}"
        f"{{%- set line_break = {_quoted(tools.call_separator)} if turn.body else '' -%}}"
    )
    yield f"{{%- set turn.body = turn.body + line_break + {call} -%}}"
    yield "{%- endfor -%}"
    yield "{%- endif -%}"


def _start(template: ChatTemplate) -> Iterator[str]:
    """Writes what is before the content of a turn."""
    if template.turns:
        roles: list[str] = [r for r in get_args(Role) if r in template.turns or template.header is not None]
        start = f"{_mapping({role: template.start_of(role) for role in roles})}[message['role']]"
    else:
        before, after = (_quoted(part) for part in (template.header or "").split("{role}"))
        start = f"{before} + {_role(template)} + {after}"
    if _joins_results(template.tools):
        assert template.tools is not None
        start = f"{_quoted(template.tools.result_separator or '')} if turn.joins else {start}"
    if template.prompt:
        start = f"({start}) + turn.prompt"
    yield f"{{{{- {start} -}}}}"


def _turn(template: ChatTemplate, masks: bool) -> Iterator[str]:
    """Writes the content of a turn and its end; with `masks`, assistant turns are in a `generation` block."""
    content = "turn.reasoning + turn.body" if template.reasoning is not None else "turn.body"
    body = f"{{{{- {content} + {_quoted(template.end)} -}}}}"
    supervised = f"{{%- generation -%}}{body}{{%- endgeneration -%}}" if masks else body
    separator = f"{{{{- {_quoted(template.separator)} -}}}}" if template.separator else ""
    is_assistant = "{%- if message['role'] == 'assistant' -%}"
    if (end := _end_of_others(template)) is not None:
        yield is_assistant
        yield supervised + separator
        yield f"{{%- else -%}}{{{{- turn.body + {end} -}}}}{{%- endif -%}}"
        return
    yield from (is_assistant, supervised, f"{{%- else -%}}{body}{{%- endif -%}}") if masks else (body,)
    if separator:
        yield separator


def _end_of_others(template: ChatTemplate) -> str | None:
    """A Jinja expression for the end of turns of other roles than the assistant; None if it is the same."""
    ends = {role: "".join(template.end_of(role)) for role in ("system", "user", "tool")}
    usual = template.end + template.separator
    differs, joins = any(end != usual for end in ends.values()), _joins_results(template.tools)
    if not differs and not joins:
        return None
    end = f"{_mapping(ends)}[message['role']]" if differs else _quoted(usual)
    return f"('' if turn.continues else {end})" if joins else end


def _role(template: ChatTemplate) -> str:
    if not template.role_names:
        return "message['role']"
    names = _mapping(template.role_names)
    return f"({names}[message['role']] if message['role'] in {names} else message['role'])"

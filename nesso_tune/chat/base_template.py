"""The Jinja chat template of a base model: rendered in a sandbox and compared with the bundled templates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from nesso_tune.chat import sandbox
from nesso_tune.chat.render import prompt_segments, segments, with_system_and_tools
from nesso_tune.chat.special_tokens import (
    CHAT_KEY,
    CONFIG_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    read_tokenizer,
    token_text,
)
from nesso_tune.chat.template import ChatTemplate, DefaultSystem, load_template
from nesso_tune.conversation import Conversation, Message
from nesso_tune.errors import ModelError, RecipeError, first_line
from nesso_tune.recipes.builtin import local_path, template_names
from nesso_tune.recipes.sections import ChatSection, ModelSection

DEFAULT_TEMPLATE = "chatml"  # for base models without a chat template
TIMEOUT_S = 10.0  # for rendering a template
ADDITIONAL_TEMPLATES = "additional_chat_templates"  # folder of named templates
MAX_EXCERPT = 30  # characters shown of a difference
DATE = "2025-07-08"  # for templates that write the current date, where a bundled one writes a fixed date
DATE_FUNCTION = "strftime_now"

TOOL = {
    "type": "function",
    "function": {
        "name": "che_tempo_fa",
        "description": "Il tempo in una città",
        "parameters": {"type": "object", "properties": {"luogo": {"type": "string"}}, "required": ["luogo"]},
    },
}
QUESTION, ANSWER = Message("user", "Che tempo fa a Torino?"), Message("assistant", "C'è il sole.")
CALL = Message("assistant", "", ({"name": "che_tempo_fa", "arguments": {"luogo": "Torino"}},))
TWO_CALLS = replace(CALL, tool_calls=CALL.tool_calls * 2)
RESULT = Message("tool", '{"sole": true}')
THOUGHT = Message("assistant", "C'è il sole.", reasoning="Guardo il cielo.")
# Conversations to compare, by their name in errors. Each is rendered up to the assistant's next header, unless it ends
# with an answer.
SAMPLES = {
    "a question": Conversation((QUESTION,)),
    "several turns": Conversation((QUESTION, ANSWER, Message("user", "E domani?"))),
    "a system message": Conversation((Message("system", "Sii breve."), QUESTION, ANSWER, QUESTION)),
    "an answer": Conversation((QUESTION, ANSWER)),
}
TOOL_SAMPLES = {
    "tools": Conversation((QUESTION,), tools=(TOOL,)),
    "a call and its result": Conversation((QUESTION, CALL, RESULT), tools=(TOOL,)),
    "two results": Conversation((QUESTION, TWO_CALLS, RESULT, RESULT), tools=(TOOL,)),
    "tools and a system message": Conversation((Message("system", "Sii breve."), QUESTION), tools=(TOOL,)),
}
REASONING_SAMPLES = {
    "reasoning": Conversation((QUESTION, THOUGHT)),
    "reasoning in an earlier answer": Conversation((QUESTION, THOUGHT, QUESTION)),
}
ALL_SAMPLES = {**SAMPLES, **TOOL_SAMPLES, **REASONING_SAMPLES}


@dataclass(frozen=True)
class BaseTemplate:
    """Result of comparing the chat template of a base model with the bundled ones.

    Attributes:
        spec: name of the bundled template with the same output; None if there is none.
        difference: if there is none, the first difference from the default template.
        dated: its chat template writes the current date, the bundled one a fixed date.
    """

    spec: str | None
    difference: str = ""
    dated: bool = False


def read_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a model folder by name; empty if there are none.

    If none is named `default`, the first one is the default too.

    Raises:
        OSError, ValueError: if a file cannot be read.
    """
    found = {
        file.stem: file.read_text(encoding="utf-8") for file in sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja"))
    }
    file = folder / TEMPLATE_FILE
    found = (
        {**found, "default": file.read_text(encoding="utf-8")}
        if file.is_file()
        else found or _templates_in_json(folder)
    )
    return {"default": next(iter(found.values())), **found} if found else {}


def _templates_in_json(folder: Path) -> dict[str, str]:
    """The chat templates in the JSON files of a model folder."""
    for name in ("chat_template.json", CONFIG_FILE):
        content = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
        found = content.get("chat_template") if isinstance(content, Mapping) else None
        if isinstance(found, str):
            return {"default": found}
        if isinstance(found, Mapping):
            return {str(key): str(text) for key, text in found.items()}
        if isinstance(found, list):
            return {str(entry["name"]): str(entry["template"]) for entry in found if isinstance(entry, Mapping)}
    return {}


def render_jinja(template: str, variables: Mapping[str, Any], where: str, seconds: float = TIMEOUT_S) -> str:
    """Renders an untrusted Jinja template in a subprocess with time and memory limits.

    Raises:
        ModelError: if rendering fails or exceeds a limit.
    """
    (result,) = _render(template, json.dumps([variables], default=str), seconds)
    if "text" not in result:
        raise ModelError(where, f"its chat template {result['error']}", "see chat_template.jinja, or use another model")
    return result["text"]


@lru_cache(maxsize=8)  # a chat renders the same prompt several times
def _render(template: str, renderings: str, seconds: float, now: str | None = None) -> list[dict[str, str]]:
    variables = json.loads(renderings)
    request = json.dumps({"template": template, "renderings": variables, "seconds": seconds, "now": now})
    paths = os.pathsep.join(filter(None, sys.path))  # to import the same Jinja
    try:
        done = subprocess.run(
            [sys.executable, "-P", sandbox.__file__], input=request, capture_output=True, timeout=seconds,
            encoding="utf-8", check=True, env={**os.environ, "PYTHONPATH": paths, "PYTHONUTF8": "1"},
        )  # fmt: skip
        return list(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        error = f"did not finish within {seconds:g} s"
    except (subprocess.CalledProcessError, ValueError):
        error = "crashed its process"
    return [{"error": error}] * len(variables)


def match_base_template(
    folder: Path, bos: str | None, default_system: DefaultSystem = None, eos: str | None = None
) -> BaseTemplate | None:
    """Finds the bundled template with the same output as the chat template of a base model; None if it has none.

    Args:
        folder: model folder.
        bos: text of its BOS token.
        default_system: the recipe's default system message.
        eos: text of its EOS token, which some templates write at the end of an answer.
    """
    try:
        templates = read_templates(folder)
    except (OSError, ValueError, KeyError) as error:
        return BaseTemplate(None, f"its file cannot be read ({first_line(error)})")
    if not templates:
        return None
    theirs = _render_samples(templates, bos or "", eos or "")
    names = sorted(template_names("chat"), key=DEFAULT_TEMPLATE.__ne__)
    differences = {}
    for name in names:
        spec = load_template(name)
        found = [_difference(name, spec, theirs, system, bos or "") for system in (None, default_system)]
        if None in found:
            return BaseTemplate(name, dated=DATE_FUNCTION in templates["default"])
        differences[name] = found[0]
    return BaseTemplate(None, differences[DEFAULT_TEMPLATE] or "")


def _render_samples(templates: Mapping[str, str], bos: str, eos: str) -> dict[str, dict[str, str]]:
    """Renders each sample with the base's template: {"text"} or {"error"}.

    Samples with tools or reasoning are left out if it ignores or rejects them.
    """
    answers: dict[str, dict[str, str]] = {}
    sources = {
        **dict.fromkeys([*SAMPLES, *REASONING_SAMPLES], "default"), **dict.fromkeys(TOOL_SAMPLES, "tool_use")
    }  # fmt: skip
    sources = {sample: templates.get(name, templates["default"]) for sample, name in sources.items()}
    for source in dict.fromkeys(sources.values()):  # usually a single template, so a single subprocess
        asked = {
            sample: _template_variables(ALL_SAMPLES[sample], bos, eos)
            for sample, other in sources.items()
            if other == source
        }
        texts = _render(source, json.dumps(list(asked.values())), TIMEOUT_S, DATE)
        answers |= dict(zip(asked, texts, strict=True))
    theirs, tools, reasoning = (
        {sample: answers[sample] for sample in kind} for kind in (SAMPLES, TOOL_SAMPLES, REASONING_SAMPLES)
    )
    supports_tools = "text" in tools["tools"] and tools["tools"] != theirs["a question"]
    supports_reasoning = "text" in reasoning["reasoning"] and reasoning["reasoning"] != theirs["an answer"]
    return {**theirs, **(tools if supports_tools else {}), **(reasoning if supports_reasoning else {})}


def _template_variables(conversation: Conversation, bos: str, eos: str = "") -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        calls = [{"type": "function", "function": dict(call)} for call in message.tool_calls]
        thought = {"reasoning_content": message.reasoning} if message.reasoning else {}
        messages.append(
            {"role": message.role, "content": message.content, **({"tool_calls": calls} if calls else {}), **thought}
        )
    tools = [dict(tool) for tool in conversation.tools] or None
    generation = not _ends_with_answer(conversation)
    return {
        "messages": messages, "tools": tools, "add_generation_prompt": generation, "bos_token": bos, "eos_token": eos
    }  # fmt: skip


def _ends_with_answer(conversation: Conversation) -> bool:
    return conversation.messages[-1].role == "assistant"


def _difference(
    name: str, spec: ChatTemplate, theirs: Mapping[str, Mapping[str, str]], default_system: DefaultSystem, bos: str
) -> str | None:
    """The first difference between a bundled template and the base's template; None if there is none."""
    for sample, answer in theirs.items():
        if "text" not in answer:
            return f"with {sample} it {answer['error']}"
        conversation = ALL_SAMPLES[sample]
        if conversation.tools and spec.tools is None:
            return f"it supports tools, {name} does not"
        if sample in REASONING_SAMPLES and spec.reasoning is None:
            return f"it writes reasoning, {name} does not"
        ours = _render_spec(conversation, spec, default_system, bos)
        if ours != answer["text"]:
            at = next((i for i, (a, b) in enumerate(zip(ours, answer["text"], strict=False)) if a != b), len(ours))
            writes, instead = (repr(text[at : at + MAX_EXCERPT]) for text in (answer["text"], ours))
            return f"with {sample} it writes {writes} where {name} writes {instead}"
    return None


def _render_spec(conversation: Conversation, spec: ChatTemplate, default_system: DefaultSystem, bos: str) -> str:
    arranged = with_system_and_tools(conversation, spec, default_system)
    written = segments(arranged, spec, ()) if _ends_with_answer(conversation) else prompt_segments(arranged, spec)
    first = bos if spec.bos else ""
    return first + "".join(segment.text for segment in (written[1:] if spec.bos else written))


def choose_template(own: BaseTemplate | None, where: str) -> tuple[str, tuple[str, ...]]:
    """The template for a base model if the recipe names none, and notes about the choice.

    Raises:
        RecipeError: if the base has a chat template that matches none of the bundled ones.
    """
    if own is None or own.spec == DEFAULT_TEMPLATE:
        return DEFAULT_TEMPLATE, ()
    if own.spec is not None:
        dated = "; where that writes the current date, it writes a fixed one" if own.dated else ""
        return own.spec, (f"chat.template: {own.spec}, which is equivalent to the chat template of the base{dated}",)
    raise RecipeError(
        "chat.template",
        f"{where} has its own chat template, and {DEFAULT_TEMPLATE} would replace it: {own.difference}",
        f"to replace it, set chat.template to {', '.join(template_names('chat'))}, or to a file that describes it "
        "(see data_templates/chat/)",
    )


def local_base_template(model: ModelSection) -> BaseTemplate | None:
    """The chat template of a local base model; None if it has none, or one from nesso-tune."""
    folder = local_path(model.base)
    if not (folder / TOKENIZER_FILE).is_file():
        return None
    _, config = read_tokenizer(folder, f"model.base {model.base}", trust_remote_code=False)
    bos, eos = (token_text(config.get(key)) for key in ("bos_token", "eos_token"))
    return None if CHAT_KEY in config else match_base_template(folder, bos, eos=eos)


def check_base_template(model: ModelSection, chat: ChatSection) -> None:
    """Raises RecipeError if the default would replace the chat template of a local base without notice."""
    if not model.random_init and chat.template is None:
        choose_template(local_base_template(model), f"model.base {model.base}")

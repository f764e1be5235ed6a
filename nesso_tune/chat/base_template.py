"""Chat templates that come with a base as Jinja: rendered under limits, and compared with the specs that we know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from nesso_tune.chat import sandbox
from nesso_tune.chat.render import prompt_segments, with_system_and_tools
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
from nesso_tune.recipes.builtin import local_path, shipped
from nesso_tune.recipes.sections import ChatSection, ModelSection

DEFAULT_TEMPLATE = "chatml"  # the template of a base that brings none
TEMPLATE_S = 10.0  # in which a template is rendered
ADDITIONAL = "additional_chat_templates"  # folder of further ones, by name
SHOWN = 30  # characters of a difference

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
# What is compared, by what an error calls it; each is rendered up to the assistant's next header.
SAMPLES = {
    "a question": Conversation((QUESTION,)),
    "several turns": Conversation((QUESTION, ANSWER, Message("user", "E domani?"))),
    "a system message": Conversation((Message("system", "Sii breve."), QUESTION, ANSWER, QUESTION)),
}
TOOL_SAMPLES = {
    "tools": Conversation((QUESTION,), tools=(TOOL,)),
    "a call and its result": Conversation((QUESTION, CALL, Message("tool", '{"sole": true}')), tools=(TOOL,)),
}
ALL_SAMPLES = {**SAMPLES, **TOOL_SAMPLES}


@dataclass(frozen=True)
class BaseTemplate:
    """What a base's own chat template turned out to be.

    Attributes:
        spec: name of the spec that writes the same.
        difference: where it is none of ours: how it differs from the one that would replace it.
    """

    spec: str | None
    difference: str = ""


def read_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a model folder by name, `default` among them; empty if there are none.

    Where none is called `default`, the first one is that, too.

    Raises:
        OSError, ValueError: if a file cannot be read.
    """
    found = {file.stem: file.read_text(encoding="utf-8") for file in sorted((folder / ADDITIONAL).glob("*.jinja"))}
    file = folder / TEMPLATE_FILE
    found = {**found, "default": file.read_text(encoding="utf-8")} if file.is_file() else found or _configured(folder)
    return {"default": next(iter(found.values())), **found} if found else {}


def _configured(folder: Path) -> dict[str, str]:
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


def render_jinja(template: str, variables: Mapping[str, Any], where: str, seconds: float = TEMPLATE_S) -> str:
    """What a foreign template writes, in a process of its own with limits of time and memory.

    Raises:
        ModelError: if it fails, or exceeds a limit.
    """
    (answer,) = _render(template, json.dumps([variables], default=str), seconds)
    if "text" not in answer:
        raise ModelError(where, f"its chat template {answer['error']}", "see chat_template.jinja, or use another model")
    return answer["text"]


@lru_cache(maxsize=8)  # a dialogue asks for the same prompt several times
def _render(template: str, renderings: str, seconds: float) -> list[dict[str, str]]:
    variables = json.loads(renderings)
    request = json.dumps({"template": template, "renderings": variables, "seconds": seconds})
    paths = os.pathsep.join(filter(None, sys.path))  # wherever Jinja was found here
    try:
        done = subprocess.run(
            [sys.executable, "-P", sandbox.__file__], input=request, capture_output=True, timeout=seconds,
            encoding="utf-8", check=True, env={**os.environ, "PYTHONPATH": paths, "PYTHONUTF8": "1"},
        )  # fmt: skip
        return list(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        error = f"did not finish within {seconds:g} s"
    except (subprocess.CalledProcessError, ValueError):
        error = "ended its process"
    return [{"error": error}] * len(variables)


def match_base_template(folder: Path, bos: str | None, default_system: DefaultSystem = None) -> BaseTemplate | None:
    """What a base's chat template is; None if it has none.

    Args:
        folder: of the base.
        bos: text of the base's BOS token.
        default_system: what the recipe has written where there is no system message.
    """
    try:
        templates = read_templates(folder)
    except (OSError, ValueError, KeyError) as error:
        return BaseTemplate(None, f"its file cannot be read ({first_line(error)})")
    if not templates:
        return None
    theirs = _theirs(templates, bos or "")
    names = sorted(
        (file.stem for file in (shipped("data_templates") / "chat").glob("*.yaml")), key=DEFAULT_TEMPLATE.__ne__
    )
    differences = {}
    for name in names:
        spec = load_template(name)
        found = [_difference(name, spec, theirs, system, bos or "") for system in (None, default_system)]
        if None in found:
            return BaseTemplate(name)
        differences[name] = found[0]
    return BaseTemplate(None, differences[DEFAULT_TEMPLATE] or "")


def _theirs(templates: Mapping[str, str], bos: str) -> dict[str, dict[str, str]]:
    """What the base's template makes of each sample: {"text"}, or {"error"}. Tools only if it knows them."""
    answers: dict[str, dict[str, str]] = {}
    sources = {**dict.fromkeys(SAMPLES, "default"), **dict.fromkeys(TOOL_SAMPLES, "tool_use")}
    sources = {sample: templates.get(name, templates["default"]) for sample, name in sources.items()}
    for source in dict.fromkeys(sources.values()):  # usually one, so one process
        asked = {
            sample: _template_variables(ALL_SAMPLES[sample], bos)
            for sample, other in sources.items()
            if other == source
        }
        answers |= dict(zip(asked, _render(source, json.dumps(list(asked.values())), TEMPLATE_S), strict=True))
    theirs, tools = ({sample: answers[sample] for sample in kind} for kind in (SAMPLES, TOOL_SAMPLES))
    knows = "text" in tools["tools"] and tools["tools"] != theirs["a question"]
    return {**theirs, **tools} if knows else theirs


def _template_variables(conversation: Conversation, bos: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        calls = [{"type": "function", "function": dict(call)} for call in message.tool_calls]
        messages.append({"role": message.role, "content": message.content, **({"tool_calls": calls} if calls else {})})
    tools = [dict(tool) for tool in conversation.tools] or None
    return {"messages": messages, "tools": tools, "add_generation_prompt": True, "bos_token": bos, "eos_token": ""}


def _difference(
    name: str, spec: ChatTemplate, theirs: Mapping[str, Mapping[str, str]], default_system: DefaultSystem, bos: str
) -> str | None:
    """Where a spec first writes something else than the base's template; None if nowhere."""
    for sample, answer in theirs.items():
        if "text" not in answer:
            return f"with {sample} it {answer['error']}"
        conversation = ALL_SAMPLES[sample]
        if conversation.tools and spec.tools is None:
            return f"it knows tools, {name} does not"
        ours = _text(conversation, spec, default_system, bos)
        if ours != answer["text"]:
            at = next((i for i, (a, b) in enumerate(zip(ours, answer["text"], strict=False)) if a != b), len(ours))
            writes, instead = (repr(text[at : at + SHOWN]) for text in (answer["text"], ours))
            return f"with {sample} it writes {writes} where {name} writes {instead}"
    return None


def _text(conversation: Conversation, spec: ChatTemplate, default_system: DefaultSystem, bos: str) -> str:
    written = prompt_segments(with_system_and_tools(conversation, spec, default_system), spec)
    first = bos if spec.bos else ""
    return first + "".join(segment.text for segment in (written[1:] if spec.bos else written))


def choose_template(own: BaseTemplate | None, where: str) -> tuple[str, tuple[str, ...]]:
    """The spec that a base is trained with where the recipe names none, and what to say of that choice.

    Raises:
        RecipeError: if the base's own chat template is none that we know: it would be replaced unsaid.
    """
    if own is None or own.spec == DEFAULT_TEMPLATE:
        return DEFAULT_TEMPLATE, ()
    if own.spec is not None:
        return own.spec, (f"chat.template: {own.spec}, which is what the base's own chat template writes",)
    raise RecipeError(
        "chat.template",
        f"{where} has a chat template of its own, and {DEFAULT_TEMPLATE} would replace it: {own.difference}",
        f"set chat.template: {DEFAULT_TEMPLATE} to replace it, or a file that describes it (see data_templates/chat/)",
    )


def local_base_template(model: ModelSection) -> BaseTemplate | None:
    """What the chat template of a base is that is a folder here; None if it has none, or one that we gave it."""
    folder = local_path(model.base)
    if not (folder / TOKENIZER_FILE).is_file():
        return None
    _, config = read_tokenizer(folder, f"model.base {model.base}", trust_remote_code=False)
    return None if CHAT_KEY in config else match_base_template(folder, token_text(config.get("bos_token")))


def check_base_template(model: ModelSection, chat: ChatSection) -> None:
    """Raises RecipeError if the chat template of a base that is a folder here would be replaced unsaid."""
    if not model.random_init and chat.template is None:
        choose_template(local_base_template(model), f"model.base {model.base}")

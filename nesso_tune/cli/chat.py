"""`nesso-tune chat`: talks to a model in the terminal, or answers once."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.cli.options import file_path
from nesso_tune.conversation import Message
from nesso_tune.errors import RecipeError
from nesso_tune.recipes.paths import flag_path
from nesso_tune.terminal import print_text, visible


def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", parser=flag_path, help="A final/ folder, a run directory, or a hub id.")
    ],
    prompt: Annotated[str | None, typer.Option(help="Answer this once; the answer alone goes to stdout.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    language: Annotated[
        str | None, typer.Option(help="Language code, for a default system message by language; told if left out.")
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=file_path, help="JSON list of tools that the model may call.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 answers greedily.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the likeliest words to draw from.")] = 1.0,
) -> None:
    """Talk to a model."""
    from nesso_tune.data.tools import read_tool_file
    from nesso_tune.publish.dialogue import Dialogue, converse
    from nesso_tune.publish.talk import Sampling, load_talker

    if top_p < 1 and temperature == 0:
        raise RecipeError("--top-p", "has no effect on greedy answers", "set --temperature above 0, or remove it")
    if prompt is not None and not prompt.strip():
        raise RecipeError("--prompt", "is empty", "give it a text, or leave it out to talk")
    offered = read_tool_file(tools) if tools is not None else ()
    talker = load_talker(model)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    dialogue = Dialogue(talker, sampling, system, offered, language)
    if prompt is not None:
        prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # as an ASCII locale passes it
        print_text(dialogue.say(Message("user", prompt)) + "\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history and editing

    _note(f"{model}: /help lists the commands, an empty line ends the conversation.\n")
    with suppress(KeyboardInterrupt):
        converse(dialogue, _read, print_text, _note)


def _read(prompt: str) -> str:
    try:
        return input(visible(prompt))
    except RuntimeError:  # no input at all
        raise EOFError from None


def _note(text: str) -> None:
    print_text(text, error=True)

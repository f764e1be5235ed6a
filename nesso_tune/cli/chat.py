"""`nesso-tune chat`: talks to a model in the terminal, or answers once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nesso_tune.conversation import UNKNOWN_LANGUAGE, Message


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A final/ folder, a run directory, or a hub id.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this once; the answer alone goes to stdout.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    language: Annotated[str, typer.Option(help="Language code, for a default system message by language.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 answers greedily.")] = 0.0,
) -> None:
    """Talk to a model."""
    from nesso_tune.publish.talk import Sampling, load_talker

    talker = load_talker(model)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    opening = [Message("system", system)] if system else []
    spoken = language or UNKNOWN_LANGUAGE
    if prompt is not None:
        prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # as an ASCII locale passes it
        print(talker.answer([*opening, Message("user", prompt)], sampling, spoken))
        return
    print("An empty line ends the conversation.", file=sys.stderr)
    messages = list(opening)
    while True:
        try:
            said = input("> ")
        except (EOFError, RuntimeError):  # the end of input, or none at all
            return
        if not said.strip():
            return
        messages.append(Message("user", said))
        answer = talker.answer(messages, sampling, spoken, say=lambda text: print(text, end="", flush=True))
        print()
        messages.append(Message("assistant", answer))

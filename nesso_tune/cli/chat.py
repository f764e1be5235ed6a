"""A conversation in the terminal: turns typed and streamed, commands that begin with a slash, tool calls shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.chat.render import calls_in
from nesso_tune.cli.options import file_path
from nesso_tune.conversation import UNKNOWN_LANGUAGE, Message
from nesso_tune.data.convert import Tool
from nesso_tune.data.languages import detect_language
from nesso_tune.errors import RecipeError
from nesso_tune.generation.inference import ChatModel, Sampling
from nesso_tune.logs import print_text, visible
from nesso_tune.recipes.builtin import flag_path

Read = Callable[[str], str]  # shows a prompt, returns a line; raises EOFError at the end
Write = Callable[[str], None]  # writes a piece of text as it is
HELP = """\
/system TEXT   a system message for what follows (without TEXT: none)
/undo          takes back your last turn and its answer
/reset         starts anew
/history       what has been said
/exit          ends; so do an empty line and Ctrl-D
"""


@dataclass
class Dialogue:
    """A conversation with a model, and how it is drawn.

    Attributes:
        talker: the model.
        sampling: how answers are drawn.
        system: system message; None leaves it to the model's default.
        tools: what the model may call.
        language: code that chooses a default system message; None tells it from the first turn.
        turns: what has been said, without the system message.
    """

    talker: ChatModel
    sampling: Sampling
    system: str | None = None
    tools: tuple[Tool, ...] = ()
    language: str | None = None
    turns: list[Message] = field(default_factory=list)

    def say(self, turn: Message, write: Write | None = None) -> str:
        """The model's answer to one more turn, kept with it. What no longer fits into its context is left out."""
        self.turns.append(turn)
        try:
            answer = self.talker.generate(self._fitting(), self.sampling, self._language(), say=write, tools=self.tools)
        except BaseException:  # an interrupted answer leaves the conversation as it was
            self.turns.pop()
            raise
        self.turns.append(Message("assistant", answer))
        return answer

    def _language(self) -> str:
        first = next((turn.content for turn in self.turns if turn.role == "user"), "")
        return self.language or (detect_language(first) if first else UNKNOWN_LANGUAGE)

    def _fitting(self) -> list[Message]:
        """The system message and as many of the last turns as fit, beginning with the user's."""
        system = [Message("system", self.system)] if self.system is not None else []
        turns = list(self.turns)
        language, wanted = self._language(), self.sampling.max_new_tokens
        while len(turns) > 1 and self.talker.remaining_context([*system, *turns], language, self.tools) < wanted:
            later = [i for i, turn in enumerate(turns) if i and turn.role == "user"]
            if not later:
                break
            turns = turns[later[0] :]
        return [*system, *turns]

    def left_out(self) -> int:
        """Turns at the beginning that the model no longer reads."""
        kept = [turn for turn in self._fitting() if turn.role != "system"]
        return len(self.turns) - len(kept)


def converse(dialogue: Dialogue, read: Read, write: Write, note: Write) -> None:
    """Talks until the input ends.

    Args:
        dialogue: with whom.
        read: a line of input.
        write: the model's words.
        note: what is not said by anyone: help, calls, results that are asked for.
    """
    while True:
        try:
            said = read("> ").strip()
        except EOFError:
            return
        if not said or said in ("/exit", "/quit", "exit", "quit"):
            return
        if said.startswith("/"):
            _command(dialogue, said, note)
        else:
            _turn(dialogue, Message("user", said), read, write, note)


def _turn(dialogue: Dialogue, turn: Message, read: Read, write: Write, note: Write) -> None:
    """One turn, its answer, and the results of the tools that the answer calls."""
    try:
        answer = dialogue.say(turn, write)
    except KeyboardInterrupt:
        note("\n(stopped; your turn is taken back)\n")
        return
    write("\n")
    if left_out := dialogue.left_out():
        note(f"({left_out} turns at the beginning no longer fit into the model's context)\n")
    calls = calls_in(answer)
    for i, call in enumerate(calls):
        arguments = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in call["arguments"].items())
        note(f"  calls {call['name']}({arguments})\n")
        try:
            result = read(f"  result of {call['name']}, or empty> ").strip()
        except EOFError:
            return
        if not result:
            return
        if i + 1 < len(calls):
            dialogue.turns.append(Message("tool", result))
        else:
            _turn(dialogue, Message("tool", result), read, write, note)


def _command(dialogue: Dialogue, said: str, note: Write) -> None:
    name, _, text = said.partition(" ")
    if name == "/system":
        dialogue.system = text.strip() or None
        note("(system message set)\n" if dialogue.system else "(no system message)\n")
    elif name == "/reset":
        dialogue.turns.clear()
        note("(a new conversation)\n")
    elif name == "/undo":
        while dialogue.turns and dialogue.turns.pop().role != "user":
            pass
        note(f"({len(dialogue.turns)} turns left)\n")
    elif name == "/history":
        system = [Message("system", dialogue.system)] if dialogue.system is not None else []
        note("".join(f"{turn.role}: {turn.content}\n" for turn in [*system, *dialogue.turns]))
    else:
        note(HELP if name == "/help" else f"{name} is no command:\n{HELP}")


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
    from nesso_tune.data.convert import read_tool_file
    from nesso_tune.generation.inference import Sampling, load_chat_model

    if top_p < 1 and temperature == 0:
        raise RecipeError("--top-p", "has no effect on greedy answers", "set --temperature above 0, or remove it")
    if prompt is not None and not prompt.strip():
        raise RecipeError("--prompt", "is empty", "give it a text, or leave it out to talk")
    offered = read_tool_file(tools) if tools is not None else ()
    talker = load_chat_model(model)
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

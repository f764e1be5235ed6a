"""`nesso-tune chat`: an interactive chat with a model in the terminal, or one answer to `--prompt`."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nesso_tune.chat.render import parse_tool_calls
from nesso_tune.cli.options import file_path
from nesso_tune.conversation import UNKNOWN_LANGUAGE, Message
from nesso_tune.data.languages import detect_language
from nesso_tune.data.tools import Tool, read_tool_file
from nesso_tune.errors import RecipeError
from nesso_tune.logs import print_text, visible
from nesso_tune.recipes.builtin import flag_path

if TYPE_CHECKING:
    from nesso_tune.generation.inference import ChatModel, Sampling

Read = Callable[[str], str]  # shows a prompt and returns a line; raises EOFError at the end of the input
Write = Callable[[str], None]  # writes a piece of text without changes

COMMANDS = """\
/system TEXT   set the system message for the next turns (without TEXT: remove it)
/undo          remove the last turn and its answer
/reset         start a new conversation
/history       show the conversation
/exit          exit; Ctrl-D does the same
"""


def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", parser=flag_path, help="A final/ folder, run, checkpoint or hub id.")
    ],
    prompt: Annotated[str | None, typer.Option(help="Answer this prompt and exit; stdout has the answer only.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    language: Annotated[
        str | None,
        typer.Option(help="Language code that selects the default system message; by default detected."),
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=file_path, help="JSON list of tools that the model can call.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy decoding.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Nucleus sampling: cumulative probability.")] = 1.0,
) -> None:
    """Chat with a model."""
    from nesso_tune.generation.inference import Sampling, load_chat_model

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    if top_p < 1 and sampling.is_greedy:
        raise RecipeError("--top-p", "has no effect on greedy decoding", "set --temperature above 0, or remove it")
    if prompt is not None and not prompt.strip():
        raise RecipeError("--prompt", "is empty", "give a text, or omit the option for an interactive chat")
    available_tools = read_tool_file(tools) if tools is not None else ()
    system = None if system is None else _decoded(system)
    session = ChatSession(load_chat_model(model), sampling, system, available_tools, language)
    if prompt is not None:
        print_text(session.send(Message("user", _decoded(prompt))) + "\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - adds history and line editing to `input`

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # see `_decoded`; in a UTF-8 locale it would be strict
    _note(f"{model}: /help lists the commands, /exit or Ctrl-D ends the conversation.\n")
    with suppress(KeyboardInterrupt):
        run_session(session, _read, print_text, _note)


@dataclass
class ChatSession:
    """A conversation with a model.

    Attributes:
        model: the model with its tokenizer.
        sampling: decoding parameters.
        system: system message; None selects the default one of the model.
        tools: tools that the model can call.
        language: code that selects a default system message; None detects it from the first user turn.
        messages: the conversation so far, without the system message.
    """

    model: ChatModel
    sampling: Sampling
    system: str | None = None
    tools: tuple[Tool, ...] = ()
    language: str | None = None
    messages: list[Message] = field(default_factory=list)

    def send(self, message: Message, stream: Write | None = None) -> str:
        """Appends a message and the model's answer to it, and returns the answer.

        Args:
            message: a user turn or the result of a tool.
            stream: receives the answer piece by piece.
        """
        self.messages.append(message)
        try:
            answer = self.model.generate(
                self._in_context(), self.sampling, self._language(), on_text=stream, tools=self.tools
            )
        except BaseException:  # an interrupted answer leaves the conversation unchanged
            self.messages.pop()
            raise
        self.messages.append(self.model.read(answer))
        return answer

    @property
    def truncated_turns(self) -> int:
        """Number of messages at the start that no longer fit into the model's context."""
        return len(self.messages) - sum(message.role != "system" for message in self._in_context())

    @property
    def all_messages(self) -> list[Message]:
        """The conversation with the system message, if one is set."""
        return [*self._system_message(), *self.messages]

    def _system_message(self) -> list[Message]:
        return [Message("system", self.system)] if self.system is not None else []

    def _language(self) -> str:
        first = next((message.content for message in self.messages if message.role == "user"), "")
        return self.language or (detect_language(first) if first else UNKNOWN_LANGUAGE)

    def _in_context(self) -> list[Message]:
        """The system message and the last turns that fit into the context, starting with a user turn."""
        system, messages = self._system_message(), list(self.messages)
        language, needed = self._language(), self.sampling.max_new_tokens
        while len(messages) > 1 and self.model.remaining_context([*system, *messages], language, self.tools) < needed:
            user_turns = [i for i, message in enumerate(messages) if i and message.role == "user"]
            if not user_turns:
                break
            messages = messages[user_turns[0] :]
        return [*system, *messages]


def run_session(session: ChatSession, read: Read, write: Write, note: Write) -> None:
    """Reads user turns and commands until the input ends.

    Args:
        session: the conversation.
        read: reads a line of input.
        write: writes the model's answers.
        note: writes everything else: help, tool calls, confirmations.
    """
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return
        if line in ("/exit", "/quit", "exit", "quit"):
            return
        if not line:
            continue
        if line.startswith("/"):
            _run_command(session, line, note)
        else:
            _run_turn(session, Message("user", line), read, write, note)


def _run_turn(session: ChatSession, message: Message, read: Read, write: Write, note: Write) -> None:
    """Sends a message, writes the answer, and asks for the results of the tools that the answer calls."""
    try:
        session.send(message, write)
    except KeyboardInterrupt:
        note("\n(interrupted; your turn was removed)\n")
        return
    write("\n")
    if truncated := session.truncated_turns:
        note(f"({truncated} turns at the start no longer fit into the model's context)\n")
    answer = session.messages[-1]
    calls = [*answer.tool_calls, *parse_tool_calls(answer.content)]
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
            session.messages.append(Message("tool", result))
        else:
            _run_turn(session, Message("tool", result), read, write, note)


def _run_command(session: ChatSession, line: str, note: Write) -> None:
    name, _, text = line.partition(" ")
    if name == "/system":
        session.system = text.strip() or None
        note("(system message set)\n" if session.system else "(system message removed)\n")
    elif name == "/reset":
        session.messages.clear()
        note("(new conversation)\n")
    elif name == "/undo":
        while session.messages and session.messages.pop().role != "user":
            pass
        note(f"({len(session.messages)} turns left)\n")
    elif name == "/history":
        note("".join(f"{message.role}: {_shown(message)}\n" for message in session.all_messages))
    else:
        note(COMMANDS if name == "/help" else f"unknown command {name}:\n{COMMANDS}")


def _shown(message: Message) -> str:
    """The parts of a message as lines of text: reasoning, content and calls."""
    calls = [json.dumps(call, ensure_ascii=False) for call in message.tool_calls]
    return "\n".join([*([f"({message.reasoning})"] if message.reasoning else []), message.content, *calls])


def _read(prompt: str) -> str:
    try:
        return _decoded(input(visible(prompt)))
    except RuntimeError:  # stdin is closed
        raise EOFError from None


def _decoded(text: str) -> str:
    """A text of the command line or of stdin, whose bytes are UTF-8 also under an ASCII locale; U+FFFD for those that
    are not.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _note(text: str) -> None:
    print_text(text, error=True)

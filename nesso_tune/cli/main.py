"""The command line: one file a verb, errors in one form, exit codes by kind.

Verbs import what they need when they run, so that `--help` and `check` stay instant; nothing else in the package
imports inside functions.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer

from nesso_tune.cli.chat import chat
from nesso_tune.cli.check import check, schema
from nesso_tune.cli.data import prepare, preview
from nesso_tune.cli.doctor import doctor
from nesso_tune.cli.init import init
from nesso_tune.cli.launch import launch
from nesso_tune.cli.train import train
from nesso_tune.errors import NessoError, RunEnvironmentError, of_os
from nesso_tune.launch.slurm import EXIT_FILE
from nesso_tune.logs import print_lines, print_notes, print_text
from nesso_tune.recipes.secrets import masked

USAGE: Any = typer.BadParameter.__base__  # what a command line that cannot be understood raises
app = typer.Typer(
    name="nesso-tune",
    help="From a base model to a bilingual assistant: SFT, then DPO, from one recipe and one command.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (init, check, prepare, preview, train, launch, chat, schema, doctor):
    app.command()(verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_lines(f"nesso-tune {version('nesso-tune')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_print_version, help="Show the version."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error (works after the verb too)."),
) -> None:
    """Read before the verb; `main` has already taken `--debug` out of the arguments."""


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line and exits with its code."""
    try:
        _main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
        _note(code)
        if os.environ.get("WORLD_SIZE", "") not in ("", "0"):  # a launcher's, even if it is the only one
            _leave(code)
        raise


def _one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def _leave(code: int) -> None:
    """Ends a launcher's process without taking libraries apart.

    A thread of gloo's that is still there when its objects go aborts the process ("terminate called without an
    active exception"), and the launcher then calls a finished run failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _note(code: int) -> None:
    """Leaves the exit code where `launch` looks for it: launchers of several processes turn every one into 1."""
    if code and os.environ.get("RANK", "0") == "0" and (file := os.environ.get(EXIT_FILE)):
        Path(file).write_text(str(code), encoding="utf-8")


def _main(arguments: list[str] | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    if _one_of_several():  # a lost process is said by us, once and in a line
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except USAGE as error:
        said = io.StringIO()
        error.show(said)
        print_text(said.getvalue(), error=True)
        sys.exit(error.exit_code)
    except typer.Abort:
        print_notes("Aborted!")
        sys.exit(1)
    except NessoError as error:
        _end(error, debug)
    except OSError as error:
        _end(of_os(error), debug)
    except MemoryError:
        _end(RunEnvironmentError("memory", "not enough", "lower train.micro_batch_size or data.sequence_len"), debug)
    except Exception as error:  # a fault of ours: short by default, whole with --debug
        if debug:
            print_text(traceback.format_exc(), error=True)
        else:
            print_notes(f"nesso-tune: internal error: {type(error).__name__}: {error}; "
                        "run again with --debug and report the traceback")  # fmt: skip
        sys.exit(1)


def _end(error: NessoError, debug: bool) -> None:
    if debug:
        print_text(traceback.format_exc(), error=True)
    speaks = error.speaks
    if speaks is None:  # one message, not one a process; of what befalls a machine, one a machine
        own = os.environ.get("LOCAL_RANK" if isinstance(error, RunEnvironmentError) else "RANK", "0")
        speaks = own == "0" or not own.isdecimal()
    if speaks:
        print_notes(*(masked(str(problem)) for problem in error.problems))
    sys.exit(error.exit_code)

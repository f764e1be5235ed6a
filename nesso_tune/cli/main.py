"""The command line: loads one module per verb, prints errors in one form, and exits with a code per kind of error.

A verb's module is imported when the verb runs, so `--help` stays fast. Only the modules of `cli/` import inside
functions.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from nesso_tune.errors import (
    NessoError,
    Preempted,
    RunEnvironmentError,
    from_os_error,
    from_out_of_memory,
    is_out_of_memory,
)
from nesso_tune.launch.command import EXIT_FILE
from nesso_tune.logs import messages_on_stderr, print_error, print_lines, print_text, print_to_stderr, set_output

EXIT_TIMEOUT_S = 30.0  # for the exit handlers of libraries after an error
RANK0_PRINTS_S = 10.0  # for rank 0 to print an error that all ranks have

USAGE_ERROR: Any = typer.BadParameter.__base__  # click's UsageError, which typer bundles
SETTINGS: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}

# Verb: the module that defines it, and the first sentence of its docstring. The order is that of `--help`.
VERBS = {
    "init": ("init", "Write a first recipe for your base and your data, or list the bundled ones."),
    "check": ("check", "Validate recipes and show their plans."),
    "prepare": ("data", "Download, read, encode and cache the data on the CPU, and report on it."),
    "preview": ("data", "Show rows as the model receives them."),
    "train": ("train", "Train."),
    "sweep": (
        "sweep",
        "Train a recipe once for each combination of values, one run after another, and compare the runs on one page.",
    ),
    "launch": ("launch", "Start a run on several GPUs: on this machine, or through Slurm on many."),
    "status": ("report", "List the runs below a folder: state, step, loss, speed, time left and age of the last line."),
    "report": (
        "report",
        "Write the report of a run, a page that compares several runs, or a page that lists the runs of a folder.",
    ),
    "chat": ("chat", "Chat with a model."),
    "eval": ("eval", "Evaluate models on a suite of tasks, and compare them with a parent."),
    "generate": ("generate", "Write several answers of a model to each prompt, and preference pairs of them."),
    "card": ("export", "Write the model card of a finished run again, after its recipe's card section was completed."),
    "export": ("export", "Export a finished run to another format, and check its answers there."),
    "cache": ("cache", "List the results in the cache with the runs that use them, or remove those that no run needs."),
    "schema": ("check", "Print the JSON Schema of recipes, for editors."),
    "doctor": ("check", "Check versions, driver, GPUs, disk, cache and ports."),
}


class LazyGroup(TyperGroup):
    """Lists the verbs from `VERBS`, and imports the module of the one that is used."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=summary) for name, (_, summary) in VERBS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The verb's own command, with its options, instead of the entry in the list."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name else None, rest


def _load(verb: str) -> Any:
    """The command of a verb."""
    collecting = gc.isenabled()
    gc.disable()  # imports create many objects and little garbage: collections would take a tenth of the start-up time
    try:
        function = getattr(import_module(f"nesso_tune.cli.{VERBS[verb][0]}"), verb)
        gc.freeze()  # modules stay until the exit: no collection needs to look at them
    finally:
        if collecting:
            gc.enable()
    single = typer.Typer(**SETTINGS)
    single.command(verb)(function)
    return typer.main.get_command(single)


app = typer.Typer(
    name="nesso-tune",
    help="From a base model to a bilingual assistant: SFT, then DPO, from one recipe and one command.",
    cls=LazyGroup,
    no_args_is_help=True,
    **SETTINGS,
)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        print_lines(f"nesso-tune {version('nesso-tune')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_print_version, help="Show the version."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error (also accepted after the verb)."),
    quiet: bool = typer.Option(False, "--quiet", help="Show warnings and errors only (also accepted after the verb)."),
    json_logs: bool = typer.Option(False, "--json-logs", help="Print each message as JSON (also after the verb)."),
) -> None:
    """Options before the verb. `main` removes these flags from the arguments before this runs."""


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line and exits with its code."""
    try:
        with messages_on_stderr():
            _run(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
        _record_exit_code(code)
        if os.environ.get("WORLD_SIZE", "") not in ("", "0"):  # started by a launcher, even with a single process
            _exit_without_teardown(code)
        raise


def _run(arguments: list[str] | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for a terminal that cannot show a character
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):  # we report a lost process ourselves, in one line
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    set_output(as_json="--json-logs" in arguments, quiet="--quiet" in arguments)
    arguments = [argument for argument in arguments if argument not in ("--debug", "--json-logs", "--quiet")]
    try:
        code = app(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except USAGE_ERROR as error:
        message = io.StringIO()
        error.show(message)
        print_text(message.getvalue(), error=True)
        sys.exit(error.exit_code)
    except typer.Abort:
        print_to_stderr("Aborted!")
        sys.exit(1)
    except NessoError as error:
        _exit_with(error, debug)
    except OSError as error:
        _exit_with(from_os_error(error), debug)
    except MemoryError:
        remedy = "lower train.micro_batch_size or data.sequence_len"
        _exit_with(RunEnvironmentError("memory", "not enough", remedy), debug)
    except Exception as error:
        if is_out_of_memory(error):
            _exit_with(from_out_of_memory(error), debug)
        # a bug of nesso-tune
        if debug:
            print_text(traceback.format_exc(), error=True)
        else:
            print_error(f"nesso-tune: internal error: {type(error).__name__}: {error}; "
                        "run again with --debug and report the traceback")  # fmt: skip
        sys.exit(1)


def _exit_with(error: NessoError, debug: bool) -> None:
    """Prints an error and exits with its code."""
    if debug:
        print_text(traceback.format_exc(), error=True)
    _print_error(error)
    sys.exit(error.exit_code)


def end_process(error: NessoError) -> None:
    """Prints an error and ends the process from any thread, whatever the main thread does."""
    _record_exit_code(error.exit_code)
    _print_error(error)
    _flush()
    os._exit(error.exit_code)


def _print_error(error: NessoError) -> None:
    """Prints an error once per run, or once per machine if it concerns the machine.

    Before the ranks are connected, another rank waits for the one that prints: when a rank ends, the launcher kills the
    others. A rank that is not killed has an error of its own, and prints it.
    """
    prints_message = error.prints_message
    if prints_message is None:
        rank = os.environ.get("LOCAL_RANK" if isinstance(error, RunEnvironmentError) else "RANK", "0")
        prints_message = rank == "0" or not rank.isdecimal()
        if not prints_message and not error.on_all_ranks and not isinstance(error, Preempted):
            time.sleep(RANK0_PRINTS_S)
            prints_message = True
    if prints_message:
        from nesso_tune.recipes.secrets import masked

        print_error(*(masked(str(problem)) for problem in error.problems))


def _record_exit_code(code: int) -> None:
    """Writes the exit code to the file that the Slurm job reads: srun returns the largest code of its tasks.

    The first rank that ends with an error decides: the others are then ended by SIGTERM, or lose contact with it.
    """
    if code and code != 128 + signal.SIGTERM and (file := os.environ.get(EXIT_FILE)):
        with suppress(FileExistsError), open(file, "x", encoding="utf-8") as stream:
            stream.write(str(code))


def _exit_without_teardown(code: int) -> None:
    """Ends a process of a launcher without running destructors.

    If a gloo thread is still running when its objects are destroyed, the process aborts ("terminate called without an
    active exception"), and the launcher reports a finished run as failed.
    """
    if code:  # a library must not wait for ranks that do not come: the others wait for this process to end
        deadline = threading.Timer(EXIT_TIMEOUT_S, os._exit, (code,))
        deadline.daemon = True
        deadline.start()
    atexit._run_exitfuncs()
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()

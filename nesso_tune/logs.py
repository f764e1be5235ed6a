"""Messages and terminal output, with control characters escaped. All output of the package goes through this module.

Messages are records of `logger`, which is `logging.getLogger("nesso_tune")`. The command line prints them on stderr;
in a program that uses the library they follow its logging configuration (by default, warnings are shown). What a verb
is asked to show is printed with `print_lines` and `print_text`.

File names, column names, roles, recipe values and model answers are untrusted: they can contain escape sequences that
clear the screen or set its title, bidirectional controls, and line breaks that imitate a line of our output. All are
written as JSON escapes, so JSON output stays valid and equal.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

# Control characters (C0, DEL, C1), bidirectional controls, invisible characters, line separators, lone surrogates and
# tag characters. The joiners U+200C and U+200D are safe; emoji and several scripts need them.
UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")  # our own colour sequences
STAMP_VARIABLE = "NESSO_TUNE_LOG_STAMP"  # if set, messages begin with time, host and rank
warnings.filterwarnings("ignore", "IProgress not found")  # of tqdm in a notebook; our progress needs no ipywidgets
EVERY_RANK = {"every_rank": True}  # `extra` of a message that any process may log; of others, only rank 0's are kept


class _SafeRecords(logging.Filter):
    """Drops messages of ranks other than 0, and escapes the others, for every handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        if os.environ.get("RANK", "0") != "0" and not getattr(record, "every_rank", False):
            return False
        record.msg, record.args = visible(record.getMessage()), ()
        return True


class TerminalHandler(logging.Handler):
    """Prints messages on stderr: as text, or each as a JSON object.

    Attributes:
        prefix: comes before each message, e.g. the name of a recipe.
        json: print JSON objects.
    """

    prefix = ""
    json = False

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one message. Lines of figures, see `with_figures`, begin with the time."""
        try:
            figures = getattr(record, "figures", None)
            if self.json:
                print_to_stderr(_as_json(record.getMessage(), record.levelname, record.created, self.prefix, figures))
            else:
                stamped = figures is None or os.environ.get(STAMP_VARIABLE)  # the stamp has the time
                clock = "" if stamped else time.strftime("%H:%M:%S ", time.localtime(record.created))
                print_to_stderr(f"{clock}{self.prefix}{record.getMessage()}")
        except Exception:
            self.handleError(record)  # as logging's own handlers: a closed stderr does not stop a run


def _as_json(
    message: str, level: str, created: float, prefix: str = "", figures: Mapping[str, Any] | None = None
) -> str:
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(created))
    line = {"time": when, "level": level.lower(), "message": message}
    return json.dumps(line | ({"recipe": prefix.removesuffix(": ")} if prefix else {}) | dict(figures or {}))


def with_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` of a message that shows figures of a step: `--json-logs` prints them as keys."""
    return {"figures": {key: value if _is_json(value) else str(value) for key, value in figures.items()}}


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, (str, int)) or (isinstance(value, float) and abs(value) < float("inf"))


def _make_logger() -> logging.Logger:
    made = logging.getLogger("nesso_tune")
    made.addFilter(_SafeRecords())
    return made


logger = _make_logger()
_terminal = TerminalHandler()


def set_output(*, as_json: bool, quiet: bool) -> None:
    """How the command line prints messages: as JSON objects; `quiet` prints warnings and errors only."""
    _terminal.json = as_json
    _terminal.setLevel(logging.WARNING if quiet else logging.NOTSET)


def output_flags() -> list[str]:
    """The flags of `set_output` that are set, for a command that starts this one in other processes."""
    quiet = _terminal.level == logging.WARNING
    return [*(["--json-logs"] if _terminal.json else []), *(["--quiet"] if quiet else [])]


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Prints messages of all levels from INFO on stderr, and nowhere else. For the command line."""
    level, propagate = logger.level, logger.propagate
    logger.addHandler(_terminal)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library may have given the root logger a handler, which would print them again
    try:
        yield
    finally:
        logger.removeHandler(_terminal)
        logger.setLevel(level)
        logger.propagate = propagate


@contextmanager
def message_prefix(name: str) -> Iterator[None]:
    """Prints `name: ` before each message."""
    before, _terminal.prefix = _terminal.prefix, f"{name}: "
    try:
        yield
    finally:
        _terminal.prefix = before


def visible(text: str, keep: str = "") -> str:
    """The text with unsafe and invisible characters as escapes, except those in `keep`."""
    return UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines, each column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def print_lines(*lines: str) -> None:
    """Writes lines to stdout; line breaks within a line are escaped."""
    _write("".join(f"{visible(line)}\n" for line in lines), sys.stdout)


def print_to_stderr(*lines: str) -> None:
    """Writes messages to stderr, one a line; line breaks within a line are escaped."""
    stamp = _stamp() if os.environ.get(STAMP_VARIABLE) and not _terminal.json else ""
    _write("".join(f"{stamp}{visible(line)}\n" for line in lines), sys.stderr)


def _stamp() -> str:
    """Time in UTC, host, and the rank if this process has one."""
    rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {visible(socket.gethostname())}{rank}: "


def print_error(*lines: str) -> None:
    """Writes the lines of an error to stderr, in JSON if messages are."""
    if _terminal.json:
        lines = tuple(_as_json(line, "error", time.time(), _terminal.prefix) for line in map(visible, lines))
    print_to_stderr(*lines)


def print_text(text: str, *, error: bool = False, keep: str = "\n\t", coloured: bool = False) -> None:
    """Writes a text as it is, with its line breaks, and with colour sequences if `coloured`."""
    parts = COLOUR.split(text) if coloured else [text]
    shown = "".join(part if i % 2 else visible(part, keep) for i, part in enumerate(parts))
    _write(shown, sys.stderr if error else sys.stdout)


def _write(text: str, stream: TextIO) -> None:
    stream.write(text)
    stream.flush()

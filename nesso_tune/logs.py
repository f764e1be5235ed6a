"""Messages and terminal output, with control characters escaped. All output of the package goes through this module.

Messages are records of `logger`, which is `logging.getLogger("nesso_tune")`. The command line prints them on stderr;
in a program that uses the library they follow its logging configuration (by default, warnings are shown). What a verb
is asked to show is printed with `print_lines` and `print_text`.

File names, column names, roles, recipe values and model answers are untrusted: they can contain escape sequences that
clear the screen or set its title, bidirectional controls, and line breaks that imitate a line of our output. All are
written as JSON escapes, so JSON output stays valid and equal.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# Control characters (C0, DEL, C1), bidirectional controls, invisible characters, line separators, lone surrogates and
# tag characters. The joiners U+200C and U+200D are safe; emoji and several scripts need them.
UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")  # our own colour sequences
EVERY_RANK = {"every_rank": True}  # `extra` of a message that any process may log; of others, only rank 0's are kept


class _SafeRecords(logging.Filter):
    """Drops messages of ranks other than 0, and escapes the others, for every handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        if os.environ.get("RANK", "0") != "0" and not getattr(record, "every_rank", False):
            return False
        record.msg, record.args = visible(record.getMessage()), ()
        return True


class TerminalHandler(logging.Handler):
    """Prints messages on stderr. `prefix` comes before each of them, e.g. the name of a recipe."""

    prefix = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one message."""
        try:
            print_to_stderr(f"{self.prefix}{record.getMessage()}")
        except Exception:
            self.handleError(record)  # as logging's own handlers: a closed stderr does not stop a run


def _make_logger() -> logging.Logger:
    made = logging.getLogger("nesso_tune")
    made.addFilter(_SafeRecords())
    return made


logger = _make_logger()
_terminal = TerminalHandler()


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


def print_lines(*lines: str) -> None:
    """Writes lines to stdout; line breaks within a line are escaped."""
    _write("".join(f"{visible(line)}\n" for line in lines), sys.stdout)


def print_to_stderr(*lines: str) -> None:
    """Writes lines to stderr; line breaks within a line are escaped."""
    _write("".join(f"{visible(line)}\n" for line in lines), sys.stderr)


def print_text(text: str, *, error: bool = False, keep: str = "\n\t", coloured: bool = False) -> None:
    """Writes a text as it is, with its line breaks, and with colour sequences if `coloured`."""
    parts = COLOUR.split(text) if coloured else [text]
    shown = "".join(part if i % 2 else visible(part, keep) for i, part in enumerate(parts))
    _write(shown, sys.stderr if error else sys.stdout)


def _write(text: str, stream: TextIO) -> None:
    stream.write(text)
    stream.flush()

"""What is printed: the one place that writes to the terminal, so that nothing in a text can drive it.

Names of files and columns, roles, values of a recipe and the answers of a model may hold anything: escape sequences
that clear the screen or set its title, characters that turn the direction of writing, line breaks that feign a line of
ours. All are written as escapes. These are those of JSON, so that JSON stays the JSON it was.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

# Control characters (C0, DEL, C1), marks of direction, what is invisible or breaks lines, halves of a pair, and tags.
# The two joiners, which emoji and several scripts are written with, are no danger.
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")  # what our own colours are written with


def visible(text: str, keep: str = "") -> str:
    """A text in which what cannot be seen, or would drive a terminal, is written as an escape; `keep` stays."""
    return UNSEEN.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))


def print_lines(*lines: str) -> None:
    """Writes lines to stdout; a line break in one of them is made visible."""
    _write("".join(f"{visible(line)}\n" for line in lines), sys.stdout)


def print_notes(*lines: str) -> None:
    """The same, to stderr."""
    _write("".join(f"{visible(line)}\n" for line in lines), sys.stderr)


def print_text(text: str, *, error: bool = False, keep: str = "\n\t", coloured: bool = False) -> None:
    """Writes a text with its own line breaks, and with our own colours if it is `coloured`; nothing is added."""
    parts = COLOUR.split(text) if coloured else [text]
    shown = "".join(part if i % 2 else visible(part, keep) for i, part in enumerate(parts))
    _write(shown, sys.stderr if error else sys.stdout)


def _write(text: str, stream: TextIO) -> None:
    stream.write(text)
    stream.flush()

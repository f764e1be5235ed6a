"""Terminal output with control characters escaped. All output of the package goes through this module.

File names, column names, roles, recipe values and model answers are untrusted: they can contain escape sequences that
clear the screen or set its title, bidirectional controls, and line breaks that imitate a line of our output. All are
written as JSON escapes, so JSON output stays valid and equal.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

# Control characters (C0, DEL, C1), bidirectional controls, invisible characters, line separators, lone surrogates and
# tag characters. The joiners U+200C and U+200D are safe; emoji and several scripts need them.
UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")  # our own colour sequences


def visible(text: str, keep: str = "") -> str:
    """The text with unsafe and invisible characters as escapes, except those in `keep`."""
    return UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))


def print_lines(*lines: str) -> None:
    """Writes lines to stdout; line breaks within a line are escaped."""
    _write("".join(f"{visible(line)}\n" for line in lines), sys.stdout)


def print_notes(*lines: str) -> None:
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

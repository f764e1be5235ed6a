"""JSON text in blocks: lines, arrays, objects one after another, and objects that wrap lists of rows.

Only lines are cut at line breaks. Everything else is read through a window of the text that holds one value at a time,
so memory does not grow with the file.
"""

from __future__ import annotations

import json
from codecs import getincrementaldecoder
from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal, Protocol

from nesso_tune.data.blocks import (
    BLOCK_BYTES,
    Block,
    JsonArrayBlock,
    JsonLinesBlock,
    is_text_column,
    json_decoder,
    json_error,
    not_utf8,
)
from nesso_tune.data.files import no_split, split_name
from nesso_tune.data.remedies import python
from nesso_tune.errors import DataError, shortened

JsonKind = Literal["lines", "array", "objects", "wrapped"]

MAX_ROW_BYTES = 1 << 28  # longer rows are an error: compressed files can expand to any size
_CLASSIFY_BYTES = 1 << 21  # of the first object; a longer one is a row if it begins with messages, else wraps rows
_BLANK = " \t\r\n"
_SPEAKER_KEYS = ("role", "from", "speaker", "sender")  # of a message
_MESSAGE_LISTS = ("messages", "conversation", "conversations", "dialogue", "dialog", "turns", "chat")


class ByteStream(Protocol):
    """A stream of UTF-8 text, decompressed. `position` is how many bytes of the file were read."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; empty at the end."""

    def readline(self, size: int, /) -> bytes:
        """The rest of the line, up to `size` bytes."""

    def position(self) -> int:
        """Bytes of the file that were read, compressed ones if it is compressed."""


def line_blocks(stream: ByteStream, name: str) -> Iterator[Block]:
    """The blocks of JSON lines. Raises DataError for a line longer than `MAX_ROW_BYTES`."""
    first, done = 1, 0
    while data := stream.read(BLOCK_BYTES):
        if not data.endswith(b"\n"):
            rest = stream.readline(MAX_ROW_BYTES)  # a block ends at a line break
            if len(rest) == MAX_ROW_BYTES:
                raise _too_long(name, first + data.count(b"\n"))
            data += rest
        read = stream.position()
        yield JsonLinesBlock(f"{name}:", first, data, read - done)
        first, done = first + data.count(b"\n"), read


def array_blocks(stream: ByteStream, name: str) -> Iterator[Block]:
    """The blocks of one JSON array. Raises DataError if it is damaged, or more text follows it."""
    window = _Window(stream, name)
    window.expect("[")
    yield from _blocks(_items(window), window)
    if (char := window.next_char()) != "":
        remedy = 'if every line is a list of messages, write {"messages": [...]} on each'
        raise window.error("Extra data", remedy if char == "[" else "correct the file")


def object_blocks(stream: ByteStream, name: str) -> Iterator[Block]:
    """The blocks of JSON objects one after another, each on several lines. Raises DataError if one is damaged."""
    window = _Window(stream, name)

    def objects() -> Iterator[str]:
        while window.next_char():
            yield window.value()[1]

    return _blocks(objects(), window)


def wrapped_blocks(stream: ByteStream, name: str, split: str) -> Iterator[Block]:
    """The blocks of the list of rows in one JSON object: `{"data": [...]}`, or `{"train": [...], "test": [...]}`.

    `split` chooses where the keys name splits.

    Raises:
        DataError: if it is damaged, or has several lists of rows that are not splits, or not this split.
    """
    window, read, seen = _Window(stream, name), "", list[str]()
    for key in _row_lists(window):
        items = _items(window)
        seen.append(key)
        if split_name(key) is not None and split not in ("all", key, split_name(key)):
            for _ in items:
                pass  # another split
            continue
        if read and None in (split_name(key), split_name(read)):
            raise DataError(name, f"has several lists of rows: {', '.join(map(shortened, seen))}", _extract(name, key))
        yield from _blocks(items, window)
        read = key
    if not read:
        raise no_split(name, split, seen)


def split_names(stream: ByteStream, name: str) -> list[str]:
    """The splits in one JSON object with a list of rows for each. Reads all of it."""
    window, found = _Window(stream, name), list[str]()
    for key in _row_lists(window):
        found.append(key)
        for _ in _items(window):
            pass
    return [key for key in found if split_name(key) is not None]


def classify(stream: ByteStream, name: str, named_lines: bool = False) -> JsonKind:
    """What JSON text is, from its first value.

    One object that is all of the file wraps rows if it has a list of objects that are not messages.

    Args:
        stream: the text.
        name: of the file, for errors.
        named_lines: the name says that each line is a row, so that one line wraps no rows.

    Raises:
        DataError: if it is one object with a list for each column, or with rows inside another object.
    """
    window = _Window(stream, name, limit=_CLASSIFY_BYTES)
    if window.next_char() == "[":
        return "array"
    line = window.line
    try:
        first, _ = window.value()
    except _Incomplete:
        return _classify_long(window)
    except DataError:
        return "lines" if window.has_whole_line else "objects"
    if not isinstance(first, dict):
        return "lines"
    one_line = window.line == line
    if window.next_char():  # more objects
        return "lines" if one_line else "objects"
    if not (one_line and named_lines):
        _check_not_columns(first, name)
        _check_not_inside(first, name)
        if _wraps_rows(first):
            return "wrapped"
    return "lines" if one_line else "objects"


def _classify_long(window: _Window) -> JsonKind:
    """The kind of a text that begins with an object of several megabytes: rows in a list, or one long row."""
    window.restart()
    key = None
    try:
        for key in _row_lists(window):
            return "objects" if _is_message(window.value()[0], key) else "wrapped"
    except _Incomplete:  # in its first item, or before any list
        pass
    return "objects" if key is None or key.lower() in _MESSAGE_LISTS else "wrapped"


def _wraps_rows(value: dict[str, Any]) -> bool:
    """Whether an object has a list of rows, not of messages, and no text that makes it a row itself."""
    if any(_is_messages(item, key) for key, item in value.items()) or any(is_text_column(key) for key in value):
        return False
    return any(map(_is_rows, value.values()))


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_messages(value: Any, key: str) -> bool:
    return _is_rows(value) and all(_is_message(item, key) for item in value)


def _is_message(value: Any, key: str) -> bool:
    """Whether a value looks like a message: an object that names its speaker, or is in a list called messages."""
    if not isinstance(value, dict):
        return False
    named = any(isinstance(value.get(name), str) for name in _SPEAKER_KEYS)
    return named or (key.lower() in _MESSAGE_LISTS and not any(map(_is_rows, value.values())))


def _check_not_columns(value: dict[str, Any], name: str) -> None:
    """Raises DataError for an object that holds a table by column, or rows by their names, as pandas writes them."""
    items = list(value.values())
    keys = [list(item) if isinstance(item, dict) else None for item in items]
    orient = None
    if keys and keys[0] and all(key == keys[0] for key in keys):
        orient = "columns" if keys[0][:2] in (["0"], ["0", "1"]) else "index" if len(keys) > 2 else None
    lists = [item for item in items if isinstance(item, list) and len(item) > 1]
    if len(items) == len(lists) > 1 and len(set(map(len, lists))) == 1:
        scalars = not any(isinstance(item[0], (list, dict)) for item in lists)
        orient = "columns" if scalars and any(isinstance(item[0], str) for item in lists) else orient
    if value.keys() == {"columns", "index", "data"}:
        orient = "split"
    if orient is not None:
        read = f"pandas.read_json({name!r}, orient='{orient}')"
        command = python(f"import pandas; {read}.to_json({f'{name}l'!r}, orient='records', lines=True)")
        what = "has rows by their names, not in a list" if orient == "index" else "is a table by column, not by row"
        raise DataError(name, what, f"write it by row, e.g. {command}")


def _check_not_inside(value: dict[str, Any], name: str) -> None:
    """Raises DataError for an object whose list of rows is empty, or inside another object."""
    if list(value.values()) == [[]]:
        raise DataError(name, "contains no rows", "give a file with rows, or remove the source")
    if any(map(is_text_column, value)) or any(map(_is_rows, value.values())):
        return
    for key, inner in value.items():
        if isinstance(inner, dict) and _wraps_rows(inner):
            rows = next(name for name, item in inner.items() if _is_rows(item))
            what = f"has its rows inside `{shortened(key)}`, in `{shortened(rows)}`"
            raise DataError(name, what, _extract(name, key, rows))


def _extract(name: str, *keys: str) -> str:
    """A command that writes one list inside a JSON object as JSON lines."""
    path = "".join(f"[{key!r}]" for key in keys)
    command = python(f"import json; print(*map(json.dumps, json.load(open({name!r})){path}), sep=chr(10))")
    return f"write the one to train on as JSON lines, e.g. {command} > rows.jsonl"


def _row_lists(window: _Window) -> Iterator[str]:
    """The keys of an object whose value is a list of objects; its items must be read before the next key."""
    window.expect("{")
    while (char := window.next_char()) != "}":
        key, _ = window.value()
        if char != '"':
            raise window.error("Expecting property name enclosed in double quotes")
        window.expect(":")
        if window.next_char() == "[" and window.second_char() == "{":
            window.expect("[")
            yield key
        else:
            window.value()
        if window.next_char() != "}":
            window.expect(",")
    window.expect("}")
    if window.next_char():
        raise window.error("Extra data")


def _items(window: _Window) -> Iterator[str]:
    """The text of each item of an array whose opening bracket was read, and its closing bracket."""
    if window.next_char() != "]":
        yield window.value()[1]
        while window.next_char() != "]":
            window.expect(",")
            yield window.value()[1]
    window.expect("]")


def _blocks(items: Iterator[str], window: _Window) -> Iterator[Block]:
    texts: list[str] = []
    length, first = 0, window.rows + 1
    for text in chain(items, [""]):
        if text:
            texts.append(text)
            length += len(text)
            window.rows += 1
        if texts and (length >= BLOCK_BYTES or not text):
            data = ",".join(texts).encode()
            yield JsonArrayBlock(f"{window.name} row ", first, data, len(texts), window.advance())
            texts, length, first = [], 0, window.rows + 1


class _Incomplete(Exception):
    """The value continues after the bytes that may be read."""


class _Window:
    """A window of JSON text that moves over a stream.

    Attributes:
        name: name of the file.
        rows: rows that were read, over all lists.
    """

    def __init__(self, stream: ByteStream, name: str, limit: int | None = None) -> None:
        self.name, self.rows = name, 0
        self._stream, self._limit, self._read, self._covered = stream, limit, 0, 0
        self._decode = getincrementaldecoder("utf-8")().decode
        self._text, self._at, self._line = "", 0, 1
        self._ended = False

    @property
    def line(self) -> int:
        """Number of the current line, from 1."""
        return self._line + self._text.count("\n", 0, self._at)

    @property
    def has_whole_line(self) -> bool:
        """Whether the first line of the window ends in it, or with the file, and is a whole JSON value or no JSON."""
        head = self._text[self._at :].partition("\n")[0]
        return not head.rstrip().endswith(("{", "[", ","))

    def restart(self) -> None:
        """Goes back to the first byte that was read. Only for a window whose text was not dropped."""
        self._at, self._limit = 0, None if self._ended else self._read

    def next_char(self) -> str:
        """The next character that is not blank, which is not consumed; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def second_char(self) -> str:
        """The character after the next one, blanks left out."""
        while True:
            if rest := self._text[self._at + 1 : self._at + 4096].lstrip(_BLANK):
                return rest[0]
            if not self._fill():
                return ""

    def expect(self, char: str) -> None:
        """Consumes the next character. Raises DataError if it is another one."""
        if self.next_char() != char:
            raise self.error(f"Expecting '{char}'" + (" delimiter" if char in ",:" else ""))
        self._at += 1

    def value(self) -> tuple[Any, str]:
        """The next value and its text.

        Raises:
            DataError: if it is not JSON, or longer than `MAX_ROW_BYTES`.
        """
        self.next_char()
        while True:
            try:
                value, end = json_decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # What is wrong may be only that the window ends here: in a string, or within an escape or literal
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16
                if not cut or not self._fill():
                    raise self.error(error.msg, line=self._line + self._text.count("\n", 0, error.pos)) from None
                continue
            except (ValueError, RecursionError) as error:  # a key twice, thousands of digits, or too deep nesting
                where = f"{self.name}:{self.line}"
                raise DataError(where, f"is not readable JSON ({json_error(error)})", "correct the file") from None
            if end == len(self._text) and not isinstance(value, (dict, list)) and self._fill():
                continue  # a number may continue
            text, self._at = self._text[self._at : end], end
            return value, text

    def error(self, what: str, remedy: str = "correct the file", line: int | None = None) -> DataError:
        """The error for text that is not JSON, with the current line."""
        return DataError(f"{self.name}:{line or self.line}", f"is not JSON ({what})", remedy)

    def advance(self) -> int:
        """Bytes of the file that were read since the last call."""
        position = self._stream.position()
        covered, self._covered = position - self._covered, position
        return covered

    def _fill(self) -> bool:
        """Reads more text: as much as the current value has already, so that a long one costs linear time."""
        if self._ended:
            return False
        pending = len(self._text) - self._at
        if self._limit is not None and self._read >= self._limit:
            raise _Incomplete
        if pending > MAX_ROW_BYTES:
            raise _too_long(self.name, self.line)
        data = self._stream.read(max(BLOCK_BYTES, pending))
        try:
            more = self._decode(data, not data)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + data.count(b"\n", 0, error.start)
            raise not_utf8(f"{self.name}:{line}") from None
        self._ended, self._read = not data, self._read + len(data)
        if self._limit is None and self._at:
            self._line, self._text, self._at = self.line, self._text[self._at :], 0
        self._text += more
        return bool(more) or (not self._ended and self._fill())


def _too_long(name: str, line: int) -> DataError:
    what = f"a row is longer than {MAX_ROW_BYTES >> 20} MB"
    return DataError(f"{name}:{line}", what, "check whether the file is damaged")

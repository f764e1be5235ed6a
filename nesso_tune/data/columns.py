"""Columns of a record: looked up by name, and noted when they are read, so that everything unread can be reported."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any

from nesso_tune.data.blocks import Record

_NUMBER = re.compile(r"\s*[+-]?(?:\d{1,4000}(?:[.,]\d*)?|[.,]\d+)(?:[eE][+-]?\d{1,3})?\s*", re.ASCII)
_MAX_DETAIL = 200  # characters of the data that a reason quotes
_MAX_ITEMS = 64  # values inside an unread list or object that are searched for text
_MISSING = object()
_MAX_CHARACTERS = 2000  # of each, of which words are searched
_LONG_TEXT = 40  # characters from which a text without spaces that is not ASCII counts as text, e.g. Chinese
_REASONING_KEYS = frozenset({"reasoning_content", "reasoning", "thinking", "thoughts"})  # text, however short


class Unusable(Exception):
    """A record that cannot be used. Its text is the reason, the keyword of the drop counts; `detail` adds to it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail.encode("utf-8", "backslashreplace").decode()[:_MAX_DETAIL]


Found = tuple[str | None, Any]  # a column or key and its value; None and None if there is none


class Row:
    """A record that notes what is read of it.

    Attributes:
        columns: the record.
        read: names of the columns that were looked up; a dotted name is a value inside a column.
        anomalies: names of anomalies that were met while reading it.
    """

    __slots__ = ("_unread", "anomalies", "columns", "read")

    def __init__(self, columns: Record) -> None:
        self.columns = columns
        self.read: set[str] = set()
        self.anomalies: set[str] = set()
        self._unread: dict[str, bool] = {}

    @classmethod
    def of(cls, record: Record | Row) -> Row:
        """The row of a record; a row itself."""
        return record if isinstance(record, Row) else cls(record)

    def find(self, names: Sequence[str]) -> Found:
        """The first of `names` that has a value, see `find_column`. It and the empty ones before it count as read."""
        columns = self.columns
        found: Found = None, None
        for name in names:
            if name in columns:
                value = columns[name]
            elif "." not in name or (value := _descend(columns, name)) is _MISSING:
                continue
            self.read.add(name)
            if value and type(value) is not float:
                return name, value
            value = None if is_null(value) else value
            if value is not None and value != "":
                return name, value
            if found[0] is None or found[1] is None:
                found = name, value
        return found

    def lookup(self, names: Sequence[str]) -> Any:
        """The value of `find`."""
        return self.find(names)[1]

    def require(self, names: Sequence[str]) -> Found:
        """As `find`. Raises Unusable if the record has none of these columns, or only null."""
        found = self.find(names)
        if found[1] is None:
            raise missing(self.columns, names)
        return found

    def note_unread(self, path: str, entry: Mapping[str, Any], read: Collection[str | None]) -> None:
        """Notes the keys of an object at `path` that are not among `read`, as `path.key`."""
        for key, value in entry.items():
            if key not in read:
                name = f"{path}.{key}"
                self._unread[name] = self._unread.get(name, False) or holds_text(key, value)

    def absorb(self, result: Row) -> None:
        """Adds what was noted of `result`, the row that a user's reader made of this one."""
        self.anomalies |= result.anomalies
        self._unread |= result.unread()

    def unread(self) -> dict[str, bool]:
        """The columns and keys that were not read, each with whether it holds text that is not read elsewhere."""
        found = dict(self._unread)
        has_dotted = any("." in name for name in self.read)
        for name, value in self.columns.items():
            if name in self.read:
                continue
            if has_dotted:
                found.update(self._unread_in(name, value))
            else:
                found[name] = holds_text(name, value) and not self._repeats(value)
        return found

    def _unread_in(self, name: str, value: Any) -> Iterator[tuple[str, bool]]:
        if name in self.read:
            return
        if not any(other.startswith(f"{name}.") for other in self.read):
            yield name, holds_text(name, value) and not self._repeats(value)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from self._unread_in(f"{name}.{key}", item)
        elif isinstance(value, list):
            items = {path: text for i, item in enumerate(value) for path, text in self._unread_in(f"{name}.{i}", item)}
            yield from ((path, text) for path, text in items.items() if path.removeprefix(f"{name}.").count("."))
            others = [text for path, text in items.items() if not path.removeprefix(f"{name}.").count(".")]
            if others:  # the elements that were not read, as one
                yield f"{name}.*", any(others)

    def _repeats(self, value: Any) -> bool:
        """Whether a column that was read says all of it, as `chosen` does of `messages` in UltraFeedback."""
        return any(_contains(_value(self.columns, name), value) for name in self.read)


@dataclass(frozen=True)
class UnreadCounts:
    """Columns and message keys that were not read.

    Attributes:
        rows: number of rows that have each of them.
        texts: number of rows in which it holds text.
    """

    rows: Counter[str] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        """Counts what was not read of a row."""
        for name, is_text in row.unread().items():
            self.rows[name] += 1
            if is_text:
                self.texts[name] += 1

    def merge(self, other: UnreadCounts) -> None:
        """Adds the counts of other rows of the same source."""
        self.rows.update(other.rows)
        self.texts.update(other.texts)


def find_column(record: Record, names: Sequence[str]) -> str | None:
    """The first of `names` with a value in the record, else the first that it has; None if it has none.

    Null, NaN (as pandas writes it) and the empty text are no values. A dotted name descends into objects and lists
    (`answers.0.text`).
    """
    return Row(record).find(names)[0]


def lookup(record: Record, names: Sequence[str]) -> Any:
    """The value of the first of `names` with a value in the record; None or an empty text if there is none."""
    return Row(record).find(names)[1]


def column_value(record: Record, name: str) -> Any:
    """The value of a column or of a dotted name, as it is; None if the record has none."""
    value = _value(record, name)
    return None if value is _MISSING else value


def is_equal(value: Any, wanted: Any) -> bool:
    """Whether the value of a column is the one that a recipe names.

    1, 1.0 and "1" are equal, and true and "true", since CSV files contain nothing but text; 1 and true are not.
    """
    if isinstance(value, bool) or isinstance(wanted, bool):
        texts = isinstance(value, str) or isinstance(wanted, str)
        return str(value).strip().lower() == str(wanted).strip().lower() if texts else value is wanted
    if isinstance(value, str) and isinstance(wanted, str):
        return value.strip() == wanted.strip()
    number = as_number(value)
    return bool(value == wanted) or (number is not None and number == as_number(wanted))


def as_number(value: Any) -> float | None:
    """A number, also from a text such as "0.5" or, as Italian spreadsheets write it, "0,5"; None for other values."""
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            return None
        # an integer stays exact: long ones are ids
        return int(value) if value.strip().lstrip("+-").isdecimal() else float(value.strip().replace(",", "."))
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) else value


def missing(record: Record, names: Sequence[str]) -> Unusable:
    """The error for a record without any of these columns."""
    columns = ", ".join(map(str, record)) or "an empty object"
    return Unusable("missing_field", f"no {' or '.join(names)} in {columns}")


def check_text(value: Any) -> str:
    """Returns a text. Raises Unusable for other types, and for text with lone surrogates."""
    if not isinstance(value, str):
        raise Unusable("content_not_text", type(value).__name__)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable("invalid_unicode") from None
    return value


def holds_text(key: str, value: Any) -> bool:
    """Whether a value holds text, rather than a number, a date, a label, an address or nothing."""
    if isinstance(value, str) and len(value) <= _LONG_TEXT and key not in _REASONING_KEYS:
        return _has_words(value)  # quickly for labels, which repeat
    items: list[tuple[str, Any]] = [(key, value)]
    for name, item in items:  # grows while it is read
        if isinstance(item, str):
            if _has_words(item[:_MAX_CHARACTERS]) or (name in _REASONING_KEYS and item.strip()):
                return True
        elif len(items) < _MAX_ITEMS and isinstance(item, Mapping):
            items += islice(item.items(), _MAX_ITEMS)
        elif len(items) < _MAX_ITEMS and isinstance(item, list):
            items += [(name, entry) for entry in item[:_MAX_ITEMS]]
    return False


@lru_cache(maxsize=1024)
def _has_words(text: str) -> bool:
    """Whether two words follow each other, as they do not in dates, numbers, hashes, labels and addresses."""
    if len(text) > _LONG_TEXT and not text.isascii():
        return True
    words = [any(map(str.isalpha, word)) for word in text.split()]
    return any(first and second for first, second in pairwise(words))


def _value(record: Record, name: str) -> Any:
    """The value of a column or of a dotted name; `_MISSING` if the record has neither."""
    value = record.get(name, _MISSING)
    return value if value is not _MISSING or "." not in name else _descend(record, name)


def _contains(value: Any, part: Any) -> bool:
    """Whether two values are equal but for further keys in objects of the first."""
    if isinstance(value, Mapping) and isinstance(part, Mapping):
        return all(key in value and _contains(value[key], item) for key, item in part.items())
    if isinstance(value, list) and isinstance(part, list):
        return len(value) == len(part) and all(map(_contains, value, part))
    return bool(value == part)


def _descend(value: Any, name: str) -> Any:
    """The value of a dotted name inside an object or list; `_MISSING` if there is none."""
    for key in name.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return _MISSING
    return value


def is_null(value: Any) -> bool:
    """Whether a value is null, or NaN, as pandas writes null."""
    return value is None or (type(value) is float and value != value)

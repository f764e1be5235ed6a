"""Blocks of records, the unit of work of a worker process: small, picklable, and with the location of their records.

A block of lines, of a JSON array or of an Arrow table is parsed by the worker that receives it.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from nesso_tune.data.remedies import python, quoted
from nesso_tune.errors import DataError, shortened

Record = Mapping[str, Any]
LocatedRecord = tuple[Record, str]  # a record and its location, `file:line` or `file row N`
NumberedRecord = tuple[Record, int]  # a record and its number; its location is the block's `prefix` and this number

_TWICE = "stands twice in an object"
BLOCK_BYTES = 1 << 18  # size of a block of text
BLOCK_RECORDS = 1024  # size of all other blocks
# Columns of texts. Their text may be JSON, e.g. an answer; in other columns of a table it is a list or an object.
_TEXT_COLUMNS = frozenset((
    "instruction", "input", "output", "prompt", "response", "question", "answer", "completion", "text", "content",
    "context", "system", "query", "target", "chosen", "rejected", "istruzione", "domanda", "risposta", "contesto",
    "testo",
))  # fmt: skip


class _Limited:
    """A block of which only the first `limit` records are read, or all if it is None."""

    prefix: str
    limit: int | None

    def total(self) -> int:
        """Number of records in the block."""
        raise NotImplementedError

    def count(self) -> int:
        """Number of records that are read."""
        return self.total() if self.limit is None else min(self.total(), self.limit)

    def _numbered(self, records: list[Any], first: int) -> Iterator[NumberedRecord]:
        for number, record in enumerate(records[: self.limit], first):
            yield check_object(record, f"{self.prefix}{number}"), number


@dataclass(frozen=True)
class JsonLinesBlock(_Limited):
    """Lines of a JSON-lines file, not yet parsed.

    Attributes:
        prefix: location of the file; a line number follows it.
        first: number of the first line, from 1.
        data: the lines.
        size: bytes of the source that the block covers.
        limit: maximum number of records to read.
    """

    prefix: str
    first: int
    data: bytes = field(repr=False)
    size: int = 0
    limit: int | None = None

    def numbered_records(self) -> Iterator[NumberedRecord]:
        """The records with their line numbers; blank lines are skipped.

        Raises:
            DataError: with file and line, if a line is not a JSON object.
        """
        lines = ((i, line) for i, line in enumerate(self.data.split(b"\n"), self.first) if line.strip())
        for number, line in islice(lines, self.limit):
            yield _parse_line(line, f"{self.prefix}{number}"), number

    def total(self) -> int:
        """Number of records in the block."""
        return sum(1 for line in self.data.split(b"\n") if line.strip())


@dataclass(frozen=True)
class _Counted(_Limited):
    """A block whose number of records is known before they are read. Other attributes as in JsonLinesBlock."""

    prefix: str
    first: int
    data: bytes = field(repr=False)
    num_records: int
    size: int
    limit: int | None = None

    def total(self) -> int:
        """Number of records in the block."""
        return self.num_records


@dataclass(frozen=True)
class JsonArrayBlock(_Counted):
    """Consecutive items of a JSON array, or consecutive JSON objects: their text, joined by commas, not yet parsed.

    `first` is the number of the first item. Other attributes as in JsonLinesBlock.
    """

    def numbered_records(self) -> Iterator[NumberedRecord]:
        """The records with their numbers. Raises DataError if one is not an object."""
        return self._numbered(load_json(str(b"[%b]" % self.data, "utf-8")), self.first)


@dataclass(frozen=True)
class ObjectsBlock(_Limited):
    """Parsed records, those of a data set on the hub. Attributes as in JsonLinesBlock."""

    prefix: str
    first: int
    records: list[Any] = field(repr=False)
    size: int
    limit: int | None = None

    def numbered_records(self) -> Iterator[NumberedRecord]:
        """The records with their numbers. Raises DataError if one is not an object."""
        return self._numbered(self.records, self.first)

    def total(self) -> int:
        """Number of records in the block."""
        return len(self.records)


@dataclass(frozen=True)
class TableBlock(_Limited):
    """Rows of a text table (CSV, TSV, spreadsheet). All values are text, except those of JSON columns.

    Attributes:
        prefix: location of the file; the number of a row follows it.
        columns: names of the columns.
        json_columns: indices of the columns whose cells are JSON lists or objects.
        rows: the number of each row, and its cells.
        size: bytes of the source that the block covers.
        limit: maximum number of records to read.
    """

    prefix: str
    columns: tuple[str, ...]
    json_columns: tuple[int, ...]
    rows: list[tuple[int, list[str]]] = field(repr=False)
    size: int
    limit: int | None = None

    def numbered_records(self) -> Iterator[NumberedRecord]:
        """The records with their numbers; an empty cell of a JSON column is null."""
        for number, cells in self.rows[: self.limit]:
            record: dict[str, Any] = dict(zip(self.columns, cells, strict=True))
            for i in self.json_columns:
                record[self.columns[i]] = parse_cell(cells[i])
            yield record, number

    def total(self) -> int:
        """Number of records in the block."""
        return len(self.rows)


@dataclass(frozen=True)
class ArrowBlock(_Counted):
    """Records of a Parquet or Arrow file, as a record batch in the Arrow IPC format.

    Attributes as in JsonLinesBlock.
    """

    def numbered_records(self) -> Iterator[NumberedRecord]:
        """The records with their numbers.

        Raises:
            DataError: for values that cannot be read, e.g. text that is not UTF-8.
        """
        import pyarrow

        try:
            with pyarrow.ipc.open_stream(self.data) as stream:
                table = stream.read_all().slice(0, self.limit)
            records, decode = table.to_pylist(maps_as_pydicts="strict"), _json_decoder(pyarrow.struct(table.schema))
        except (pyarrow.ArrowException, ValueError, OverflowError, KeyError) as error:  # a date, or a key of a map
            reason = str(error).partition("\n")[0]
            where, what = self.prefix.removesuffix(" row "), f"is not readable from row {self.first} on ({reason})"
            raise DataError(where, what, "check the file") from None
        for number, record in enumerate(records, self.first):
            try:
                decoded = drop_nulls(record) if decode is None else decode(drop_nulls(record))
            except (ValueError, RecursionError) as error:
                what = f"has a cell that is not JSON ({json_error(error)})"
                raise DataError(f"{self.prefix}{number}", what, "correct the cell") from None
            yield decoded, number


Block = JsonLinesBlock | JsonArrayBlock | ObjectsBlock | TableBlock | ArrowBlock


def with_locations(blocks: Iterable[Block]) -> Iterator[LocatedRecord]:
    """All records of blocks with their locations."""
    for block in blocks:
        for record, number in block.numbered_records():
            yield record, f"{block.prefix}{number}"


def limit_records(blocks: Iterator[Block], limit: int | None) -> Iterator[Block]:
    """The blocks of the first `limit` records; all blocks for None."""
    if limit is None:
        yield from blocks
        return
    left = limit
    for block in blocks:
        count = block.count()
        yield block if count <= left else replace(block, limit=left)
        left -= count
        if left <= 0:
            return


def drop_nulls(record: Record) -> Record:
    """A record of an Arrow table without the nulls inside its columns.

    All objects of an Arrow column have the same keys; the keys that an object did not have are null there.
    """

    def without_nulls(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_nulls(item) for key, item in value.items() if item is not None}
        return [without_nulls(item) for item in value] if isinstance(value, list) else value

    return {column: without_nulls(value) for column, value in record.items()}


def is_text_column(name: str) -> bool:
    """Whether a column holds texts by its name."""
    return name.strip().lower() in _TEXT_COLUMNS


def check_object(record: Any, where: str) -> Record:
    """Returns a record. Raises DataError if it is not a JSON object."""
    if isinstance(record, dict):
        return record
    is_messages = isinstance(record, list) and bool(record) and all(isinstance(entry, dict) for entry in record)
    remedy = 'write {"messages": [...]} instead of the list' if is_messages else "write one object per line"
    raise DataError(where, f"a row must be a JSON object, got {type(record).__name__}", remedy)


def parse_cell(text: str) -> Any:
    """The list or object in a cell of a table; other text is returned unchanged, and None for an empty cell."""
    if not text.strip():
        return None
    if text.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return load_list(text)
    return text


def load_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError if it is not JSON, or an object has a key twice."""
    return json_decoder.decode(text)


def load_list(text: str) -> Any:
    """The list or object in a text, as JSON or as Python writes it, such as pandas to CSV files.

    Raises:
        ValueError: if it is neither, or an object has a key twice.
    """
    try:
        return load_json(text)
    except json.JSONDecodeError:
        try:
            tree = ast.parse(text.strip(), mode="eval")
            value = ast.literal_eval(tree)
        except (SyntaxError, MemoryError) as error:
            raise ValueError(str(error)) from None
        if not isinstance(value, (list, dict)):
            raise ValueError("neither a list nor an object") from None
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                _check_unique([str(ast.literal_eval(key)) for key in node.keys if key is not None])
        return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        _check_unique([name for name, _ in pairs])
    return made


def _check_unique(names: list[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"the key `{shortened(twice)}` {_TWICE}")


json_decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)


def json_error(error: Exception) -> str:
    """What is wrong with a JSON text."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "integer string conversion" in str(error):
        return "an integer has thousands of digits"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _json_decoder(kind: Any) -> Callable[[Any], Any] | None:
    """A function that parses the JSON text inside values of an Arrow type (`datasets.Json`); None if there is none."""
    import pyarrow

    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else load_json(value)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        item = _json_decoder(kind.value_type)
        return None if item is None else lambda value: None if value is None else [item(one) for one in value]
    if not pyarrow.types.is_struct(kind):
        return None
    found = {field.name: decode for field in kind if (decode := _json_decoder(field.type)) is not None}
    if not found:
        return None
    return lambda value: value and {key: found[key](one) if key in found else one for key, one in value.items()}


def _parse_line(line: bytes, where: str) -> Record:
    try:
        return check_object(load_json(str(line, "utf-8").removeprefix("\ufeff")), where)  # of a file that was appended
    except UnicodeDecodeError:
        raise not_utf8(where) from None
    except (ValueError, RecursionError) as error:
        reason = json_error(error)
        raise DataError(where, f"is not JSON ({reason})", _line_remedy(line, where, reason)) from None


def _line_remedy(line: bytes, where: str, reason: str) -> str:
    """What to do about a line that is not JSON."""
    if reason.endswith(_TWICE):
        return "remove one of the two, whose values may differ"
    file = where.rpartition(":")[0]
    if line.rstrip().endswith(b","):
        return f"if lines end with commas, remove them: sed -i 's/,[[:space:]]*$//' {quoted(file)}"
    if line.lstrip().startswith(b"{'") and where.endswith(":1"):
        code = f"import ast, json; print(*(json.dumps(ast.literal_eval(line)) for line in open({file!r})), sep=chr(10))"
        return f"if Python wrote it, write it as JSON, e.g. {python(code)} > {quoted(f'{file}.jsonl')}"
    return "correct the line: one complete JSON object per line; the file may be truncated, or not JSON at all"


def not_utf8(where: str) -> DataError:
    """The error for a text that is not UTF-8; `where` is `FILE:LINE`."""
    file = where.rpartition(":")[0] or where
    stem, dot, suffix = file.rpartition(".")
    converted = f"{stem}.utf8.{suffix}" if dot else f"{file}.utf8"
    files = f"{quoted(file)} > {quoted(converted)}"
    remedy = f"if it is Windows-1252, convert it: iconv -f WINDOWS-1252 -t UTF-8 {files}"
    return DataError(where, "is not UTF-8 text", remedy)

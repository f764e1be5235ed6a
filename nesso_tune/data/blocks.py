"""Reading rows in blocks: JSON lines, JSON arrays and Parquet, with the place of every row.

A block is what one process works on at a time: small enough that any file fits into memory piece by piece, and plain
enough to be handed to another process, which then does the parsing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from nesso_tune.data.files import BOM, TABLES, beginning, is_array
from nesso_tune.errors import DataError

SIZE = 1 << 18  # bytes of lines in a block
ROWS = 1024  # rows of anything else
Row = dict[str, Any]
Located = tuple[Row, str]  # a row and where it stands (`file:line`)
Numbered = tuple[Row, int]  # a row and its number; the block's `prefix` before it makes its place
TO_LINES = (
    "make JSON lines of it, e.g. python -c \"import pandas; pandas.read_csv('{file}').to_json('{stem}.jsonl', "
    "orient='records', lines=True)\""
)
GZIP, ZIP, ZSTD = b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Lines:
    """Lines of a file of JSON lines.

    Attributes:
        prefix: what stands before a line's number in its place.
        first: number of the first line, from 1.
        data: the lines.
        most: at most so many rows are read of it.
    """

    prefix: str
    first: int
    data: bytes = field(repr=False)
    most: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the source that it stands for."""
        return len(self.data)

    def numbered(self) -> Iterator[Numbered]:
        """Its rows; blank lines are passed over.

        Raises:
            DataError: with file and line of what is not a row.
        """
        lines = ((i, line) for i, line in enumerate(self.data.split(b"\n"), self.first) if line.strip())
        for number, line in islice(lines, self.most):
            yield _parsed(line, f"{self.prefix}{number}"), number

    def count(self) -> int:
        """How many rows it has."""
        lines = sum(1 for line in self.data.split(b"\n") if line.strip())
        return lines if self.most is None else min(lines, self.most)


@dataclass(frozen=True)
class Objects:
    """Rows that are parsed already: those of a JSON array, or of a data set of the hub."""

    prefix: str
    first: int
    rows: list[Any] = field(repr=False)
    size: int
    most: int | None = None

    def numbered(self) -> Iterator[Numbered]:
        """Its rows. Raises DataError for what is none."""
        for number, row in enumerate(self.rows[: self.most], self.first):
            yield _object(row, f"{self.prefix}{number}"), number

    def count(self) -> int:
        """How many rows it has."""
        return len(self.rows[: self.most])


@dataclass(frozen=True)
class Table:
    """Rows of a Parquet file, as a record batch in Arrow's own bytes."""

    prefix: str
    first: int
    data: bytes = field(repr=False)
    rows: int
    size: int
    most: int | None = None

    def numbered(self) -> Iterator[Numbered]:
        """Its rows. Raises DataError for text that is not UTF-8."""
        import pyarrow

        try:
            with pyarrow.ipc.open_stream(self.data) as stream:
                rows = stream.read_all().slice(0, self.most).to_pylist()
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # a date beyond the calendar
            what = str(error).partition("\n")[0]
            where, what = self.prefix.removesuffix(" row "), f"is not readable from row {self.first} on ({what})"
            raise DataError(where, what, "check the file") from None
        for number, row in enumerate(rows, self.first):
            yield without_nulls(row), number

    def count(self) -> int:
        """How many rows it has."""
        return self.rows if self.most is None else min(self.rows, self.most)


Block = Lines | Objects | Table


def located(blocks: Iterable[Block]) -> Iterator[Located]:
    """Every row of blocks with its place."""
    for block in blocks:
        for row, number in block.numbered():
            yield row, f"{block.prefix}{number}"


def at_most(blocks: Iterator[Block], rows: int | None) -> Iterator[Block]:
    """Blocks up to so many rows; all of them for None."""
    if rows is None:
        yield from blocks
        return
    left = rows
    for block in blocks:
        count = block.count()
        yield block if count <= left else replace(block, most=left)
        left -= count
        if left <= 0:
            return


def file_blocks(file: Path) -> Iterator[Block]:
    """The blocks of a file.

    Raises:
        DataError: if it is of a kind that is not read, or damaged.
    """
    if file.suffix.lower() == ".parquet":
        yield from _parquet(file)
        return
    if file.suffix.lower() in TABLES:
        raise DataError(str(file), f"{file.suffix} files are not read", TO_LINES.format(file=file, stem=file.stem))
    try:
        head = beginning(file)
    except OSError as error:
        raise DataError(str(file), f"cannot be read ({error.strerror})", "check its permissions") from None
    if head.startswith((GZIP, ZIP, ZSTD)):
        raise DataError(str(file), "is compressed", "unpack it first (gunzip, unzip, zstd -d)")
    if not head:
        raise DataError(str(file), "is empty", "give a file with rows, or remove the source")
    yield from _array(file) if is_array(file) else _lines(file)


def read_rows(file: Path) -> Iterator[Located]:
    """Every row of a file with its place. Raises DataError as `file_blocks` does."""
    return located(file_blocks(file))


def _lines(file: Path) -> Iterator[Block]:
    first = 1
    with file.open("rb") as stream:
        while data := stream.read(SIZE):
            if not data.endswith(b"\n"):
                data += stream.readline()  # a block ends with a line
            yield Lines(f"{file}:", first, data.removeprefix(BOM) if first == 1 else data)
            first += data.count(b"\n")


def _parsed(line: bytes, where: str) -> Row:
    try:
        return _object(json.loads(str(line, "utf-8")), where)
    except UnicodeDecodeError:
        raise DataError(where, "is not UTF-8 text", "convert the file, e.g. with iconv -t UTF-8") from None
    except (ValueError, RecursionError) as error:
        hint = "one whole JSON object per line; the file may be cut short, or not JSON at all"
        raise DataError(where, f"is not JSON ({_reason(error)})", f"correct the line: {hint}") from None


def _array(file: Path) -> Iterator[Block]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(str(file), "is not UTF-8 text", "convert the file, e.g. with iconv -t UTF-8") from None
    except json.JSONDecodeError as error:
        several = "Extra data" in error.msg
        remedy = (
            'if every line is a list of messages, write {"messages": [...]} on each' if several else "correct the file"
        )
        raise DataError(f"{file}:{error.lineno}", f"is not JSON ({error.msg})", remedy) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested too deeply
        raise DataError(str(file), f"is not readable JSON ({_reason(error)})", "correct the file") from None
    size = file.stat().st_size * ROWS // max(1, len(rows))
    for start in range(0, len(rows), ROWS):
        yield Objects(f"{file} row ", start + 1, rows[start : start + ROWS], size)


def _parquet(file: Path) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    number, size = 1, file.stat().st_size
    try:
        with parquet.ParquetFile(file) as table:
            share = size / max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=ROWS):
                yield _table(f"{file} row ", number, batch, round(share * batch.num_rows))
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        what = str(error).partition("\n")[0]
        raise DataError(str(file), f"is not a readable Parquet file ({what})", "check the file") from None


def _table(prefix: str, first: int, batch: Any, size: int) -> Table:
    """A block of an Arrow record batch."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return Table(prefix, first, sink.getvalue().to_pybytes(), batch.num_rows, size)


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the nulls inside its columns: there every object has the keys of all others."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(item) for key, item in value.items() if item is not None}
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    return {column: cleaned(value) for column, value in row.items()}


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            where, f"a row must be a JSON object, this is {type(row).__name__}", "write one object per line"
        )
    return row


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)

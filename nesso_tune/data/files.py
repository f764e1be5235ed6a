"""Which local files a path means, of what kind they are, and a hash of what is in them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from nesso_tune.errors import DataError, closest
from nesso_tune.recipes.builtin import local_path

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv", ".xlsx", ".xls", ".ods")
GLOB_CHARACTERS = frozenset("*?[")
BOM = b"\xef\xbb\xbf"


def is_local(path: str) -> bool:
    """Whether a source's path means files here, not a data set on the hub."""
    try:
        return local_path(path).exists() or bool(GLOB_CHARACTERS & set(path)) or _looks_like_a_file(path)
    except OSError:  # a name longer than a file's may be
        return True


def looks_like_data(path: str) -> bool:
    """Whether a word on the command line can only mean data: a file of rows, or a pattern."""
    return bool(GLOB_CHARACTERS & set(path)) or _holds_rows(path) or path.lower().endswith(TABLE_SUFFIXES)


def _looks_like_a_file(path: str) -> bool:
    named = path.lower().endswith((*DATA_SUFFIXES, ".gz", ".csv", ".tsv", ".txt", ".zst", ".zip", ".yaml", ".arrow"))
    return named or path.startswith(("/", "./", "../", "~")) or path.count("/") != 1


def _holds_rows(name: str) -> bool:
    """Whether a file in a folder is data; compressed data is too, so that it is not passed over in silence."""
    name = name.lower()
    return name.removesuffix(".gz").removesuffix(".zst").removesuffix(".zip").endswith(DATA_SUFFIXES)


def expand(path: str) -> list[Path]:
    """The files that a path, folder or glob means, in a fixed order.

    Raises:
        DataError: if there are none.
    """
    try:
        return _expanded(path)
    except (OSError, ValueError) as error:  # ValueError: a pattern that is none, or a null character
        what = error.strerror or "" if isinstance(error, OSError) else str(error)
        raise DataError(path, f"cannot be read ({what.lower()})", "check the path and its permissions") from None


def _expanded(path: str) -> list[Path]:
    root = local_path(path)
    if root.is_dir():
        files = sorted(p for p in root.rglob("*") if p.is_file() and _holds_rows(p.name))
        if not files:
            raise DataError(path, "the folder holds no .jsonl, .json or .parquet file", "name the files, or a glob")
        return files
    if root.exists():
        return [root]
    if GLOB_CHARACTERS & set(path):
        base = Path(root.anchor) if root.is_absolute() else Path()
        files = sorted(p for p in base.glob(str(root.relative_to(root.anchor) if root.anchor else root)) if p.is_file())
        if files:
            return files
        raise DataError(path, "matches no file", "check the pattern; it is relative to the working directory")
    near = sorted(p.name for p in root.parent.glob("*") if p.suffix in DATA_SUFFIXES) if root.parent.is_dir() else []
    if guess := closest(root.name, near):
        remedy = f"did you mean {root.parent / guess}?"
    elif near:
        remedy = f"{root.parent} has {', '.join(near[:5])}{' …' if len(near) > 5 else ''}"
    else:
        remedy = "check the path; it is relative to the working directory"
    raise DataError(path, "no such file", remedy)


def could_match(path: str, *files: Path) -> bool:
    """Whether a folder or glob would mean one of these files if it were there. Links are followed.

    Args:
        path: as a recipe names it.
        files: their whole paths, without links.
    """
    root = local_path(path)
    fixed = root.parts if root.is_dir() else tuple(takewhile(lambda part: not GLOB_CHARACTERS & set(part), root.parts))
    folder, pattern = Path(*fixed), root.parts[len(fixed) :] or ("**", "*")
    whole = folder.resolve()
    if any(whole in file.parents and _matches(pattern, file.relative_to(whole).parts) for file in files):
        return True
    try:
        return any(_leads_to(link, rest, files) for link, rest in _links(folder, pattern))
    except (OSError, ValueError):  # a pattern that is none: `expand` says so
        return False


def _links(folder: Path, pattern: tuple[str, ...]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The links that a pattern may pass or end at, each with the rest of the pattern."""
    for end in range(1, len(pattern) + 1):
        found = folder.glob("/".join(pattern[:end]))
        yield from ((entry, pattern[end:]) for entry in found if entry.is_symlink())


def _leads_to(link: Path, pattern: tuple[str, ...], files: Sequence[Path]) -> bool:
    target = Path(os.path.realpath(link))
    return any(target in (file, *file.parents) and _matches(pattern, file.relative_to(target).parts) for file in files)


def _matches(pattern: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] == "**":
        return _matches(pattern[1:], parts) or _matches(pattern, parts[1:])
    return fnmatchcase(parts[0], pattern[0]) and _matches(pattern[1:], parts[1:])


def files_under(path: str) -> list[Path]:
    """The files that a path means as `expand` has them, of a folder all, whatever they are called.

    Raises:
        DataError: if there are none.
    """
    root = local_path(path)
    return sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else expand(path)


def content_hash(files: list[Path]) -> str:
    """SHA-256 over the bytes of all files in order. Neither names nor times count."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise DataError(str(file), f"cannot be read ({error.strerror})", "check its permissions") from None
    return digest.hexdigest()


def is_json_lines(file: Path) -> bool:
    """Whether a file is named as JSON lines."""
    return file.suffix.lower() in (".jsonl", ".ndjson")


def count_lines(files: list[Path]) -> int:
    """Lines of all files that are not blank."""
    count = 0
    for file in files:
        with file.open("rb") as stream:
            count += sum(1 for line in stream if not line.isspace())
    return count


def is_json_array(file: Path) -> bool:
    """Whether a file holds one JSON array, whatever its name says."""
    return _file_head(file).startswith(b"[")


def _file_head(file: Path) -> bytes:
    """The first bytes of a file that are not blank, without a byte order mark; none if there are none."""
    with file.open("rb") as stream:
        head = stream.read(4096).removeprefix(BOM).lstrip()
        while not head and (piece := stream.read(1 << 20)):
            head = piece.lstrip()
    return head[:4096]


BLOCK_BYTES = 1 << 18  # bytes of lines in a block
BLOCK_RECORDS = 1024  # rows of anything else
Record = Mapping[str, Any]
LocatedRecord = tuple[Record, str]  # a row and where it stands (`file:line`)
NumberedRecord = tuple[Record, int]  # a row and its number; the block's `prefix` before it makes its place
TO_LINES = (
    "make JSON lines of it, e.g. python -c \"import pandas; pandas.read_csv('{file}').to_json('{stem}.jsonl', "
    "orient='records', lines=True)\""
)
GZIP, ZIP, ZSTD = b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class JsonLinesBlock:
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

    def numbered_records(self) -> Iterator[NumberedRecord]:
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
class ObjectsBlock:
    """Rows that are parsed already: those of a JSON array, or of a data set of the hub."""

    prefix: str
    first: int
    rows: list[Any] = field(repr=False)
    size: int
    most: int | None = None

    def numbered_records(self) -> Iterator[NumberedRecord]:
        """Its rows. Raises DataError for what is none."""
        for number, row in enumerate(self.rows[: self.most], self.first):
            yield _object(row, f"{self.prefix}{number}"), number

    def count(self) -> int:
        """How many rows it has."""
        return len(self.rows[: self.most])


@dataclass(frozen=True)
class ArrowBlock:
    """Rows of a Parquet file, as a record batch in Arrow's own bytes."""

    prefix: str
    first: int
    data: bytes = field(repr=False)
    rows: int
    size: int
    most: int | None = None

    def numbered_records(self) -> Iterator[NumberedRecord]:
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
            yield drop_nulls(row), number

    def count(self) -> int:
        """How many rows it has."""
        return self.rows if self.most is None else min(self.rows, self.most)


Block = JsonLinesBlock | ObjectsBlock | ArrowBlock


def with_locations(blocks: Iterable[Block]) -> Iterator[LocatedRecord]:
    """Every row of blocks with its place."""
    for block in blocks:
        for row, number in block.numbered_records():
            yield row, f"{block.prefix}{number}"


def limit_records(blocks: Iterator[Block], rows: int | None) -> Iterator[Block]:
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
    if file.suffix.lower() in TABLE_SUFFIXES:
        raise DataError(str(file), f"{file.suffix} files are not read", TO_LINES.format(file=file, stem=file.stem))
    try:
        head = _file_head(file)
    except OSError as error:
        raise DataError(str(file), f"cannot be read ({error.strerror})", "check its permissions") from None
    if head.startswith((GZIP, ZIP, ZSTD)):
        raise DataError(str(file), "is compressed", "unpack it first (gunzip, unzip, zstd -d)")
    if not head:
        raise DataError(str(file), "is empty", "give a file with rows, or remove the source")
    yield from _array(file) if is_json_array(file) else _lines(file)


def read_records(file: Path) -> Iterator[LocatedRecord]:
    """Every row of a file with its place. Raises DataError as `file_blocks` does."""
    return with_locations(file_blocks(file))


def _lines(file: Path) -> Iterator[Block]:
    first = 1
    with file.open("rb") as stream:
        while data := stream.read(BLOCK_BYTES):
            if not data.endswith(b"\n"):
                data += stream.readline()  # a block ends with a line
            yield JsonLinesBlock(f"{file}:", first, data.removeprefix(BOM) if first == 1 else data)
            first += data.count(b"\n")


def _parsed(line: bytes, where: str) -> Record:
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
    size = file.stat().st_size * BLOCK_RECORDS // max(1, len(rows))
    for start in range(0, len(rows), BLOCK_RECORDS):
        yield ObjectsBlock(f"{file} row ", start + 1, rows[start : start + BLOCK_RECORDS], size)


def _parquet(file: Path) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    number, size = 1, file.stat().st_size
    try:
        with parquet.ParquetFile(file) as table:
            share = size / max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=BLOCK_RECORDS):
                yield _table(f"{file} row ", number, batch, round(share * batch.num_rows))
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        what = str(error).partition("\n")[0]
        raise DataError(str(file), f"is not a readable Parquet file ({what})", "check the file") from None


def _table(prefix: str, first: int, batch: Any, size: int) -> ArrowBlock:
    """A block of an Arrow record batch."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return ArrowBlock(prefix, first, sink.getvalue().to_pybytes(), batch.num_rows, size)


def drop_nulls(row: dict[str, Any]) -> dict[str, Any]:
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

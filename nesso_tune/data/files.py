"""Local data files: the files that a path means, and reading them in blocks of records.

A block is the unit of work of a worker process. It is small, picklable, and includes the location of its records.
"""

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

Record = Mapping[str, Any]
LocatedRecord = tuple[Record, str]  # a record and its location, `file:line` or `file row N`
NumberedRecord = tuple[Record, int]  # a record and its number; its location is the block's `prefix` and this number

BLOCK_BYTES = 1 << 18  # size of a block of JSON lines
BLOCK_RECORDS = 1024  # size of all other blocks

_DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".ndjson")
_TABLE_SUFFIXES = (".csv", ".tsv", ".xlsx", ".xls", ".ods")
_OTHER_SUFFIXES = (".gz", ".csv", ".tsv", ".txt", ".zst", ".zip", ".yaml", ".arrow")
_GLOB_CHARACTERS = frozenset("*?[")
_BOM = b"\xef\xbb\xbf"
_GZIP, _ZIP, _ZSTD = b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd"
_CONVERT_TABLE = (
    "convert it to JSON lines, e.g. python -c \"import pandas; pandas.read_csv('{file}').to_json('{stem}.jsonl', "
    "orient='records', lines=True)\""
)


def is_local(path: str) -> bool:
    """Whether the path of a source means local files, not a data set on the hub."""
    try:
        return local_path(path).exists() or is_glob(path) or _looks_like_file(path)
    except OSError:  # longer than a file name can be
        return True


def is_glob(path: str) -> bool:
    """Whether a path is a pattern for several files."""
    return bool(_GLOB_CHARACTERS & set(path))


def looks_like_data(path: str) -> bool:
    """Whether a command-line argument can only mean data: a data file, or a glob."""
    return is_glob(path) or _has_data_suffix(path) or path.lower().endswith(_TABLE_SUFFIXES)


def expand(path: str) -> list[Path]:
    """The files that a path, folder or glob means, in a fixed order.

    Raises:
        DataError: if there are none.
    """
    try:
        return _expand(path)
    except (OSError, ValueError) as error:  # ValueError: an invalid pattern, or a null character
        reason = error.strerror or "" if isinstance(error, OSError) else str(error)
        raise DataError(path, f"cannot be read ({reason.lower()})", "check the path and its permissions") from None


def files_under(path: str) -> list[Path]:
    """The files that a path means, as `expand` does, but all files of a folder, whatever their suffix.

    Raises:
        DataError: if there are none.
    """
    root = local_path(path)
    return sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else expand(path)


def could_match(path: str, *files: Path) -> bool:
    """Whether a folder or glob would include one of these files if it existed. Symbolic links are followed.

    Args:
        path: folder or glob, as in a recipe.
        files: absolute paths without symbolic links.
    """
    root = local_path(path)
    fixed = root.parts if root.is_dir() else tuple(takewhile(lambda part: not is_glob(part), root.parts))
    folder, pattern = Path(*fixed), root.parts[len(fixed) :] or ("**", "*")
    resolved = folder.resolve()
    if any(resolved in file.parents and _matches(pattern, file.relative_to(resolved).parts) for file in files):
        return True
    try:
        return any(_link_leads_to(link, rest, files) for link, rest in _links(folder, pattern))
    except (OSError, ValueError):  # an invalid pattern: `expand` reports it
        return False


def content_hash(files: list[Path]) -> str:
    """SHA-256 over the bytes of all files in order; independent of their names and times."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise _unreadable(file, error) from None
    return digest.hexdigest()


def is_json_lines(file: Path) -> bool:
    """Whether the suffix of a file is that of JSON lines."""
    return file.suffix.lower() in (".jsonl", ".ndjson")


def is_json_array(file: Path) -> bool:
    """Whether a file contains one JSON array, whatever its suffix."""
    return _file_head(file).startswith(b"[")


def count_lines(files: list[Path]) -> int:
    """Number of non-blank lines of all files."""
    count = 0
    for file in files:
        with file.open("rb") as stream:
            count += sum(1 for line in stream if not line.isspace())
    return count


def read_records(file: Path) -> Iterator[LocatedRecord]:
    """All records of a file with their locations. Raises DataError as `file_blocks` does."""
    return with_locations(file_blocks(file))


def file_blocks(file: Path) -> Iterator[Block]:
    """The blocks of a file.

    Raises:
        DataError: if its type is not supported, or it is damaged.
    """
    if file.suffix.lower() == ".parquet":
        yield from _parquet_blocks(file)
        return
    if file.suffix.lower() in _TABLE_SUFFIXES:
        remedy = _CONVERT_TABLE.format(file=file, stem=file.stem)
        raise DataError(str(file), f"{file.suffix} files are not supported", remedy)
    try:
        head = _file_head(file)
    except OSError as error:
        raise _unreadable(file, error) from None
    if head.startswith((_GZIP, _ZIP, _ZSTD)):
        raise DataError(str(file), "is compressed", "decompress it first (gunzip, unzip, zstd -d)")
    if not head:
        raise DataError(str(file), "is empty", "give a file with rows, or remove the source")
    yield from _json_array_blocks(file) if is_json_array(file) else _json_lines_blocks(file)


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


@dataclass(frozen=True)
class JsonLinesBlock:
    """Lines of a JSON-lines file, not yet parsed.

    Attributes:
        prefix: location of the file; a line number follows it.
        first: number of the first line, from 1.
        data: the lines.
        limit: maximum number of records to read.
    """

    prefix: str
    first: int
    data: bytes = field(repr=False)
    limit: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the source that the block covers."""
        return len(self.data)

    def numbered_records(self) -> Iterator[NumberedRecord]:
        """The records with their line numbers; blank lines are skipped.

        Raises:
            DataError: with file and line, if a line is not a JSON object.
        """
        lines = ((i, line) for i, line in enumerate(self.data.split(b"\n"), self.first) if line.strip())
        for number, line in islice(lines, self.limit):
            yield _parse_line(line, f"{self.prefix}{number}"), number

    def count(self) -> int:
        """Number of records."""
        lines = sum(1 for line in self.data.split(b"\n") if line.strip())
        return lines if self.limit is None else min(lines, self.limit)


@dataclass(frozen=True)
class ObjectsBlock:
    """Parsed records: those of a JSON array, or of a data set on the hub. Attributes as in JsonLinesBlock."""

    prefix: str
    first: int
    records: list[Any] = field(repr=False)
    size: int
    limit: int | None = None

    def numbered_records(self) -> Iterator[NumberedRecord]:
        """The records with their numbers. Raises DataError if one is not an object."""
        for number, record in enumerate(self.records[: self.limit], self.first):
            yield _check_object(record, f"{self.prefix}{number}"), number

    def count(self) -> int:
        """Number of records."""
        return len(self.records[: self.limit])


@dataclass(frozen=True)
class ArrowBlock:
    """Records of a Parquet file, as a record batch in the Arrow IPC format. Attributes as in JsonLinesBlock."""

    prefix: str
    first: int
    data: bytes = field(repr=False)
    num_records: int
    size: int
    limit: int | None = None

    def numbered_records(self) -> Iterator[NumberedRecord]:
        """The records with their numbers.

        Raises:
            DataError: for values that cannot be read, e.g. text that is not UTF-8.
        """
        import pyarrow

        try:
            with pyarrow.ipc.open_stream(self.data) as stream:
                records = stream.read_all().slice(0, self.limit).to_pylist()
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # OverflowError: a date out of range
            reason = str(error).partition("\n")[0]
            where, what = self.prefix.removesuffix(" row "), f"is not readable from row {self.first} on ({reason})"
            raise DataError(where, what, "check the file") from None
        for number, record in enumerate(records, self.first):
            yield drop_nulls(record), number

    def count(self) -> int:
        """Number of records."""
        return self.num_records if self.limit is None else min(self.num_records, self.limit)


Block = JsonLinesBlock | ObjectsBlock | ArrowBlock


def drop_nulls(record: Record) -> Record:
    """A record of an Arrow table without the nulls inside its columns.

    All objects of an Arrow column have the same keys; the keys that an object did not have are null there.
    """

    def without_nulls(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_nulls(item) for key, item in value.items() if item is not None}
        return [without_nulls(item) for item in value] if isinstance(value, list) else value

    return {column: without_nulls(value) for column, value in record.items()}


def _json_lines_blocks(file: Path) -> Iterator[Block]:
    first = 1
    with file.open("rb") as stream:
        while data := stream.read(BLOCK_BYTES):
            if not data.endswith(b"\n"):
                data += stream.readline()  # a block ends at a line break
            yield JsonLinesBlock(f"{file}:", first, data.removeprefix(_BOM) if first == 1 else data)
            first += data.count(b"\n")


def _json_array_blocks(file: Path) -> Iterator[Block]:
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise _not_utf8(str(file)) from None
    except json.JSONDecodeError as error:
        several = "Extra data" in error.msg
        remedy = (
            'if every line is a list of messages, write {"messages": [...]} on each' if several else "correct the file"
        )
        raise DataError(f"{file}:{error.lineno}", f"is not JSON ({error.msg})", remedy) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or too deep nesting
        raise DataError(str(file), f"is not readable JSON ({_json_error(error)})", "correct the file") from None
    size = file.stat().st_size * BLOCK_RECORDS // max(1, len(records))
    for start in range(0, len(records), BLOCK_RECORDS):
        yield ObjectsBlock(f"{file} row ", start + 1, records[start : start + BLOCK_RECORDS], size)


def _parquet_blocks(file: Path) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    first, size = 1, file.stat().st_size
    try:
        with parquet.ParquetFile(file) as table:
            bytes_per_record = size / max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=BLOCK_RECORDS):
                data, count = _to_ipc(batch), batch.num_rows
                yield ArrowBlock(f"{file} row ", first, data, count, round(bytes_per_record * count))
                first += count
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: invalid UTF-8
        reason = str(error).partition("\n")[0]
        raise DataError(str(file), f"is not a readable Parquet file ({reason})", "check the file") from None


def _to_ipc(batch: Any) -> bytes:
    """A record batch as an Arrow IPC stream."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def _parse_line(line: bytes, where: str) -> Record:
    try:
        return _check_object(json.loads(str(line, "utf-8")), where)
    except UnicodeDecodeError:
        raise _not_utf8(where) from None
    except (ValueError, RecursionError) as error:
        hint = "one complete JSON object per line; the file may be truncated, or not JSON at all"
        raise DataError(where, f"is not JSON ({_json_error(error)})", f"correct the line: {hint}") from None


def _check_object(record: Any, where: str) -> Record:
    if not isinstance(record, dict):
        raise DataError(where, f"a row must be a JSON object, got {type(record).__name__}", "write one object per line")
    return record


def _json_error(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _not_utf8(where: str) -> DataError:
    return DataError(where, "is not UTF-8 text", "convert the file, e.g. with iconv -t UTF-8")


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(str(file), f"cannot be read ({error.strerror})", "check its permissions")


def _file_head(file: Path) -> bytes:
    """Up to 4096 bytes of a file from its first non-blank one, without a byte order mark; empty for a blank file."""
    with file.open("rb") as stream:
        head = stream.read(4096).removeprefix(_BOM).lstrip()
        while not head and (more := stream.read(1 << 20)):
            head = more.lstrip()
    return head[:4096]


def _looks_like_file(path: str) -> bool:
    has_suffix = path.lower().endswith((*_DATA_SUFFIXES, *_OTHER_SUFFIXES))
    return has_suffix or path.startswith(("/", "./", "../", "~")) or path.count("/") != 1


def _has_data_suffix(name: str) -> bool:
    """Whether a file is data by its name. Compressed data counts, so that it is reported instead of ignored."""
    name = name.lower()
    return name.removesuffix(".gz").removesuffix(".zst").removesuffix(".zip").endswith(_DATA_SUFFIXES)


def _expand(path: str) -> list[Path]:
    root = local_path(path)
    if root.is_dir():
        files = sorted(p for p in root.rglob("*") if p.is_file() and _has_data_suffix(p.name))
        if not files:
            raise DataError(path, "the folder contains no .jsonl, .json or .parquet file", "name the files, or a glob")
        return files
    if root.exists():
        return [root]
    if is_glob(path):
        base = Path(root.anchor) if root.is_absolute() else Path()
        files = sorted(p for p in base.glob(str(root.relative_to(root.anchor) if root.anchor else root)) if p.is_file())
        if files:
            return files
        raise DataError(path, "matches no file", "check the pattern; it is relative to the working directory")
    raise _no_such_file(path, root)


def _no_such_file(path: str, root: Path) -> DataError:
    near = sorted(p.name for p in root.parent.glob("*") if p.suffix in _DATA_SUFFIXES) if root.parent.is_dir() else []
    if guess := closest(root.name, near):
        remedy = f"did you mean {root.parent / guess}?"
    elif near:
        remedy = f"{root.parent} contains {', '.join(near[:5])}{' …' if len(near) > 5 else ''}"
    else:
        remedy = "check the path; it is relative to the working directory"
    return DataError(path, "no such file", remedy)


def _links(folder: Path, pattern: tuple[str, ...]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The symbolic links that match the beginning of a pattern, each with the rest of the pattern."""
    for end in range(1, len(pattern) + 1):
        found = folder.glob("/".join(pattern[:end]))
        yield from ((entry, pattern[end:]) for entry in found if entry.is_symlink())


def _link_leads_to(link: Path, pattern: tuple[str, ...], files: Sequence[Path]) -> bool:
    target = Path(os.path.realpath(link))
    return any(target in (file, *file.parents) and _matches(pattern, file.relative_to(target).parts) for file in files)


def _matches(pattern: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] == "**":
        return _matches(pattern[1:], parts) or _matches(pattern, parts[1:])
    return fnmatchcase(parts[0], pattern[0]) and _matches(pattern[1:], parts[1:])

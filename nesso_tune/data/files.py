"""Reading rows from local files: JSON lines, JSON arrays and Parquet, with the place of every row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nesso_tune.errors import DataError
from nesso_tune.recipes.names import closest
from nesso_tune.recipes.shipped import local_path

SUFFIXES = (".jsonl", ".json", ".parquet", ".ndjson")
TABLES = (".csv", ".tsv", ".xlsx", ".xls", ".ods")
TO_LINES = (
    "make JSON lines of it, e.g. python -c \"import pandas; pandas.read_csv('{file}').to_json('{stem}.jsonl', "
    "orient='records', lines=True)\""
)
GLOB = frozenset("*?[")
GZIP, ZIP, ZSTD = b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd"
Located = tuple[dict[str, Any], str]  # a row and where it stands (`file:line`)


def is_local(path: str) -> bool:
    """Whether a source's path means files here, not a data set on the hub."""
    return local_path(path).exists() or bool(GLOB & set(path)) or _looks_like_a_file(path)


def looks_like_data(path: str) -> bool:
    """Whether a word on the command line can only mean data: a file of rows, or a pattern."""
    return bool(GLOB & set(path)) or _holds_rows(path) or path.lower().endswith(TABLES)


def _looks_like_a_file(path: str) -> bool:
    named = path.lower().endswith((*SUFFIXES, ".gz", ".csv", ".tsv", ".txt", ".zst", ".zip", ".yaml", ".arrow"))
    return named or path.startswith(("/", "./", "../", "~")) or path.count("/") != 1


def _holds_rows(name: str) -> bool:
    """Whether a file in a folder is data; compressed data is too, so that it is not passed over in silence."""
    name = name.lower()
    return name.removesuffix(".gz").removesuffix(".zst").removesuffix(".zip").endswith(SUFFIXES)


def expand(path: str) -> list[Path]:
    """The files that a path, folder or glob means, in a fixed order.

    Raises:
        DataError: if there are none.
    """
    root = local_path(path)
    if root.is_dir():
        files = sorted(p for p in root.rglob("*") if p.is_file() and _holds_rows(p.name))
        if not files:
            raise DataError(path, "the folder holds no .jsonl, .json or .parquet file", "name the files, or a glob")
        return files
    if root.exists():
        return [root]
    if GLOB & set(path):
        base = Path(root.anchor) if root.is_absolute() else Path()
        files = sorted(p for p in base.glob(str(root.relative_to(root.anchor) if root.anchor else root)) if p.is_file())
        if files:
            return files
        raise DataError(path, "matches no file", "check the pattern; it is relative to the working directory")
    near = sorted(p.name for p in root.parent.glob("*") if p.suffix in SUFFIXES) if root.parent.is_dir() else []
    if guess := closest(root.name, near):
        remedy = f"did you mean {root.parent / guess}?"
    elif near:
        remedy = f"{root.parent} has {', '.join(near[:5])}{' …' if len(near) > 5 else ''}"
    else:
        remedy = "check the path; it is relative to the working directory"
    raise DataError(path, "no such file", remedy)


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


def is_lines(file: Path) -> bool:
    """Whether a file is named as JSON lines."""
    return file.suffix.lower() in (".jsonl", ".ndjson")


def count_lines(files: list[Path]) -> int:
    """Lines of all files that are not blank."""
    count = 0
    for file in files:
        with file.open("rb") as stream:
            count += sum(1 for line in stream if not line.isspace())
    return count


def is_array(file: Path) -> bool:
    """Whether a file holds one JSON array, whatever its name says."""
    with file.open("rb") as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def read_rows(file: Path) -> Iterator[Located]:
    """Every row of a file.

    Raises:
        DataError: with file and line of what is not a row.
    """
    if file.suffix.lower() == ".parquet":
        yield from _parquet(file)
        return
    if file.suffix.lower() in TABLES:
        raise DataError(str(file), f"{file.suffix} files are not read", TO_LINES.format(file=file, stem=file.stem))
    with file.open("rb") as stream:
        head = stream.read(4096)
    if head.startswith((GZIP, ZIP, ZSTD)):
        raise DataError(str(file), "is compressed", "unpack it first (gunzip, unzip, zstd -d)")
    if not head.removeprefix(b"\xef\xbb\xbf").strip():
        raise DataError(str(file), "is empty", "give a file with rows, or remove the source")
    if is_array(file):
        yield from _array(file)
    else:
        yield from _lines(file)


def _lines(file: Path) -> Iterator[Located]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                raise DataError(where, "is not UTF-8 text", "convert the file, e.g. with iconv -t UTF-8") from None
            except (ValueError, RecursionError) as error:
                hint = "one whole JSON object per line; the file may be cut short, or not JSON at all"
                raise DataError(where, f"is not JSON ({_reason(error)})", f"correct the line: {hint}") from None
            yield _object(row, where), where


def _array(file: Path) -> Iterator[Located]:
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
    for i, row in enumerate(rows):
        where = f"{file} row {i + 1}"
        yield _object(row, where), where


def _parquet(file: Path) -> Iterator[Located]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield without_nulls(row), f"{file} row {number}"
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        what = str(error).partition("\n")[0]
        raise DataError(str(file), f"is not a readable Parquet file ({what})", "check the file") from None


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

"""How a data file is written, found from its bytes rather than its name, and reading it in blocks of records.

Text may be compressed, and in UTF-16; it is decompressed and converted while it is read. Only a table of text (CSV,
TSV) needs its suffix, because any text could be one.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
import zlib
from codecs import getincrementaldecoder
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, Literal

from nesso_tune.data.blocks import BLOCK_BYTES, Block, LocatedRecord, with_locations
from nesso_tune.data.files import COMPRESSED_SUFFIXES, TABLE_SUFFIXES, is_data_name, unreadable
from nesso_tune.data.json_files import (
    array_blocks,
    classify,
    line_blocks,
    object_blocks,
    split_names,
    wrapped_blocks,
)
from nesso_tune.data.remedies import python, quoted
from nesso_tune.data.tables import (
    TableFormat,
    arrow_blocks,
    csv_blocks,
    excel_blocks,
    find_table_format,
    looks_like_table,
    parquet_blocks,
)
from nesso_tune.errors import DataError, first_line, shortened
from nesso_tune.logs import logger

LINES_SUFFIXES = (".jsonl", ".ndjson")
Kind = Literal["lines", "array", "objects", "wrapped", "table", "excel", "parquet", "arrow", "arrow_stream"]
Compression = Literal["gzip", "bz2", "xz", "zstd", "lz4"]

_HEAD_BYTES = 4096
_WEB_REMEDY = "download the file itself (on a hub, /resolve/ instead of /blob/), or save its table as CSV UTF-8"
_COMPRESSED: dict[bytes, Compression] = {
    b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4",
}  # fmt: skip
_ENCODINGS = {  # by byte order mark, or by a first ASCII character
    b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
    b"{\x00": "utf-16-le", b"[\x00": "utf-16-le", b"\x00{": "utf-16-be", b"\x00[": "utf-16-be",
}  # fmt: skip
_BINARY: dict[bytes, Kind] = {
    b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow_stream", b"\xd0\xcf\x11\xe0": "excel",
}  # fmt: skip
_ARCHIVES = {b"7z\xbc\xaf": "7z x {file} -o{folder}", b"Rar!": "unrar x {file} {folder}/"}
_NOT_DATA = {  # the beginning of a text, in lower case: what it is, and what to do
    b"<!doctype html": ("is a web page", _WEB_REMEDY), b"<html": ("is a web page", _WEB_REMEDY),
    b"version https://git-lfs": ("is a pointer to a file in Git LFS", "fetch the file: git lfs pull"),
    b"%pdf": ("is a PDF document", "extract its texts, and write them as JSON lines"),
}  # fmt: skip
_ZIP, _BOM = b"PK\x03\x04", b"\xef\xbb\xbf"
_SPREADSHEET_PARTS = ("xl/workbook.xml", "xl/workbook.bin", "content.xml")
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class FileFormat:
    """How a data file is written.

    Attributes:
        kind: what it holds.
        compression: how it is compressed; None if it is not.
        encoding: Python's name of the encoding of its text.
        table: how its table of text is written; None for other kinds.
    """

    kind: Kind
    compression: Compression | None = None
    encoding: str = "utf-8"
    table: TableFormat | None = None


def file_format(file: Path) -> FileFormat:
    """How a file is written.

    Raises:
        DataError: if it cannot be read, is empty, or is of a kind that is not supported.
    """
    try:
        status = file.stat()
        return _file_format(file, status.st_mtime_ns, status.st_size, status.st_ino)
    except OSError as error:
        raise unreadable(file, error) from None


def file_blocks(
    file: Path, name: str | None = None, split: str = "train", text_columns: Collection[str] = (), quiet: bool = False
) -> Iterator[Block]:
    """The blocks of a file.

    Args:
        file: the file.
        name: its name in locations and messages; its path by default.
        split: the split to read of a JSON object with a list of rows for each split.
        text_columns: columns of a table that hold texts, even if these are JSON.
        quiet: gives no messages, which name the file.

    Raises:
        DataError: if its kind is not supported, or it is damaged.
    """
    name, say = name or str(file), (lambda text: None) if quiet else _say_once
    found = file_format(file)
    try:
        if found.kind == "parquet":
            yield from parquet_blocks(file, name)
        elif found.kind in ("arrow", "arrow_stream"):
            yield from arrow_blocks(file, name, is_stream=found.kind == "arrow_stream")
        elif found.kind == "excel":
            yield from excel_blocks(file, name, text_columns, say)
        elif found.table is not None:
            if found.table.encoding != "utf-8":
                say(f"{name}: read as {found.table.encoding} text")
            yield from csv_blocks(partial(_open_text, file, found), found.table, name, text_columns)
        else:
            with _open_text(file, found, as_utf8=True) as stream:
                yield from _json_blocks(stream, name, found.kind, split)
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(file, error) from None
        raise DataError(name, f"is damaged ({first_line(error)})", "download or compress it again") from None
    except UnicodeDecodeError:
        raise DataError(name, f"is not {found.encoding} text", "save it as UTF-8 in the program it is from") from None


def read_records(file: Path) -> Iterator[LocatedRecord]:
    """All records of a file with their locations. Raises DataError as `file_blocks` does."""
    return with_locations(file_blocks(file))


def is_json_lines(file: Path) -> bool:
    """Whether a file is plain JSON lines, so that it can be read from any line on."""
    return file_format(file) == FileFormat("lines")


def has_splits(file: Path) -> bool:
    """Whether a file may hold several splits: one JSON object with a list of rows for each."""
    return file_format(file).kind == "wrapped"


def splits_in(file: Path) -> list[str]:
    """The splits that a file holds; empty if it holds none."""
    found = file_format(file)
    if found.kind != "wrapped":
        return []
    with _open_text(file, found, as_utf8=True) as stream:
        return split_names(stream, str(file))


def count_lines(files: list[Path]) -> int:
    """Number of non-blank lines of all files."""
    count = 0
    for file in files:
        with file.open("rb") as stream:
            count += sum(1 for line in stream if not line.isspace())
    return count


def _json_blocks(stream: TextStream, name: str, kind: Kind, split: str) -> Iterator[Block]:
    if kind == "wrapped":
        return wrapped_blocks(stream, name, split)
    read = {"array": array_blocks, "objects": object_blocks}.get(kind, line_blocks)
    return read(stream, name)


@lru_cache(maxsize=1024)
def _file_format(file: Path, modified_ns: int, size: int, inode: int) -> FileFormat:
    with file.open("rb") as raw:
        head = raw.read(_HEAD_BYTES)
    _check_not_archive(head, file)
    if file.suffix.lower() == ".parquet" and b"\0" in head:
        return FileFormat("parquet")  # pyarrow says what is wrong with a damaged one
    for magic, kind in _BINARY.items():
        if head.startswith(magic):
            return FileFormat(kind)
    if head.startswith(_ZIP):
        return FileFormat("excel")  # other archives are refused above
    compression = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
    found = FileFormat("lines", compression)
    if compression is not None:
        head = _decompressed_head(file, found)
    encoding = next((name for magic, name in _ENCODINGS.items() if head.startswith(magic)), "utf-8")
    if encoding == "utf-8" and b"\0" in head:
        what = "is a binary file of a kind that is not read, or UTF-16 text without a byte order mark"
        raise DataError(str(file), what, "export it as JSON lines, CSV UTF-8 or Parquet from the program it is from")
    return _text_format(file, FileFormat("lines", compression, encoding))


def _text_format(file: Path, found: FileFormat) -> FileFormat:
    """The format of a text file whose compression and encoding are known."""
    try:
        with _open_text(file, found, as_utf8=True) as stream:
            start = stream.read(_HEAD_BYTES).lstrip()
            while not start and (more := stream.read(BLOCK_BYTES)):
                start = more.lstrip()
        if not start:
            raise DataError(str(file), "is empty", "give a file with rows, or remove the source")
        for beginning, fault in _NOT_DATA.items():
            if start.lower().startswith(beginning):
                raise DataError(str(file), *fault)
        if start[:1] in (b"{", b"["):
            with _open_text(file, found, as_utf8=True) as stream:
                kind = classify(stream, str(file), _stem(file).endswith(LINES_SUFFIXES))
                return FileFormat(kind, found.compression, found.encoding)
        if _stem(file).endswith(TABLE_SUFFIXES):
            table = find_table_format(partial(_open_text, file, found), str(file), found.encoding)
            return FileFormat("table", found.compression, found.encoding, table)
    except _DAMAGED as error:
        raise DataError(str(file), f"is damaged ({first_line(error)})", "download or compress it again") from None
    except UnicodeDecodeError:
        raise DataError(str(file), f"is not {found.encoding} text", "save it as UTF-8") from None
    _check_named_as_text(file, str(start, "utf-8", "replace"))
    return found  # each line says what is wrong with it


def _check_named_as_text(file: Path, start: str) -> None:
    """Raises DataError for a table of text with another suffix than one of a table, and for plain text."""
    stem = file.with_name(file.name.partition(".")[0])
    if looks_like_table(start[: start.rfind("\n") + 1] or start):
        remedy = f"rename it: mv {quoted(file)} {quoted(f'{stem}.csv')}"
        raise DataError(f"{file}:1", "is not JSON; it looks like a table of text", remedy)
    if not _stem(file).endswith((*LINES_SUFFIXES, ".json")):
        command = python(f"import json; print(json.dumps({{'text': open({str(file)!r}).read()}}))")
        remedy = f"to train on it as one text, set format: completion and write it as JSON, e.g. {command}"
        raise DataError(f"{file}:1", "is plain text", f"{remedy} > {quoted(f'{stem}.jsonl')}")


def _stem(file: Path) -> str:
    """The name of a file without the suffix of its compression, in lower case."""
    name = file.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _decompressed_head(file: Path, found: FileFormat) -> bytes:
    try:
        with _open_text(file, found) as stream:
            head = stream.read(_HEAD_BYTES)
    except _DAMAGED as error:
        raise DataError(str(file), f"is damaged ({first_line(error)})", "download or compress it again") from None
    _check_not_archive(head, file)
    if head.startswith((*_BINARY, *_COMPRESSED, _ZIP)):
        remedy = f"decompress it first, e.g. {python(_decompress_code(file, found))}"
        raise DataError(str(file), "is a compressed file of another binary kind", remedy)
    return head


def _decompress_code(file: Path, found: FileFormat) -> str:
    target = file.with_suffix("") if file.suffix.lower() in COMPRESSED_SUFFIXES else file.with_name(f"{file.name}.out")
    opener = {"gzip": "gzip.open", "bz2": "bz2.open", "xz": "lzma.open"}.get(str(found.compression))
    name = repr(str(file))
    source = f"{opener}({name})" if opener else f"pyarrow.input_stream({name}, compression='{found.compression}')"
    module = opener.partition(".")[0] if opener else "pyarrow"
    return f"import {module}, shutil; shutil.copyfileobj({source}, open({str(target)!r}, 'wb'))"


def _check_not_archive(head: bytes, file: Path) -> None:
    """Raises DataError for an archive, which may hold any files."""
    folder = file.with_name(file.name.partition(".")[0])
    command = next((command for magic, command in _ARCHIVES.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        command = "python -m tarfile -e {file} {folder}"
    elif head.startswith(_ZIP):
        names = _names_in_zip(file)
        if not set(_SPREADSHEET_PARTS).isdisjoint(names):
            return
        if names and not any(is_data_name(name) for name in names):
            what = f"is an archive without data files (it has {', '.join(map(shortened, names[:3]))})"
            raise DataError(str(file), what, "export it as JSON lines, CSV UTF-8 or Parquet")
        command = "python -m zipfile -e {file} {folder}"
    if command is not None:
        remedy = f"unpack it and name the folder: {command.format(file=quoted(file), folder=quoted(folder))}"
        raise DataError(str(file), "is an archive of files", remedy)


def _names_in_zip(file: Path) -> list[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return []


class TextStream(BufferedReader):
    """The decompressed bytes of a text file."""

    def __init__(self, raw: Any, file: BinaryIO) -> None:
        super().__init__(raw, BLOCK_BYTES)
        self._file = file

    def position(self) -> int:
        """Bytes of the file that were read, compressed ones if it is compressed."""
        return self._file.tell()


@contextmanager
def _open_text(file: Path, found: FileFormat, as_utf8: bool = False) -> Iterator[TextStream]:
    """Opens a text file: decompressed, and with `as_utf8` in UTF-8 without a byte order mark."""
    with file.open("rb", buffering=0) as raw:
        source = raw if found.compression is None else _DECOMPRESS[found.compression](BufferedReader(raw))
        converts = as_utf8 and found.encoding != "utf-8"
        stream = TextStream(_Utf8(source, found.encoding) if converts else source, raw)
        if as_utf8 and stream.peek(len(_BOM)).startswith(_BOM):
            stream.read(len(_BOM))
        yield stream


def _arrow_stream(compression: str) -> Callable[[Any], Any]:
    def opened(raw: Any) -> Any:
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), compression)

    return opened


_DECOMPRESS: dict[Compression, Callable[[Any], Any]] = {
    "gzip": lambda raw: gzip.GzipFile(fileobj=raw),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": _arrow_stream("zstd"),
    "lz4": _arrow_stream("lz4"),
}


class _Utf8(RawIOBase):
    """The text of a stream in UTF-8."""

    def __init__(self, source: Any, encoding: str) -> None:
        self._source, self._decode = source, getincrementaldecoder(encoding)().decode
        self._pending = b""

    def readable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer with converted bytes; 0 at the end."""
        while not self._pending:
            data = self._source.read(BLOCK_BYTES)
            self._pending = self._decode(data, not data).encode("utf-8", "surrogatepass")
            if not data:
                break
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count


@lru_cache(maxsize=1024)
def _say_once(text: str) -> None:
    logger.info(text)

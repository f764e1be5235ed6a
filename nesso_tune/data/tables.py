"""Tables in blocks: CSV and TSV (delimiter, quoting and encoding are found), spreadsheets, Parquet and Arrow."""

from __future__ import annotations

import csv
import re
import zipfile
from codecs import getincrementaldecoder
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from nesso_tune.data.blocks import (
    BLOCK_BYTES,
    BLOCK_RECORDS,
    ArrowBlock,
    Block,
    TableBlock,
    is_text_column,
    not_utf8,
    parse_cell,
)
from nesso_tune.data.json_files import MAX_ROW_BYTES, ByteStream
from nesso_tune.data.remedies import python
from nesso_tune.errors import DataError, first_line, shortened

EXCEL_INSTALL = "pip install 'nesso-tune[excel]'"
_DELIMITERS = ",;\t|"
_ODD_DELIMITER = re.compile(r"\w+([^\w\s.,;|\"'$\\`-])\w+(?:\1\w+)*")  # in a header of one column
_MAX_NAME = 60  # characters of the name of a column
_SAMPLE_ROWS = 1000  # of these, from which the delimiter is found
_SAMPLE_BYTES = 1 << 20  # from which delimiter, quoting and JSON columns are found
_MAX_SHEET_BYTES = 1 << 30  # of a spreadsheet, decompressed: it is read into memory
_UNDEFINED_IN_CP1252 = frozenset(b"\x81\x8d\x8f\x90\x9d")
_QUOTES_REMEDY = "quote fields that contain the delimiter, a quote or a line break, and double the quotes inside them"
_HEADER_REMEDY = "the first line must name the columns; remove the lines above it"

NumberedCells = tuple[int, list[str]]  # the number of a row, and its cells
OpenText = Callable[[], AbstractContextManager[ByteStream]]


@dataclass(frozen=True)
class TableFormat:
    """How a text table is written.

    Attributes:
        encoding: Python's name of the encoding.
        delimiter: the character between fields.
        quoted: whether fields may be quoted.
    """

    encoding: str
    delimiter: str
    quoted: bool = True

    def read(self, lines: Iterator[str]) -> Any:
        """A `csv.reader`; it raises `csv.Error` for wrong quoting."""
        csv.field_size_limit(MAX_ROW_BYTES)
        if self.quoted:
            return csv.reader(lines, delimiter=self.delimiter, strict=True)
        return csv.reader(lines, delimiter=self.delimiter, quoting=csv.QUOTE_NONE)


def csv_blocks(open_text: OpenText, table: TableFormat, name: str, text_columns: Collection[str]) -> Iterator[Block]:
    """The blocks of a text table. The location of a record is the line on which it begins.

    Args:
        open_text: opens the decompressed bytes.
        table: how it is written.
        name: name of the file.
        text_columns: columns that hold texts, even if these are JSON.

    Raises:
        DataError: with the line, if it is damaged.
    """
    with open_text() as stream:
        rows = _csv_rows(stream, table, name)
        yield from _table_blocks(rows, f"{name}:", text_columns, stream.position)


def find_table_format(open_text: OpenText, name: str, encoding: str) -> TableFormat:
    """The encoding, delimiter and quoting of a text table. Reads all of it to find the encoding.

    Args:
        open_text: opens the decompressed bytes.
        name: name of the file.
        encoding: the encoding by its byte order mark; `utf-8` if it has none.

    Raises:
        DataError: if the encoding is unknown.
    """
    with open_text() as stream:
        if encoding == "utf-8":
            encoding = _find_encoding(stream, name)
    with open_text() as stream:
        sample = str(stream.read(_SAMPLE_BYTES), encoding, "replace")
    return TableFormat(encoding, *find_delimiter(sample))


def find_delimiter(sample: str) -> tuple[str, bool]:
    """The delimiter of a text table, and whether its fields may be quoted.

    The delimiter is the one that gives most rows as many fields as the header, and at least two; a comma if there is
    none. Fields between tabs are not quoted where their quotes are no valid quoting.
    """
    if sample.startswith("sep=") and len(sample) > 4:  # a line that Excel writes and reads
        return sample[4], True
    lines = sample.splitlines(keepends=True)
    best, chosen = (0.0, 0), (",", True)
    for delimiter in _DELIMITERS:
        for quoted in (True, False) if delimiter == "\t" else (True,):
            sizes, is_valid = _row_sizes(TableFormat("utf-8", delimiter, quoted), lines, sample)
            if not sizes or sizes[0] < 2:
                continue
            score = ((1.0 if is_valid else 0.99) * sum(size == sizes[0] for size in sizes) / len(sizes), sizes[0])
            if score > best:
                best, chosen = score, (delimiter, quoted)
    return chosen


def looks_like_table(text: str) -> bool:
    """Whether a text without the suffix of a table may be one: all rows have as many fields, the header names."""
    table = TableFormat("utf-8", *find_delimiter(text))
    sizes, _ = _row_sizes(table, text.splitlines(keepends=True), text)
    header = text.partition("\n")[0].split(table.delimiter)
    named = all(any(map(str.isalpha, name)) and len(name) <= _MAX_NAME for name in header)
    return named and len(header) > 1 and len(sizes) > 1 and set(sizes) == {len(header)}


def _row_sizes(table: TableFormat, lines: Sequence[str], sample: str) -> tuple[list[int], bool]:
    """The fields of each row of a sample, and whether its quoting is valid.

    The end of the sample can cut a row, which is left out. It explains invalid quoting if this row began not much
    earlier: after a stray quote, all that follows seems to be one row.
    """
    is_cut = len(sample) >= _SAMPLE_BYTES // 4  # characters of up to four bytes
    rows, sizes = table.read(iter(lines)), []
    done = longest = 0  # lines of complete rows, and of the longest of them
    try:
        for row in islice(rows, _SAMPLE_ROWS):
            sizes += [len(row)] if any(row) else []
            longest, done = max(longest, rows.line_num - done), rows.line_num
    except csv.Error:
        return sizes, is_cut and rows.line_num == len(lines) and len(lines) - done <= 2 * longest
    return (sizes[:-1] if is_cut and len(sizes) > 1 else sizes), True


def excel_blocks(file: Path, name: str, text_columns: Collection[str], say: Callable[[str], None]) -> Iterator[Block]:
    """The blocks of the first sheet of a spreadsheet that has rows. The location of a record is the row of the sheet.

    Args:
        file: the file.
        name: its name in messages.
        text_columns: columns that hold texts, even if these are JSON.
        say: receives a message about other sheets, which are not read.

    Raises:
        DataError: if python-calamine is not installed, or the file is damaged.
    """
    try:
        import python_calamine
    except ImportError:
        raise DataError(
            name, "is a spreadsheet, which needs the package python-calamine",
            f"{EXCEL_INSTALL}, or save it as CSV UTF-8 from the spreadsheet program",
        ) from None  # fmt: skip
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if sum(part.file_size for part in archive.infolist()) > _MAX_SHEET_BYTES:
                raise DataError(name, f"holds more than {_MAX_SHEET_BYTES >> 20} MB", "save it as CSV UTF-8")
    try:
        book = python_calamine.CalamineWorkbook.from_path(str(file))
        sheets = {sheet: book.get_sheet_by_name(sheet).to_python(skip_empty_area=False) for sheet in book.sheet_names}
    except (python_calamine.CalamineError, OSError, ValueError) as error:
        raise DataError(name, f"is not a readable spreadsheet ({first_line(error)})", "save it as CSV UTF-8") from None
    filled = [sheet for sheet, cells in sheets.items() if any(map(any, cells))]
    if len(filled) > 1:
        say(f"{name}: reads sheet {filled[0]}, not {', '.join(filled[1:])}; save other sheets as files of their own")
    cells = sheets[filled[0]] if filled else []
    rows = iter([(i, [_cell_text(cell) for cell in row]) for i, row in enumerate(cells, 1) if any(map(_has_text, row))])
    size = file.stat().st_size
    yield from _table_blocks(rows, f"{name} row ", text_columns, lambda: size)


def parquet_blocks(file: Path, name: str) -> Iterator[Block]:
    """The blocks of a Parquet file. Raises DataError if it is damaged."""
    import pyarrow
    from pyarrow import parquet

    size = file.stat().st_size
    try:
        with parquet.ParquetFile(file) as table:
            bytes_per_record = size / max(1, table.metadata.num_rows)
            yield from _arrow_blocks(table.iter_batches(batch_size=BLOCK_RECORDS), name, bytes_per_record)
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: invalid UTF-8
        raise DataError(name, f"is not a readable Parquet file ({first_line(error)})", "check the file") from None


def arrow_blocks(file: Path, name: str, is_stream: bool) -> Iterator[Block]:
    """The blocks of an Arrow IPC file (Feather), or of a stream, as `datasets` saves. Raises DataError if damaged."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(file)) as source:
            if is_stream:
                yield from pyarrow.ipc.open_stream(source)
                return
            reader = pyarrow.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))

    try:
        yield from _arrow_blocks(batches(), name)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(name, f"is not a readable Arrow file ({first_line(error)})", "check the file") from None


def _csv_rows(stream: ByteStream, table: TableFormat, name: str) -> Iterator[NumberedCells]:
    """The rows of a text table that are not blank, each with the number of its first line."""
    text = TextIOWrapper(cast(BinaryIO, stream), table.encoding, "surrogateescape", newline="")
    first, width = 1, 0
    reader = table.read(_checked_lines(text, name))
    try:
        for cells in reader:
            number, first = first, reader.line_num + 1
            if number == 1:
                cells[:1] = [cell.removeprefix("\ufeff") for cell in cells[:1]]
                if cells and cells[0].startswith("sep="):
                    continue
            if not any(cell.strip() for cell in cells):
                continue
            if not width:
                _check_delimiter(cells, name, table.encoding)
            width = width or len(cells)
            if len(cells) != width:
                what = f"has {len(cells)} fields between `{_shown(table.delimiter)}`, the header has {width}"
                raise DataError(f"{name}:{number}", what, _HEADER_REMEDY if width == 1 else _QUOTES_REMEDY)
            yield number, cells
    except csv.Error as error:
        raise DataError(f"{name}:{first}", f"is not a row of a table ({error})", _QUOTES_REMEDY) from None
    finally:
        with suppress(ValueError):  # after an error, the file is closed already
            text.detach()  # it would close the file


def _check_delimiter(header: Sequence[str], name: str, encoding: str) -> None:
    """Raises DataError for a header of one column that holds a delimiter which is not looked for."""
    found = _ODD_DELIMITER.fullmatch(header[0].strip()) if len(header) == 1 else None
    if found is None:
        return
    rows = f"csv.reader(open({name!r}, newline='', encoding='{encoding}'), delimiter='{found[1]}')"
    code = f"import csv; csv.writer(open({f'{name}.csv'!r}, 'w', newline='', encoding='utf-8')).writerows({rows})"
    what = f"has one column, `{shortened(header[0])}`, so its delimiter is not one of , ; tab |"
    raise DataError(f"{name}:1", what, f"write it with commas, e.g. {python(code)}")


def _checked_lines(text: TextIOWrapper, name: str) -> Iterator[str]:
    """The lines of a text. Raises DataError for a line that is too long, or has bytes that are not of its encoding."""
    for number in count(1):
        if not (line := text.readline(MAX_ROW_BYTES)):
            return
        if len(line) == MAX_ROW_BYTES:
            what = f"a line is longer than {MAX_ROW_BYTES >> 20} MB"
            raise DataError(f"{name}:{number}", what, "check whether the file is damaged")
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError:
                raise not_utf8(f"{name}:{number}") from None
        yield line


def _shown(delimiter: str) -> str:
    return "tab" if delimiter == "\t" else delimiter


def _find_encoding(stream: ByteStream, name: str) -> str:
    """UTF-8, or Windows-1252 for a text that is not UTF-8 and whose bytes are all defined there.

    A text with more valid UTF-8 sequences than invalid bytes is damaged UTF-8.
    """
    decode = getincrementaldecoder("utf-8")("surrogateescape").decode
    valid = invalid = 0
    undefined: set[int] = set()
    while data := stream.read(BLOCK_BYTES):
        if data.isascii():
            continue
        text = decode(data)
        bad = [ord(char) & 0xFF for char in text if "\udc80" <= char <= "\udcff"]
        invalid += len(bad)
        valid += sum(char > "\x7f" for char in text) - len(bad)
        undefined |= _UNDEFINED_IN_CP1252.intersection(data)
    if invalid <= valid:
        return "utf-8"
    if undefined:
        raise DataError(name, "is neither UTF-8 nor Windows-1252 text", "save it as UTF-8 in the program it is from")
    return "cp1252"


def _table_blocks(
    rows: Iterator[NumberedCells], prefix: str, text_columns: Collection[str], position: Callable[[], int]
) -> Iterator[Block]:
    """The blocks of rows, the first of which is the header."""
    name = prefix.removesuffix(":").removesuffix(" row ")
    header = next(rows, None)
    if header is None:
        return
    if len(header[1]) > 2 and sum(map(_has_text, header[1])) == 1:
        raise DataError(f"{prefix}{header[0]}", "is a title, not the names of the columns", _HEADER_REMEDY)
    columns = tuple(cell.strip() or f"column {i}" for i, cell in enumerate(header[1], 1))
    _check_columns(columns, name)
    sample = list(islice(rows, BLOCK_RECORDS))
    json_columns = tuple(
        i for i, column in enumerate(columns)
        if _is_json_column([cells[i] for _, cells in sample], column in text_columns or is_text_column(column))
    )  # fmt: skip
    block: list[NumberedCells] = []
    length = done = 0
    for number, cells in chain(sample, rows):
        block.append((number, cells))
        length += sum(map(len, cells))
        if length >= BLOCK_BYTES or len(block) == BLOCK_RECORDS:
            size, done = position() - done, position()
            yield TableBlock(prefix, columns, json_columns, block, size)
            block, length = [], 0
    if block:
        yield TableBlock(prefix, columns, json_columns, block, position() - done)


def _check_columns(columns: Sequence[str], name: str) -> None:
    """Raises DataError if two columns have the same name: one of them would be lost."""
    if len(set(columns)) < len(columns):
        twice = next(column for i, column in enumerate(columns) if column in columns[:i])
        raise DataError(name, f"has two columns `{shortened(twice)}`", "rename one of them")


def _is_json_column(cells: Sequence[str], is_text: bool) -> bool:
    """Whether all cells are empty or JSON lists or objects; in a column of texts, messages.

    An answer may be JSON too, so in a column of texts only messages are taken for JSON.
    """
    filled = [cell for cell in cells if cell.strip()]
    if not filled or not all(cell.lstrip().startswith(("[", "{")) for cell in filled):
        return False
    values = [parse_cell(cell) for cell in filled]
    if not all(isinstance(value, (list, dict)) for value in values):
        return False
    return not is_text or all(map(_is_of_messages, values))


def _is_of_messages(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_of_messages, value))
    return isinstance(value, dict) and any(isinstance(value.get(key), str) for key in ("role", "from"))


def _has_text(cell: Any) -> bool:
    return cell is not None and str(cell).strip() != ""


def _cell_text(cell: Any) -> str:
    """The text of a cell of a spreadsheet: whole numbers without a decimal point, truth values as in JSON."""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return "" if cell is None else str(cell)


def _arrow_blocks(batches: Iterator[Any], name: str, bytes_per_record: float | None = None) -> Iterator[Block]:
    """The blocks of record batches of any size. `bytes_per_record` is by default what they take in memory."""
    first = 1
    for batch in batches:
        _check_columns(batch.schema.names, name)
        for start in range(0, batch.num_rows, BLOCK_RECORDS):
            part = batch.slice(start, BLOCK_RECORDS)
            size = part.nbytes if bytes_per_record is None else round(bytes_per_record * part.num_rows)
            yield ArrowBlock(f"{name} row ", first, _to_ipc(part), part.num_rows, size)
            first += part.num_rows


def _to_ipc(batch: Any) -> bytes:
    """A record batch as an Arrow IPC stream."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())

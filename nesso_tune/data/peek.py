"""The first rows of a source: they decide its format, and show mistakes before anything long has begun."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from nesso_tune.data.formats import DataFormat, Row, choose_format, described, recognise
from nesso_tune.data.guess import guess_fields
from nesso_tune.data.read import Reading, is_selected
from nesso_tune.data.readers import OwnReader, is_reader, load_reader
from nesso_tune.data.sources import source_rows
from nesso_tune.data.tools import read_tool_file
from nesso_tune.errors import DataError
from nesso_tune.recipes.data import CleanSection, Source
from nesso_tune.recipes.shipped import local_path

PEEK = 50  # rows


def reading_of(source: Source, method: str, clean: CleanSection = CleanSection()) -> Reading:  # noqa: B008 - frozen
    """How the rows of a source are to be read, by the first of them that it selects.

    Args:
        source: which.
        method: `sft` wants conversations, `dpo` pairs.
        clean: what is done to what is read.

    Raises:
        DataError: if there are no rows, or they are not of this kind.
    """
    rows = (row for row, _ in source_rows(source))
    first = list(islice((row for row in rows if not source.where or is_selected(row, source)), PEEK))
    tools = read_tool_file(local_path(source.tools_file)) if source.tools_file is not None else ()
    return Reading(source, _format(source, method, first), method, clean, tools)


def _format(source: Source, method: str, rows: Sequence[Row]) -> DataFormat | OwnReader:
    if not rows and source.where and next(source_rows(source), None) is not None:
        asked = ", ".join(f"{column}: {value}" for column, value in source.where.items())
        raise DataError(source.path, f"no row has what `where` asks for ({asked})", "correct it, or remove the source")
    if not rows:
        raise DataError(source.path, "holds no rows", "give a file with rows, or remove the source")
    if is_reader(source.format):
        return load_reader(source.format, source.reads)
    if source.format == "auto" and recognise(source, rows) is None and (guess := guess_fields(rows)) is not None:
        name, keys = guess
        said = ", ".join(f"{key}: {value}" for key, value in {"format": name, **keys}.items())
        raise DataError(
            source.path, f"its format is not recognised (its columns are {described(rows)})",
            f"name its columns, it seems {said.replace(chr(39), '')}",
        )  # fmt: skip
    fmt, field = choose_format(source, rows), source.language_field
    if field is not None and not any(field in row for row in rows):
        columns = sorted({column for row in rows for column in row})
        raise DataError(source.path, f"no column `{field}` (language_field)", f"its columns are {', '.join(columns)}")
    _check_kind(source, method, fmt, rows)
    return fmt


def _check_kind(source: Source, method: str, fmt: DataFormat, rows: Sequence[Row]) -> None:
    wants_pairs = method == "dpo"
    # the dialogue before two answers is no conversation to learn, unless someone names its column on purpose
    before_answers = fmt.kind == "conversation" and source.messages_field is None and _has_pairs(rows)
    if fmt.pairs == wants_pairs and (wants_pairs or not before_answers):
        return
    if wants_pairs:
        raise DataError(
            source.path, "holds conversations, but DPO needs a chosen and a rejected answer",
            "use preference data, or method: sft",
        )  # fmt: skip
    raise DataError(
        source.path, "holds preference pairs, but SFT learns from conversations", "use method: dpo, or another source"
    )


def _has_pairs(rows: Sequence[Row]) -> bool:
    return sum("chosen" in row and "rejected" in row for row in rows) > len(rows) / 2

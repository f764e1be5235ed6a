"""A sample of a source's rows from all over it: files are often sorted, by language or by quality."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nesso_tune.data.blocks import read_rows
from nesso_tune.data.files import expand, is_lines, is_local
from nesso_tune.data.sources import source_rows
from nesso_tune.recipes.data import Source

Row = dict[str, Any]
LARGE = 64_000_000  # bytes from which a file of lines is sampled by place instead of being read
MOST = 200_000  # rows that are read of anything else


def spread_rows(source: Source, count: int) -> list[Row]:
    """About `count` rows at even distances; all of them if there are fewer.

    Raises:
        DataError: if a file cannot be read.
    """
    files = expand(source.path) if is_local(source.path) else []
    if source.max_rows is None and files and all(is_lines(file) and file.stat().st_size > LARGE for file in files):
        share = max(1, count // len(files))
        return [row for file in files for row in _by_place(file, share)]
    rows = [row for row, _ in islice(source_rows(source), MOST)]
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows


def _by_place(file: Path, count: int) -> Iterator[Row]:
    """The rows after evenly spaced bytes of a file of JSON lines; the first comes from its reader, faults and all."""
    yield next(read_rows(file))[0]
    size = file.stat().st_size
    with file.open("rb") as stream:
        for i in range(1, count):
            stream.seek(i * size // count)
            stream.readline()  # the rest of a line
            try:
                row = json.loads(stream.readline())
            except ValueError:  # a faulty row is found when the data is prepared
                continue
            if isinstance(row, dict):
                yield row

"""Where trained rows stand in the files that they were read from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from nesso_tune.data.documents import Documents
from nesso_tune.data.sources import source_rows
from nesso_tune.errors import NessoError
from nesso_tune.recipes.sections import Source


def places(documents: Documents, entries: Sequence[int], sources: Sequence[Source]) -> list[str]:
    """The place of each entry (`file:line`), in the order given; its source is read once more up to there.

    A source that cannot be read any more gives `path row N`, counted over all its files.
    """
    wanted: dict[int, set[int]] = {}
    for entry in entries:
        wanted.setdefault(int(documents.sources[entry]), set()).add(int(documents.rows[entry]))
    found = {(source, row): place for source, rows in wanted.items() for row, place in _found(sources[source], rows)}
    return [found[int(documents.sources[entry]), int(documents.rows[entry])] for entry in entries]


def _found(source: Source, rows: set[int]) -> list[tuple[int, str]]:
    places = {row: f"{source.path} row {row}" for row in rows}
    try:
        for number, (_, where) in enumerate(islice(source_rows(source), max(rows)), 1):
            if number in rows:
                places[number] = where
    except (NessoError, OSError):  # changed or gone since it was prepared: the number is what is known
        pass
    return list(places.items())

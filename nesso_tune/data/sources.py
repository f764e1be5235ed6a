"""A source of rows: files here or a data set on the hub, read alike."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from nesso_tune.data.files import Located, content_hash, count_lines, expand, is_array, is_lines, is_local, read_rows
from nesso_tune.data.formats import load_format
from nesso_tune.data.hub import hub_fingerprint, hub_rows
from nesso_tune.errors import Problem, RecipeError
from nesso_tune.recipes.sections import Source


def source_rows(source: Source) -> Iterator[Located]:
    """The rows of a source, at most `max_rows`."""
    if is_here(source):
        rows: Iterator[Located] = chain.from_iterable(read_rows(file) for file in expand(source.path))
    else:
        rows = hub_rows(source)
    return islice(rows, source.max_rows)


def count_rows(source: Source) -> int:
    """Rows of a source of files: lines of JSON-lines files, else the rows counted one by one."""
    files = expand(source.path)
    lines = all(is_lines(file) and not is_array(file) for file in files)
    count = count_lines(files) if lines else sum(1 for _ in source_rows(source))
    return min(count, source.max_rows or count)


def is_here(source: Source) -> bool:
    """Whether the source is files here. What only the hub knows (subset, revision, split) is then an error.

    Raises:
        RecipeError: for such a key.
    """
    if not is_local(source.path):
        return False
    inert = [knob for knob in ("subset", "revision") if getattr(source, knob) is not None]
    inert += ["split"] if source.split != "train" else []
    if inert:
        raise RecipeError(
            Problem(f"data.sources {source.path}", f"`{knob}` has no effect on local files", "remove it")
            for knob in inert
        )
    return True


def content_of(source: Source) -> list[Any]:
    """What decides the rows of a source: its content, how it is read, and the mapping file it names."""
    fmt = None if source.format == "auto" else load_format(source.format).model_dump(mode="json")
    content = content_hash(expand(source.path)) if is_here(source) else hub_fingerprint(source)
    return [source.model_dump(mode="json", exclude={"weight", "private"}), fmt, content]

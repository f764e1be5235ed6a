"""A source of rows: files here or a data set on the hub, read alike."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from nesso_tune.data.blocks import Block, Located, at_most, file_blocks, located
from nesso_tune.data.files import content_hash, count_lines, expand, is_array, is_lines, is_local
from nesso_tune.data.formats import load_format
from nesso_tune.data.hub import hub_blocks, hub_fingerprint, hub_size
from nesso_tune.data.readers import is_reader, load_reader
from nesso_tune.errors import Problem, RecipeError
from nesso_tune.recipes.data import Source


def source_blocks(source: Source) -> Iterator[Block]:
    """The rows of a source in blocks, at most `max_rows`."""
    if is_here(source):
        blocks: Iterator[Block] = chain.from_iterable(file_blocks(file) for file in expand(source.path))
    else:
        blocks = hub_blocks(source)
    return at_most(blocks, source.max_rows)


def source_rows(source: Source) -> Iterator[Located]:
    """The rows of a source, at most `max_rows`, each with its place."""
    return located(source_blocks(source))


def source_size(source: Source) -> int:
    """Bytes of a source of files, or bytes of a hub data set in memory: what the sizes of its blocks add up to."""
    return sum(file.stat().st_size for file in expand(source.path)) if is_here(source) else hub_size(source)


def count_rows(source: Source) -> int:
    """Rows of a source of files: lines of JSON-lines files, else the rows counted one by one."""
    files = expand(source.path)
    lines = all(is_lines(file) and not is_array(file) for file in files)
    count = count_lines(files) if lines else sum(block.count() for block in source_blocks(source))
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
    """What decides the rows of a source: its content, how it is read, and the files that it names for that."""
    if is_reader(source.format):
        fmt: Any = load_reader(source.format).code
    else:
        fmt = None if source.format == "auto" else load_format(source.format).model_dump(mode="json")
    tools = None if source.tools_file is None else content_hash(expand(source.tools_file))
    content = content_hash(expand(source.path)) if is_here(source) else hub_fingerprint(source)
    settings = source.model_dump(mode="json", exclude={"weight", "private", "alias"})
    settings["rules"] = {code: {**rule, "weight": None} for code, rule in settings["rules"].items()}
    return [settings, fmt, tools, content]

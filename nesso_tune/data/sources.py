"""Reading data sets on the hub, through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from nesso_tune.data.files import (
    BLOCK_RECORDS,
    GLOB_CHARACTERS,
    Block,
    LocatedRecord,
    ObjectsBlock,
    content_hash,
    could_match,
    count_lines,
    drop_nulls,
    expand,
    file_blocks,
    files_under,
    is_json_array,
    is_json_lines,
    is_local,
    limit_records,
    with_locations,
)
from nesso_tune.data.formats import load_format
from nesso_tune.data.user_readers import is_user_reader, load_user_reader
from nesso_tune.errors import DataError, Problem, RecipeError, RunEnvironmentError
from nesso_tune.hub import offline_if_unreachable
from nesso_tune.recipes.builtin import local_path, path_keys, reader_file
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import Source


def hub_fingerprint(source: Source) -> str:
    """Identifies the content of a hub data set at the revision that is in the local cache."""
    return str(_load(source.path, source.subset, source.split, source.revision)._fingerprint)


def hub_blocks(source: Source) -> Iterator[Block]:
    """A hub data set in blocks, with `id row N` as the place of a row.

    Rows are decoded by `datasets`: what it keeps as JSON or in other ways of its own is not in the table as it is.
    """
    rows = _load(source.path, source.subset, source.split, source.revision)
    share = hub_size(source) / max(1, len(rows))
    for start in range(0, len(rows), BLOCK_RECORDS):
        columns = rows[start : start + BLOCK_RECORDS]
        count = min(BLOCK_RECORDS, len(rows) - start)
        decoded = [drop_nulls({name: values[i] for name, values in columns.items()}) for i in range(count)]
        yield ObjectsBlock(f"{source.path} row ", start + 1, decoded, round(share * count))


def hub_size(source: Source) -> int:
    """Bytes of a hub data set in memory."""
    return int(_load(source.path, source.subset, source.split, source.revision).data.nbytes)


def is_cached(source: Source) -> bool:
    """Whether a hub data set is in the local cache. Only to be asked where `HF_HUB_OFFLINE` is set."""
    try:
        _load(source.path, source.subset, source.split, source.revision)
    except (DataError, RunEnvironmentError):
        return False
    return True


@lru_cache(maxsize=8)
def _load(path: str, subset: str | None, split: str, revision: str | None) -> Any:
    """The data set, fetched into the hub's cache unless it is there.

    Raises:
        DataError: if there is no such data set, subset or split.
        RunEnvironmentError: if the hub cannot be reached.
    """
    offline_if_unreachable()
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, name=subset, split=split, revision=revision)
    except DatasetNotFoundError:
        raise DataError(
            path, "no such file here and no such data set on the hub", "check the name; private sets need HF_TOKEN"
        ) from None
    except ValueError as error:  # an unknown subset or split; the message lists those that exist
        raise DataError(path, str(error).splitlines()[0], "correct subset or split") from None
    except (ConnectionError, OSError) as error:
        raise RunEnvironmentError(
            path, f"is not here, and the hub cannot be reached ({type(error).__name__})",
            "check the path, or run `nesso-tune prepare` where there is a network",
        ) from None  # fmt: skip


# Files that a run leaves, as patterns for data may match them.
WRITTEN = ("metrics.jsonl", "data_report.json", "final/config.json", "checkpoint-1/trainer_state.json")


def source_blocks(source: Source) -> Iterator[Block]:
    """The rows of a source in blocks, at most `max_rows`."""
    if is_local_source(source):
        blocks: Iterator[Block] = chain.from_iterable(file_blocks(file) for file in expand(source.path))
    else:
        blocks = hub_blocks(source)
    return limit_records(blocks, source.max_rows)


def source_records(source: Source) -> Iterator[LocatedRecord]:
    """The rows of a source, at most `max_rows`, each with its place."""
    return with_locations(source_blocks(source))


def source_size(source: Source) -> int:
    """Bytes of a source of files, or bytes of a hub data set in memory: what the sizes of its blocks add up to."""
    return sum(file.stat().st_size for file in expand(source.path)) if is_local_source(source) else hub_size(source)


def count_records(source: Source) -> int:
    """Rows of a source of files: lines of JSON-lines files, else the rows counted one by one."""
    files = expand(source.path)
    lines = all(is_json_lines(file) and not is_json_array(file) for file in files)
    count = count_lines(files) if lines else sum(block.count() for block in source_blocks(source))
    return min(count, source.max_rows or count)


def is_local_source(source: Source) -> bool:
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


def check_output(recipe: Recipe) -> None:
    """Raises RecipeError if a run would read what it writes, or its folder holds what it reads. Links are followed."""
    output = Path(recipe.output_dir).resolve()
    for key, path in _read_paths(recipe):
        root = local_path(path)
        several = root.is_dir() or (not root.exists() and GLOB_CHARACTERS & set(path))
        if several and could_match(path, *(output / name for name in WRITTEN)):
            raise RecipeError(
                "output_dir", f"{recipe.output_dir} lies in {key} {path}: the run would read its own files as data",
                "set an output_dir outside of it, or name only the files that are data",
            )  # fmt: skip
        files = expand(path) if several and not root.is_dir() else [root]
        if inside := next((file for file in files if output in (file.resolve(), *file.resolve().parents)), None):
            raise RecipeError(
                key, f"{inside} lies in output_dir {recipe.output_dir}, which is for what the run writes",
                "set another output_dir, or move the file",
            )  # fmt: skip


def _read_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every path here that a run reads besides its base, with its key."""
    data, template = recipe.data, recipe.chat.template
    if template is not None and template.endswith((".yaml", ".yml")):
        yield "chat.template", template
    for i, source in enumerate((*data.sources, *data.validation_sources)):
        key = f"data.sources.{i}" if i < len(data.sources) else f"data.validation_sources.{i - len(data.sources)}"
        if is_local(source.path):
            yield f"{key}.path", source.path
        yield from ((f"{key}.{name}", path) for name, path in _helpers(source))
    if data.clean.decontaminate is not None:
        yield from (("data.clean.decontaminate.files", path) for path in data.clean.decontaminate.files)


def _helpers(source: Source) -> Iterator[tuple[str, str]]:
    """Files that tell how the rows of a source are read."""
    if is_user_reader(source.format):
        yield "format", reader_file(source.format)
    elif source.format.endswith((".yaml", ".yml")):
        yield "format", source.format
    if source.tools_file is not None:
        yield "tools_file", source.tools_file
    yield from (("reads", path) for path in source.reads)


class SourceContent(NamedTuple):
    """What decides the rows of a source.

    Attributes:
        rows: hash of its files, or what identifies a data set of the hub.
        tools, reads: hashes of the files that it names besides.
        fmt: its mapping, or a hash of the reader's code; None where it is detected.
        settings: keys of the recipe that say how it is read.
    """

    rows: str
    tools: str | None
    reads: list[str]
    fmt: Any
    settings: dict[str, Any]


def source_content(source: Source) -> SourceContent:
    """What decides the rows of a source: its content, how it is read, and what is in the files that it names for that.

    What any of these files is called, and where it lies, does not count.
    """
    if is_user_reader(source.format):
        fmt: Any = load_user_reader(source.format, source.reads).code
    else:
        fmt = None if source.format == "auto" else load_format(source.format).model_dump(mode="json")
    tools = None if source.tools_file is None else content_hash(expand(source.tools_file))
    content = content_hash(expand(source.path)) if is_local_source(source) else hub_fingerprint(source)
    read = [content_hash(files_under(path)) for path in source.reads]
    named = {key for (key,) in path_keys(Source)}
    settings = source.model_dump(mode="json", exclude={"weight", "private", "alias", *named})
    settings["rules"] = {code: {**rule, "weight": None} for code, rule in settings["rules"].items()}
    return SourceContent(content, tools, read, fmt, settings)

"""The records of a source, from local files or a data set on the hub, and a hash of everything that decides them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from nesso_tune.data.files import (
    BLOCK_RECORDS,
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
    is_glob,
    is_json_array,
    is_json_lines,
    is_local,
    limit_records,
    with_locations,
)
from nesso_tune.data.formats import load_format
from nesso_tune.data.user_readers import is_user_reader, load_user_reader
from nesso_tune.errors import DataError, Problem, RecipeError, RunEnvironmentError
from nesso_tune.hub import set_offline_if_unreachable
from nesso_tune.recipes.builtin import local_path, path_keys, reader_file
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import Source

# Examples of the files that a run writes, to match data globs against
_RUN_FILES = ("metrics.jsonl", "data_report.json", "final/config.json", "checkpoint-1/trainer_state.json")


def source_records(source: Source) -> Iterator[LocatedRecord]:
    """The records of a source, at most `max_rows`, with their locations."""
    return with_locations(source_blocks(source))


def source_blocks(source: Source) -> Iterator[Block]:
    """The records of a source in blocks, at most `max_rows`."""
    if is_local_source(source):
        blocks: Iterator[Block] = chain.from_iterable(file_blocks(file) for file in expand(source.path))
    else:
        blocks = hub_blocks(source)
    return limit_records(blocks, source.max_rows)


def source_size(source: Source) -> int:
    """Bytes of the files of a source, or of a hub data set in memory: the sum of the sizes of its blocks."""
    if is_local_source(source):
        return sum(file.stat().st_size for file in expand(source.path))
    return hub_size(source)


def count_records(source: Source) -> int:
    """Number of records of a local source: the lines of JSON-lines files, otherwise counted while reading."""
    files = expand(source.path)
    lines = all(is_json_lines(file) and not is_json_array(file) for file in files)
    count = count_lines(files) if lines else sum(block.count() for block in source_blocks(source))
    return min(count, source.max_rows or count)


def is_local_source(source: Source) -> bool:
    """Whether a source consists of local files.

    Raises:
        RecipeError: if it does, and sets a key that only applies to hub data sets (subset, revision, split).
    """
    if not is_local(source.path):
        return False
    inert = [key for key in ("subset", "revision") if getattr(source, key) is not None]
    inert += ["split"] if source.split != "train" else []
    if inert:
        raise RecipeError(
            Problem(f"data.sources {source.path}", f"`{key}` has no effect on local files", "remove it")
            for key in inert
        )
    return True


class SourceContent(NamedTuple):
    """Everything that decides the examples of a source.

    Attributes:
        rows: hash of its files, or the fingerprint of a hub data set.
        tools: hash of its tools file.
        reads: hashes of the files that its reader reads.
        data_format: the format's mapping, or a hash of the reader's code; None if the format is detected.
        settings: the source's other keys in the recipe.
    """

    rows: str
    tools: str | None
    reads: list[str]
    data_format: Any
    settings: dict[str, Any]


def source_content(source: Source) -> SourceContent:
    """Everything that decides the examples of a source. Names and folders of files do not count, only their bytes."""
    if is_user_reader(source.format):
        data_format: Any = load_user_reader(source.format, source.reads).code
    else:
        data_format = None if source.format == "auto" else load_format(source.format).model_dump(mode="json")
    tools = None if source.tools_file is None else content_hash(expand(source.tools_file))
    rows = content_hash(expand(source.path)) if is_local_source(source) else hub_fingerprint(source)
    reads = [content_hash(files_under(path)) for path in source.reads]
    paths = {key for (key,) in path_keys(Source)}
    settings = source.model_dump(mode="json", exclude={"weight", "private", "alias", *paths})
    settings["rules"] = {code: {**rule, "weight": None} for code, rule in settings["rules"].items()}
    return SourceContent(rows, tools, reads, data_format, settings)


def check_output(recipe: Recipe) -> None:
    """Checks that a run's inputs and its output folder do not overlap. Symbolic links are followed.

    Raises:
        RecipeError: if the run would read files that it writes, or its output folder contains an input.
    """
    output = Path(recipe.output_dir).resolve()
    for key, path in _input_paths(recipe):
        root = local_path(path)
        several = root.is_dir() or (not root.exists() and is_glob(path))
        if several and could_match(path, *(output / name for name in _RUN_FILES)):
            raise RecipeError(
                "output_dir", f"{recipe.output_dir} is inside {key} {path}: the run would read its own files as data",
                "set an output_dir outside of it, or name only the files that are data",
            )  # fmt: skip
        files = expand(path) if several and not root.is_dir() else [root]
        if inside := next((file for file in files if output in (file.resolve(), *file.resolve().parents)), None):
            raise RecipeError(
                key, f"{inside} is inside output_dir {recipe.output_dir}, which is reserved for the run's output",
                "set another output_dir, or move the file",
            )  # fmt: skip


def _input_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The key and path of every local input of a run, except its base model."""
    data, template = recipe.data, recipe.chat.template
    if template is not None and template.endswith((".yaml", ".yml")):
        yield "chat.template", template
    for i, source in enumerate((*data.sources, *data.validation_sources)):
        key = f"data.sources.{i}" if i < len(data.sources) else f"data.validation_sources.{i - len(data.sources)}"
        if is_local(source.path):
            yield f"{key}.path", source.path
        yield from ((f"{key}.{name}", path) for name, path in _auxiliary_paths(source))
    if data.clean.decontaminate is not None:
        yield from (("data.clean.decontaminate.files", path) for path in data.clean.decontaminate.files)


def _auxiliary_paths(source: Source) -> Iterator[tuple[str, str]]:
    """The key and path of the files of a source that are not data: its reader or format, tools, and `reads`."""
    if is_user_reader(source.format):
        yield "format", reader_file(source.format)
    elif source.format.endswith((".yaml", ".yml")):
        yield "format", source.format
    if source.tools_file is not None:
        yield "tools_file", source.tools_file
    yield from (("reads", path) for path in source.reads)


def hub_blocks(source: Source) -> Iterator[Block]:
    """A hub data set in blocks; the location of a record is `id row N`.

    `datasets` decodes the records: its JSON and other extension types are not stored in the Arrow table as such.
    """
    dataset = _dataset(source)
    bytes_per_record = hub_size(source) / max(1, len(dataset))
    for start in range(0, len(dataset), BLOCK_RECORDS):
        columns = dataset[start : start + BLOCK_RECORDS]
        count = min(BLOCK_RECORDS, len(dataset) - start)
        records = [drop_nulls({name: values[i] for name, values in columns.items()}) for i in range(count)]
        yield ObjectsBlock(f"{source.path} row ", start + 1, records, round(bytes_per_record * count))


def hub_size(source: Source) -> int:
    """Bytes of a hub data set in memory."""
    return int(_dataset(source).data.nbytes)


def hub_fingerprint(source: Source) -> str:
    """Identifies the content of a hub data set at the revision in the local cache."""
    return str(_dataset(source)._fingerprint)


def is_cached(source: Source) -> bool:
    """Whether a hub data set is in the local cache. Call it only if `HF_HUB_OFFLINE` is set."""
    try:
        _dataset(source)
    except (DataError, RunEnvironmentError):
        return False
    return True


def _dataset(source: Source) -> Any:
    return _load_dataset(source.path, source.subset, source.split, source.revision)


@lru_cache(maxsize=8)
def _load_dataset(path: str, subset: str | None, split: str, revision: str | None) -> Any:
    """A hub data set, downloaded unless it is in the local cache.

    Raises:
        DataError: if there is no such data set, subset or split.
        RunEnvironmentError: if the hub cannot be reached.
    """
    set_offline_if_unreachable()
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, name=subset, split=split, revision=revision)
    except DatasetNotFoundError:
        raise DataError(
            path, "no such local file and no such data set on the hub", "check the name; private sets need HF_TOKEN"
        ) from None
    except ValueError as error:  # an unknown subset or split; the message lists the existing ones
        raise DataError(path, str(error).splitlines()[0], "correct subset or split") from None
    except (ConnectionError, OSError) as error:
        raise RunEnvironmentError(
            path, f"is not in the local cache, and the hub cannot be reached ({type(error).__name__})",
            "check the path, or run `nesso-tune prepare` on a machine with network access",
        ) from None  # fmt: skip

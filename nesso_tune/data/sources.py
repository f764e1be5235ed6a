"""The records of a source, from files or a data set on the hub, and a hash of everything that decides them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from nesso_tune import cache
from nesso_tune.data.blocks import (
    BLOCK_RECORDS,
    Block,
    LocatedRecord,
    ObjectsBlock,
    Record,
    drop_nulls,
    limit_records,
    with_locations,
)
from nesso_tune.data.file_formats import count_lines, file_blocks, has_splits, is_json_lines
from nesso_tune.data.files import (
    ALL_SPLITS,
    content_hash,
    could_match,
    expand,
    files_under,
    is_glob,
    is_local,
    is_remote,
    select_files,
)
from nesso_tune.data.formats import load_format
from nesso_tune.data.remote import is_downloaded, remote_files
from nesso_tune.data.user_readers import is_user_reader, load_user_reader
from nesso_tune.errors import DataError, Problem, RecipeError, RunEnvironmentError
from nesso_tune.files import sha256
from nesso_tune.hub import set_offline_if_unreachable
from nesso_tune.logs import logger
from nesso_tune.recipes.builtin import local_path, path_keys, reader_file
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import Source

CHATGPT_READER = "recipes/readers/chatgpt.py:last_branch"
PASSED_ROWS = "passed-data"  # folder of the cache
# Keys of a source that say where its rows are, not how they are read
_LOCATION_KEYS = ("path", "split", "subset", "revision", "alias", "private")
# Examples of the files that a run writes, to match data globs against
_RUN_FILES = ("metrics.jsonl", "data_report.json", "final/config.json", "checkpoint-1/trainer_state.json")


class DataFile(NamedTuple):
    """A data file, and its name in locations and messages: its path, or its URL."""

    path: Path
    name: str


def source_records(source: Source) -> Iterator[LocatedRecord]:
    """The records of a source, at most `max_rows`, with their locations.

    Raises:
        DataError: if its format is to be detected, and it is an export that only a reader can convert.
    """
    records = with_locations(source_blocks(source))
    first = next(records, None)
    if first is None:
        return
    if source.format == "auto":
        _check_not_tree(first[0], source.path)
    yield first
    yield from records


def source_blocks(source: Source) -> Iterator[Block]:
    """The records of a source in blocks, at most `max_rows`."""
    if has_files(source):
        _report_selection(source)
        texts = _text_columns(source)
        blocks: Iterator[Block] = chain.from_iterable(
            file_blocks(file.path, file.name, source.split, texts, source.private) for file in source_files(source)
        )
    else:
        blocks = hub_blocks(source)
    return limit_records(blocks, source.max_rows)


def source_files(source: Source) -> list[DataFile]:
    """The files of a source with files, those of its split, in a fixed order; remote ones are downloaded."""
    if is_remote(source.path):
        return [DataFile(path, url) for path, url in remote_files(source.path, source.split, source.private)]
    return [DataFile(path, str(path)) for path in expand(source.path, source.split)]


def source_size(source: Source) -> int:
    """Bytes of the files of a source, or of a hub data set in memory: the sum of the sizes of its blocks."""
    if has_files(source):
        return sum(file.path.stat().st_size for file in source_files(source))
    return hub_size(source)


def count_records(source: Source) -> int:
    """Number of records of a source with files: the lines of JSON-lines files, otherwise counted while reading."""
    files = [file.path for file in source_files(source)]
    lines = all(is_json_lines(file) for file in files)
    count = count_lines(files) if lines else sum(block.count() for block in source_blocks(source))
    return min(count, source.max_rows or count)


def has_files(source: Source) -> bool:
    """Whether a source consists of local files or of files behind a URL, not of a hub data set.

    Raises:
        RecipeError: if it does, and sets a key that only applies to hub data sets (subset, revision), or a split where
            neither the names of the files nor the file itself have splits.
    """
    if not is_local(source.path) and not is_remote(source.path):
        return False
    kind = "a URL" if is_remote(source.path) else "local files"
    inert = [(key, kind) for key in ("subset", "revision") if getattr(source, key) is not None]
    if source.split != "train" and is_local(source.path):
        found = select_files(source.path, ALL_SPLITS)
        if not found.splits and not (len(found.files) == 1 and has_splits(found.files[0])):
            inert.append(("split", "local files whose names carry no splits"))
    if inert:
        raise RecipeError(
            Problem(f"data.sources {source.path}", f"`{key}` has no effect on {what}", "remove it")
            for key, what in inert
        )
    return True


def _text_columns(source: Source) -> frozenset[str]:
    """The columns that hold texts by the format of a source."""
    if source.format == "auto" or is_user_reader(source.format):
        names = (source.prompt_field, source.input_field, source.response_field, source.text_field)
        return frozenset(name for name in names if name is not None)
    data_format = load_format(source.format).adapted(source)
    columns = (data_format.prompt_field, data_format.input_field, data_format.response_field, data_format.text_field,
               data_format.choice_fields)  # fmt: skip
    return frozenset(name for names in columns for name in names)


def _report_selection(source: Source) -> None:
    """Says once which split of a folder is read, and which of its files are not data."""
    if is_remote(source.path) or source.private:  # messages name files
        return
    found = select_files(source.path, source.split)
    if found.split is not None and found.splits != ("train",):
        others = [name for name in found.splits if name != found.split]
        _say_once(f"{source.path}: reads split {found.split}" + (f", not {', '.join(others)}" if others else ""))
    if found.skipped:
        names = ", ".join(found.skipped[:5]) + (" …" if len(found.skipped) > 5 else "")
        _say_once(f"{source.path}: skips {names} (hidden, metadata, or not data)")


@lru_cache(maxsize=1024)
def _say_once(text: str) -> None:
    logger.info(text)


def _check_not_tree(record: Record, path: str) -> None:
    """Raises DataError for a chat of ChatGPT's export, a tree of messages: a reader takes the last branch."""
    if isinstance(record.get("mapping"), dict) and "current_node" in record:
        raise DataError(
            path, "is an export of ChatGPT, whose chats are trees of messages", f"set format: {CHATGPT_READER}"
        )


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
    files = [file.path for file in source_files(source)] if has_files(source) else None
    rows = hub_fingerprint(source) if files is None else _rows_hash(files)
    reads = [content_hash(files_under(path)) for path in source.reads]
    paths = {key for (key,) in path_keys(Source)}
    settings = source.model_dump(mode="json", exclude={"weight", "private", "alias", *paths})
    settings["rules"] = {code: {**rule, "weight": None} for code, rule in settings["rules"].items()}
    return SourceContent(rows, tools, reads, data_format, settings)


def _rows_hash(files: list[Path]) -> str:
    """Hash of the bytes of files and of which ones wrap their rows: of a file of one line, its name decides that."""
    wrapped = [i for i, file in enumerate(files) if _wraps_rows(file)]
    return f"{content_hash(files)}-{wrapped}" if wrapped else content_hash(files)


def _wraps_rows(file: Path) -> bool:
    try:
        return has_splits(file)
    except DataError:  # reading the rows raises it, after the errors of the files before it
        return False


def check_output(recipe: Recipe) -> None:
    """Checks that a run's inputs and its output folder do not overlap. Symbolic links are followed.

    Raises:
        RecipeError: if the run would read files that it writes, or its output folder contains an input.
    """
    output = Path(recipe.output_dir).resolve()
    for key, path in input_paths(recipe):
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


def check_sources(recipe: Recipe) -> None:
    """Raises DataError for the sources whose local files do not exist, each with its key."""
    problems: list[Problem] = []
    for key, path in input_paths(recipe):
        if key.endswith(".path"):
            try:
                expand(path)
            except DataError as error:
                problems += [Problem(f"{key} {p.where}", p.what, p.remedy) for p in error.problems]
    if problems:
        raise DataError(problems)


def input_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The key and path of every local input of a run, except its base model; patterns and folders as they are."""
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
    gate = None if recipe.evaluation is None else recipe.evaluation.gate
    if gate is not None and gate.endswith((".yaml", ".yml")):
        yield "evaluation.gate", gate


def _auxiliary_paths(source: Source) -> Iterator[tuple[str, str]]:
    """The key and path of the files of a source that are not data: its reader or format, tools, and `reads`."""
    if is_user_reader(source.format):
        yield "format", reader_file(source.format)
    elif source.format.endswith((".yaml", ".yml")):
        yield "format", source.format
    if source.tools_file is not None:
        yield "tools_file", source.tools_file
    yield from (("reads", path) for path in source.reads)


def passed_source(rows: Any, name: str, replaced: Sequence[Source]) -> Source:
    """The source of a data set that is passed in Python, as a file of the cache that is named by its content.

    Args:
        rows: a `datasets.Dataset`.
        name: its name in reports and errors.
        replaced: the recipe's sources in whose place it is read: with the keys on which all of them agree, such as
            `format` and `language`. It is private if one of them is.

    Raises:
        DataError: if it is no data set, or has no rows.
    """
    import datasets

    if not isinstance(rows, datasets.Dataset):
        is_split = isinstance(rows, datasets.DatasetDict)
        remedy = f"pass one of its splits: {', '.join(rows)}" if is_split else "make one: datasets.Dataset.from_list(…)"
        raise DataError(name, f"is a {type(rows).__name__}, not a datasets.Dataset", remedy)
    if not len(rows):
        raise DataError(name, "has no rows", "pass a data set with rows")
    stated = [source.model_dump(exclude_unset=True) for source in replaced]
    agreed = {
        key: value
        for key, value in stated[0].items()
        if key not in _LOCATION_KEYS and all(key in other and other[key] == value for other in stated)
    }
    private = any(source.private for source in replaced)
    return Source.model_validate({**agreed, "path": str(_stored(rows, name)), "alias": name, "private": private})


def _stored(rows: Any, name: str) -> Path:
    """The file of the cache with the rows of a data set."""
    import datasets

    datasets.disable_progress_bars()
    root = cache.cache_root() / PASSED_ROWS
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root) as folder:
        file = Path(folder) / "rows.parquet"
        rows.to_parquet(file)

        def build(staging: Path) -> dict[str, Any]:
            file.rename(staging / file.name)
            return {}

        found, _, _ = cache.get_or_build(PASSED_ROWS, sha256(file)[:24], build, lambda path, _: path, name)
    return found / file.name


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
    """Whether a hub data set, or the files of a URL, are in the local cache.

    Call it only if `HF_HUB_OFFLINE` is set.
    """
    if is_remote(source.path):
        return is_downloaded(source.path, source.split)
    try:
        _dataset(source)
    except (DataError, RunEnvironmentError):
        return False
    return True


def fetch(source: Source) -> None:
    """Downloads a hub data set or the files of a URL into the local cache; checks that local files exist.

    Raises:
        DataError, RunEnvironmentError: if they do not exist, or cannot be reached.
    """
    if has_files(source):
        source_files(source)
    else:
        _dataset(source)


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

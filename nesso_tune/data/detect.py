"""Detects the method, format, columns and languages of a data source, for the first draft of a recipe."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from nesso_tune.conversation import UNKNOWN_LANGUAGE, Conversation, Message, PreferencePair
from nesso_tune.data.blocks import Record
from nesso_tune.data.cleaning import clean
from nesso_tune.data.column_inference import InferredFormat, infer_format
from nesso_tune.data.columns import Row, UnreadCounts, Unusable
from nesso_tune.data.convert import Example, record_language, to_example
from nesso_tune.data.file_formats import is_json_lines, read_records
from nesso_tune.data.files import expand, is_local
from nesso_tune.data.formats import (
    choose_format,
    find_label,
    load_format,
    not_matching,
    recognise_format,
    recognise_nested,
)
from nesso_tune.data.languages import detect_example_language
from nesso_tune.data.record_reader import (
    DropCounter,
    check_named_columns,
    is_selected,
    make_record_reader,
    read_examples,
)
from nesso_tune.data.remedies import remedy_of
from nesso_tune.data.sources import count_records, source_records
from nesso_tune.data.user_readers import is_user_reader
from nesso_tune.errors import DataError
from nesso_tune.logs import logger
from nesso_tune.recipes.data_rules import ALL_FORMAT_KEYS, FORMAT_KEYS
from nesso_tune.recipes.sections import AUTO, CleanSection, Source

NEARLY_ALL = 0.95  # share of the examples that decides for the source
SAMPLE_RECORDS = 1000
OFFSET_SAMPLING_BYTES = 64_000_000  # size from which JSON-lines files are sampled at byte offsets, not read whole
MAX_READ_RECORDS = 200_000  # records read from all other sources
_CALL_CHARACTERS = 40  # added by the markup of a tool call
_TOOLS_CHARACTERS = 500  # added by the introduction of the tools


@dataclass(frozen=True)
class DetectedSource:
    """The properties of a source.

    Attributes:
        path: as given.
        method: `sft` (conversations) or `dpo` (pairs).
        format: name of the shipped format.
        fields: further keys of the source, which name its columns.
        rows: number of rows; None for hub data.
        usable: share of the sampled rows that can be used.
        dropped: number of the other sampled rows by reason.
        languages: share of each language among the usable rows.
        language: value for the recipe: a code, `auto`, or None if the rows have a language column.
        characters: length of each usable row of the sample.
        tools: share of the usable rows with tools or tool calls.
        reasoning: share of the usable rows with reasoning.
        unread: number of the sampled rows with each column or message key that the format does not read.
        unread_texts: number of those in which it holds text.
        merge_turns: whether the rows have two turns of one role in a row, and can be used if these are merged.
    """

    path: str
    method: str
    format: str
    fields: dict[str, Any]
    rows: int | None
    usable: float
    dropped: dict[str, int]
    languages: dict[str, float]
    language: str | None
    characters: tuple[int, ...] = field(repr=False)
    tools: float = 0.0
    reasoning: float = 0.0
    unread: dict[str, int] = field(default_factory=dict)
    unread_texts: dict[str, int] = field(default_factory=dict)
    merge_turns: bool = False


def detect_source(path: str, given: Source | None = None) -> DetectedSource:
    """Detects the properties of a source from a sample of its rows.

    Args:
        path: file, folder, pattern, URL or hub id.
        given: the source with what is known of it: its split, format and columns.

    Raises:
        DataError: if it cannot be read, its format is not recognised, or none of its rows can be used.
    """
    plain = given or Source(path=path)
    if is_user_reader(plain.format):
        return _detect_with_reader(plain)
    records = sample_records(plain, SAMPLE_RECORDS)
    if not records:
        raise DataError(path, "contains no rows", "give a file with rows")
    name, fields = _detect_format(plain, records)
    source = Source(path=path, format=name, **fields)
    source, selected = _without_bad_answers(source, records)
    examples, dropped, unread = _convert(source, selected)
    merged = _convert(source, selected, CleanSection(role_order="merge"))[0] if dropped["roles_out_of_order"] else []
    merge_turns = dropped["roles_out_of_order"] > len(examples) and len(merged) > len(examples)
    if merge_turns:
        examples, dropped, unread = _convert(source, selected, CleanSection(role_order="merge"))
    if not examples:
        raise _none_usable(source, len(selected), dropped)
    codes = [example.language for example in examples]
    has_column = sum(code != UNKNOWN_LANGUAGE for code in codes) >= NEARLY_ALL * len(codes)
    codes = codes if has_column else [detect_example_language(example) for example in examples]
    shares = {code: n / len(codes) for code, n in Counter(codes).most_common()}
    return DetectedSource(
        path=path,
        method="dpo" if isinstance(examples[0], PreferencePair) else "sft",
        format=name,
        fields={**fields, **({"where": dict(source.where)} if source.where else {})},
        rows=count_records(plain) * len(selected) // len(records) if is_local(path) else None,
        usable=len(examples) / len(selected),
        dropped=dict(dropped.most_common()),
        languages=shares,
        language=None if has_column else _main_language(shares) or AUTO,
        characters=tuple(map(_count_characters, examples)),
        tools=sum(map(_has_tools, examples)) / len(examples),
        reasoning=sum(map(_has_reasoning, examples)) / len(examples),
        unread=dict(unread.rows.most_common()),
        unread_texts=dict(unread.texts.most_common()),
        merge_turns=merge_turns,
    )


def _without_bad_answers(source: Source, records: list[Record]) -> tuple[Source, list[Record]]:
    """A source and its records; of answers that are labelled good or bad, as for KTO, only the good ones."""
    label = None if load_format(source.format).has_pairs else find_label(records)
    if label is None or label[0] in source.where:
        return source, records
    column, good = label
    source = source.model_copy(update={"where": {**source.where, column: good}})
    what = f"answers are labelled good or bad (`{column}`, as for KTO, which is not supported)"
    logger.warning(f"{source.path}: {what}; the recipe keeps the good ones (where)")
    selected = [record for record in records if is_selected(record, source)]
    if not selected:
        raise DataError(source.path, f"{what}, and none of {len(records)} is good", "give data with good answers")
    return source, selected


def _none_usable(source: Source, rows: int, dropped: DropCounter) -> DataError:
    why = "; ".join(f"{reason}: {n}, e.g. {dropped.examples[reason]}" for reason, n in dropped.most_common())
    what = f"looks like format {source.format}, but none of {rows} rows can be used ({why})"
    return DataError(source.path, what, remedy_of(dropped.most_common(1)[0][0]))


def sample_records(source: Source, count: int) -> list[Record]:
    """About `count` evenly spaced records of a source, or all if there are fewer: files are often sorted.

    Raises:
        DataError: if a file cannot be read.
    """
    files = expand(source.path, source.split) if is_local(source.path) else []
    large = [is_json_lines(file) and file.stat().st_size > OFFSET_SAMPLING_BYTES for file in files]
    if source.max_rows is None and files and all(large):
        per_file = max(1, count // len(files))
        return [record for file in files for record in _sample_at_offsets(file, per_file)]
    records = [record for record, _ in islice(source_records(source), MAX_READ_RECORDS)]
    return [records[i * len(records) // count] for i in range(count)] if len(records) > count else records


def _sample_at_offsets(file: Path, count: int) -> Iterator[Record]:
    """The records after evenly spaced byte offsets of a JSON-lines file. The first one is read with error reporting."""
    yield next(read_records(file))[0]
    size = file.stat().st_size
    with file.open("rb") as stream:
        for i in range(1, count):
            stream.seek(i * size // count)
            stream.readline()  # skips the rest of a line
            try:
                record = json.loads(stream.readline())
            except ValueError:  # reported when the data is prepared
                continue
            if isinstance(record, dict):
                yield record


def _detect_format(source: Source, records: Sequence[Record]) -> InferredFormat:
    """The format of records, with the keys of a source that name columns other than its own."""
    given = _given_fields(source)
    if source.format != "auto":
        data_format = choose_format(source, records)
        if set(given).isdisjoint(set(ALL_FORMAT_KEYS) - set(FORMAT_KEYS.get(source.format, ALL_FORMAT_KEYS))):
            check_named_columns(source, data_format)  # keys that the format does not use are errors of the recipe
        return InferredFormat(source.format, given)
    if given and (adapted := recognise_format(source, records)) is not None:
        return InferredFormat(adapted, given)
    name = recognise_format(source, records)
    nested = recognise_nested(records) if name is None else None
    recognised = InferredFormat(*nested) if nested else None if name is None else InferredFormat(name, {})
    if recognised is not None:
        update = {"format": recognised.name, **recognised.fields}
        as_they_are = CleanSection(role_order="keep")
        if _convert(source.model_copy(update=update), records, as_they_are)[0]:
            return recognised
    inferred = infer_format(records)
    if recognised is not None and (inferred is None or not _is_better(inferred, recognised, source, records)):
        return recognised  # the reasons for dropping its rows say what is wrong
    if inferred is None:
        check_named_columns(source)
        raise not_matching(source, records)
    return inferred


def _is_better(inferred: InferredFormat, other: InferredFormat, source: Source, records: Sequence[Record]) -> bool:
    """Whether an inferred format gives examples of the same kind as another one, which gives none."""
    if load_format(inferred.name).has_pairs != load_format(other.name).has_pairs:
        return False
    source = Source.model_validate({"path": source.path, "format": inferred.name, **inferred.fields})
    return bool(_convert(source, records)[0])


def _convert(
    source: Source,
    records: Sequence[Record],
    settings: CleanSection = CleanSection(),  # noqa: B008 - frozen
) -> tuple[list[Example], DropCounter, UnreadCounts]:
    data_format = load_format(source.format).adapted(source)
    method = "dpo" if data_format.has_pairs else "sft"
    examples: list[Example] = []
    dropped, unread = DropCounter(), UnreadCounts()
    for i, record in enumerate(records):
        row = Row(record)
        try:
            language = record_language(row, source)
            example = clean(to_example(row, data_format, method, language, source.path), settings)
            if isinstance(example, Conversation) and not any(map(_is_supervised, example.messages)):
                raise Unusable("nothing_to_learn")
            examples.append(example)
            row.read.update(source.where)
            unread.add(row)
        except Unusable as error:
            dropped.add_unusable(error, f"row {i + 1} of the sample")
    return examples, dropped, unread


def _is_supervised(message: Message) -> bool:
    """Whether a message is supervised if the recipe trains on the assistant."""
    return message.role == "assistant" if message.train is None else message.train


def _main_language(shares: Mapping[str, float]) -> str | None:
    """The language of nearly all rows whose language is known; None if there is none."""
    known = {code: share for code, share in shares.items() if code != UNKNOWN_LANGUAGE}
    main = max(known, key=lambda code: known[code], default=None)
    return main if main is not None and known[main] >= NEARLY_ALL * sum(known.values()) else None


def _count_characters(example: Example) -> int:
    """Characters of a conversation, or of a prompt and the longer answer, including tools and calls."""

    def count(*turns: Message) -> int:
        calls = [call for turn in turns for call in turn.tool_calls]
        return sum(len(turn.content) for turn in turns) + sum(len(str(call)) + _CALL_CHARACTERS for call in calls)

    tools = sum(len(str(tool)) for tool in example.tools) + (_TOOLS_CHARACTERS if example.tools else 0)
    if isinstance(example, PreferencePair):
        return tools + count(*example.prompt) + max(count(example.chosen), count(example.rejected))
    return tools + count(*example.turns)


def _has_reasoning(example: Example) -> bool:
    return any(turn.reasoning is not None for turn in example.turns)


def _has_tools(example: Example) -> bool:
    return bool(example.tools) or any(turn.tool_calls for turn in example.turns)


def _given_fields(source: Source) -> dict[str, Any]:
    """The keys that a source sets itself, except those that say where its rows are."""
    return {key: getattr(source, key) for key in source.model_fields_set - {"path", "split", "format"}}


def _detect_with_reader(source: Source) -> DetectedSource:
    """The properties of a source that a user-defined reader converts, to conversations or else to pairs."""
    for method in ("sft", "dpo"):
        dropped = DropCounter()
        try:
            reader = make_record_reader(source, method)
            sample = list(islice(source_records(source), SAMPLE_RECORDS))
            examples = [
                example for example in read_examples(reader, sample, dropped, UnreadCounts()) if example is not None
            ]
            break
        except DataError:
            if method == "dpo":
                raise
    if not examples:
        raise DataError(source.path, f"{source.format} returned no row that can be used", "correct the function")
    shares = Counter(detect_example_language(example) for example in examples)
    languages = {code: n / len(examples) for code, n in shares.most_common()}
    return DetectedSource(
        path=source.path, method=method, format=source.format, fields=_given_fields(source),
        rows=count_records(source) if is_local(source.path) else None, usable=len(examples) / len(sample),
        dropped=dict(dropped.most_common()), languages=languages, language=_main_language(languages) or AUTO,
        characters=tuple(map(_count_characters, examples)), tools=sum(map(_has_tools, examples)) / len(examples),
        reasoning=sum(map(_has_reasoning, examples)) / len(examples),
    )  # fmt: skip

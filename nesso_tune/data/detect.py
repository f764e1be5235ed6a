"""Detects the method, format, columns and languages of a data source, for the first draft of a recipe."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from nesso_tune.conversation import UNKNOWN_LANGUAGE, Message, PreferencePair
from nesso_tune.data.convert import Example, Unusable, record_language, to_example
from nesso_tune.data.files import Record, expand, is_json_lines, is_local, read_records
from nesso_tune.data.formats import (
    InferredFormat,
    describe_columns,
    infer_format,
    load_format,
    recognise_format,
    used_columns,
)
from nesso_tune.data.languages import detect_example_language
from nesso_tune.data.record_reader import DropCounter
from nesso_tune.data.sources import count_records, source_records
from nesso_tune.errors import DataError
from nesso_tune.recipes.sections import AUTO, Source

NEARLY_ALL = 0.95  # share of the examples that decides for the source
SAMPLE_RECORDS = 1000
OFFSET_SAMPLING_BYTES = 64_000_000  # size from which JSON-lines files are sampled at byte offsets, not read whole
MAX_READ_RECORDS = 200_000  # records read from all other sources
_CALL_CHARACTERS = 40  # added by the markup of a tool call


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
        unused: columns that the format does not read.
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
    unused: tuple[str, ...] = ()


def detect_source(path: str) -> DetectedSource:
    """Detects the properties of a source from a sample of its rows.

    Raises:
        DataError: if it cannot be read, its format is not recognised, or none of its rows can be used.
    """
    plain = Source(path=path)
    records = sample_records(plain, SAMPLE_RECORDS)
    if not records:
        raise DataError(path, "contains no rows", "give a file with rows")
    name, fields = _detect_format(plain, records)
    _check_not_labelled(path, records)
    source = Source(path=path, format=name, **fields)
    examples, dropped = _convert(source, records)
    if not examples:
        why = "; ".join(f"{reason}: {n}, e.g. {dropped.examples[reason]}" for reason, n in dropped.most_common())
        raise DataError(path, f"looks like format {name}, but none of {len(records)} rows can be used ({why})",
                        "correct the data, or name its columns in a recipe (see docs/recipe.md)")  # fmt: skip
    codes = [example.language for example in examples]
    has_column = sum(code != UNKNOWN_LANGUAGE for code in codes) >= NEARLY_ALL * len(codes)
    codes = codes if has_column else [detect_example_language(example) for example in examples]
    shares = {code: n / len(codes) for code, n in Counter(codes).most_common()}
    columns = {column for record in records for column in record}
    return DetectedSource(
        path=path,
        method="dpo" if isinstance(examples[0], PreferencePair) else "sft",
        format=name,
        fields=fields,
        rows=count_records(plain) if is_local(path) else None,
        usable=len(examples) / len(records),
        dropped=dict(dropped.most_common()),
        languages=shares,
        language=None if has_column else _main_language(shares) or AUTO,
        characters=tuple(map(_count_characters, examples)),
        tools=sum(map(_has_tools, examples)) / len(examples),
        unused=tuple(sorted(columns - used_columns(name, fields, records))),
    )


def sample_records(source: Source, count: int) -> list[Record]:
    """About `count` evenly spaced records of a source, or all if there are fewer: files are often sorted.

    Raises:
        DataError: if a file cannot be read.
    """
    files = expand(source.path) if is_local(source.path) else []
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
    name = recognise_format(source, records)
    recognised = None if name is None else InferredFormat(name, {})
    if recognised is not None and _convert(source.model_copy(update={"format": name}), records)[0]:
        return recognised
    found = infer_format(records) or recognised
    if found is None:
        raise DataError(
            source.path, f"its format is not recognised (its columns are {describe_columns(records)})",
            "rename the columns to those of a known format (messages; prompt and response; prompt, chosen and "
            "rejected), or name them in a recipe (prompt_field and response_field, …)",
        )  # fmt: skip
    return found


def _check_not_labelled(path: str, records: Sequence[Record]) -> None:
    """Raises DataError for answers labelled good or bad, as for KTO: SFT would train on the bad ones too."""
    if sum(isinstance(record.get("label"), bool) and "completion" in record for record in records) > len(records) / 2:
        raise DataError(
            path, "each answer has a `label`, true or false (as for KTO, which is not supported)",
            "keep the rows with label: true for SFT, or make pairs of a good and a bad answer for DPO",
        )  # fmt: skip


def _convert(source: Source, records: Sequence[Record]) -> tuple[list[Example], DropCounter]:
    data_format = load_format(source.format).adapted(source)
    method = "dpo" if data_format.has_pairs else "sft"
    examples: list[Example] = []
    dropped = DropCounter()
    for i, record in enumerate(records):
        try:
            language = record_language(record, source)
            examples.append(to_example(record, data_format, method, language, source.path))
        except Unusable as error:
            dropped.add_unusable(error, f"row {i + 1} of the sample")
    return examples, dropped


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

    tools = sum(len(str(tool)) for tool in example.tools)
    if isinstance(example, PreferencePair):
        return tools + count(*example.prompt) + max(count(example.chosen), count(example.rejected))
    return tools + count(*example.turns)


def _has_tools(example: Example) -> bool:
    return bool(example.tools) or any(turn.tool_calls for turn in example.turns)

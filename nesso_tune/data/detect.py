"""A sample of a source's rows from all over it: files are often sorted, by language or by quality."""

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
from nesso_tune.data.formats import describe_columns, infer_format, load_format, recognise_format, used_columns
from nesso_tune.data.languages import detect_example_language
from nesso_tune.data.record_reader import DropCounter
from nesso_tune.data.sources import count_records, source_records
from nesso_tune.errors import DataError
from nesso_tune.recipes.sections import AUTO, Source

OFFSET_SAMPLING_BYTES = 64_000_000  # bytes from which a file of lines is sampled by place instead of being read
MAX_READ_RECORDS = 200_000  # rows that are read of anything else


def sample_records(source: Source, count: int) -> list[Record]:
    """About `count` rows at even distances; all of them if there are fewer.

    Raises:
        DataError: if a file cannot be read.
    """
    files = expand(source.path) if is_local(source.path) else []
    if (
        source.max_rows is None
        and files
        and all(is_json_lines(file) and file.stat().st_size > OFFSET_SAMPLING_BYTES for file in files)
    ):
        share = max(1, count // len(files))
        return [row for file in files for row in _by_place(file, share)]
    rows = [row for row, _ in islice(source_records(source), MAX_READ_RECORDS)]
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows


def _by_place(file: Path, count: int) -> Iterator[Record]:
    """The rows after evenly spaced bytes of a file of JSON lines; the first comes from its reader, faults and all."""
    yield next(read_records(file))[0]
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


SAMPLE = 1000  # rows that are looked at
NEARLY_ALL = 0.95


@dataclass(frozen=True)
class DetectedSource:
    """What is in a source.

    Attributes:
        path: as it was given.
        method: `sft` (conversations) or `dpo` (pairs).
        format: name of the shipped format.
        fields: further keys of the source that name its columns.
        rows: how many there are; None for hub data.
        usable: share of the looked-at rows that can be used.
        dropped: why others cannot, with their number among the rows looked at.
        languages: share of each language among the usable rows.
        language: what the recipe should say: a code, `auto`, or None where each row says its own.
        characters: length of every usable row that was looked at.
        tools: share of rows that offer or call tools.
        unused: columns of its rows that nothing is made of.
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
    """Looks at a sample of a source's rows.

    Raises:
        DataError: if it cannot be read, its shape is not recognised, or none of its rows can be used.
    """
    plain = Source(path=path)
    rows = sample_records(plain, SAMPLE)
    if not rows:
        raise DataError(path, "holds no rows", "give a file with rows")
    name, fields = _shape(plain, rows)
    _check_labels(path, rows)
    source = Source(path=path, format=name, **fields)
    items, dropped = _items(source, rows)
    if not items:
        why = "; ".join(f"{reason}: {n}, e.g. {dropped.examples[reason]}" for reason, n in dropped.most_common())
        raise DataError(path, f"looks like format {name}, but none of {len(rows)} rows can be used ({why})",
                        "correct the data, or name its columns in a recipe (see docs/recipe.md)")  # fmt: skip
    said = [item.language for item in items]
    by_rows = sum(code != UNKNOWN_LANGUAGE for code in said) >= NEARLY_ALL * len(said)
    codes = said if by_rows else [detect_example_language(item) for item in items]
    shares = {code: n / len(codes) for code, n in Counter(codes).most_common()}
    return DetectedSource(
        path=path,
        method="dpo" if isinstance(items[0], PreferencePair) else "sft",
        format=name,
        fields=fields,
        rows=count_records(plain) if is_local(path) else None,
        usable=len(items) / len(rows),
        dropped=dict(dropped.most_common()),
        languages=shares,
        language=None if by_rows else _one_language(shares) or AUTO,
        characters=tuple(map(_characters, items)),
        tools=sum(map(_has_tools, items)) / len(items),
        unused=tuple(sorted({column for row in rows for column in row} - used_columns(name, fields, rows))),
    )


def _shape(source: Source, rows: Sequence[Record]) -> tuple[str, dict[str, Any]]:
    """The format of rows, and the columns it does not find by itself."""
    name = recognise_format(source, rows)
    if name is not None and _items(source.model_copy(update={"format": name}), rows)[0]:
        return name, {}
    guessed = infer_format(rows)
    if guessed is not None:
        return guessed
    if name is not None:
        return name, {}
    raise DataError(
        source.path, f"its shape is not recognised (its columns are {describe_columns(rows)})",
        "rename the columns to those of a known shape (messages; prompt and response; prompt, chosen and rejected), or "
        "name them in a recipe (prompt_field and response_field, …)",
    )  # fmt: skip


def _check_labels(path: str, rows: Sequence[Record]) -> None:
    """Raises DataError for answers that are each marked good or bad: learning both alike would be a silent mistake."""
    if sum(isinstance(row.get("label"), bool) and "completion" in row for row in rows) > len(rows) / 2:
        raise DataError(
            path, "each answer has a `label`, true or false (as for KTO, which is not in version 1)",
            "keep the rows with label: true for SFT, or make pairs of a good and a bad answer for DPO",
        )  # fmt: skip


def _items(source: Source, rows: Sequence[Record]) -> tuple[list[Example], DropCounter]:
    fmt = load_format(source.format).adapted(source)
    method = "dpo" if fmt.pairs else "sft"
    items: list[Example] = []
    dropped = DropCounter()
    for i, row in enumerate(rows):
        try:
            items.append(to_example(row, fmt, method, record_language(row, source), source.path))
        except Unusable as why:
            dropped.add_unusable(why, f"row {i + 1} of those looked at")
    return items, dropped


def _one_language(shares: Mapping[str, float]) -> str | None:
    """The language of nearly all rows whose language could be told."""
    told = {code: share for code, share in shares.items() if code != UNKNOWN_LANGUAGE}
    main = max(told, key=lambda code: told[code], default=None)
    return main if main is not None and told[main] >= NEARLY_ALL * sum(told.values()) else None


def _characters(item: Example) -> int:
    """Length of a conversation, or of a prompt and the longer answer, with the tools on offer and the calls."""

    def of(*turns: Message) -> int:
        return sum(len(turn.content) + sum(len(str(call)) + 40 for call in turn.tool_calls) for turn in turns)

    offered = sum(len(str(tool)) for tool in item.tools)
    if isinstance(item, PreferencePair):
        return offered + of(*item.prompt) + max(of(item.chosen), of(item.rejected))
    return offered + of(*item.turns)


def _has_tools(item: Example) -> bool:
    return bool(item.tools) or any(turn.tool_calls for turn in item.turns)

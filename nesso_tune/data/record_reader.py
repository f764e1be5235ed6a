"""From a source's records to cleaned examples: format detection, conversion, selection by `where`, scores and rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice
from typing import NamedTuple

from nesso_tune.conversation import UNKNOWN_LANGUAGE, Conversation, PreferencePair
from nesso_tune.data.blocks import LocatedRecord, Record
from nesso_tune.data.cleaning import clean
from nesso_tune.data.column_inference import infer_format
from nesso_tune.data.columns import Row, UnreadCounts, Unusable, as_number, column_value, find_column, is_equal, lookup
from nesso_tune.data.convert import Example, record_language, to_example
from nesso_tune.data.formats import (
    DETECTED_FORMATS,
    EXPLICIT_FORMATS,
    PAIR_FORMATS,
    DataFormat,
    choose_format,
    describe_columns,
    load_format,
    recognise_format,
    recognise_nested,
)
from nesso_tune.data.languages import detect_example_language
from nesso_tune.data.sources import source_records
from nesso_tune.data.tools import Tool, read_tool_file
from nesso_tune.data.user_readers import UserReader, is_user_reader, load_user_reader
from nesso_tune.errors import DataError, closest, first_line, shortened
from nesso_tune.recipes.builtin import local_path
from nesso_tune.recipes.sections import AUTO, CleanSection, Rule, Source

_KEYS_OF_ENTRIES = ("role_field", "content_field", "response_field")  # the last in rankings alone
OTHER_KEY = "other"  # key in `rules` and `shares` for everything without a key of its own
FORMAT_RECORDS = 50  # records from which a format is chosen


@dataclass(frozen=True)
class RecordReader:
    """Converts the records of one source to examples.

    Attributes:
        source: the source.
        data_format: its format, or a user-defined reader.
        method: `sft` or `dpo`.
        clean: the cleaning steps.
        tools: tools offered in records that define none.
    """

    source: Source
    data_format: DataFormat | UserReader
    method: str
    clean: CleanSection
    tools: tuple[Tool, ...] = ()

    def read(self, record: Record | Row, where: str) -> Example:
        """The example of a record. A `Row` notes what is read of it.

        Raises:
            Unusable: with the reason, if the record is dropped.
            DataError: if its score is not a number, or a user-defined reader fails.
        """
        source, row = self.source, Row.of(record)
        if source.where and not is_selected(row.columns, source):
            raise Unusable("not_selected")
        row.read |= self._selecting_columns
        if source.min_score is not None and not source.rules:
            _check_score(row.columns, source, source.min_score, where)
        example = self._convert(row, where)
        if source.language == AUTO and example.language == UNKNOWN_LANGUAGE:
            example = replace(example, language=detect_example_language(example))
        if source.rules:
            self._apply_rule(language_rule(source, example.language), row.columns, where)
        if self.tools and not example.tools and isinstance(example, (Conversation, PreferencePair)):
            example = replace(example, tools=self.tools)
        return clean(example, self.clean)

    @cached_property
    def _selecting_columns(self) -> frozenset[str]:
        """The columns that decide whether a record is used."""
        return frozenset((*self.source.where, *([self.source.score_field] if self.source.score_field else ())))

    def _convert(self, row: Row, where: str) -> Example:
        if isinstance(self.data_format, DataFormat):
            language = record_language(row, self.source)
            return to_example(row, self.data_format, self.method, language, self.source.path)
        return self._convert_with(self.data_format, row, where)

    def _convert_with(self, reader: UserReader, row: Row, where: str) -> Example:
        """The example that a user's reader makes of a record. Of what it returns, unread keys are noted."""
        record = row.columns
        try:
            result = reader.function(dict(record))
        except (Exception, SystemExit) as error:  # user code may raise anything
            what = f"{reader.name} raised {type(error).__name__}: {first_line(error)}"
            raise DataError(where, what, "correct the function, or let it return None for such rows") from None
        row.read.update(record)  # the function was given all columns
        if result is None:
            raise Unusable("left_out_by_reader")
        if isinstance(result, (Conversation, PreferencePair)):
            return self._validate(result, record, where)
        if not isinstance(result, Mapping):
            what = f"{reader.name} returned {type(result).__name__}"
            raise DataError(where, what, "return a dict of a known format, a Conversation, a PreferencePair, or None")
        data_format = next((known for known in _known_formats() if known.matches(result)), None)
        if data_format is None or data_format.has_pairs != (self.method == "dpo"):
            what = f"{reader.name} returned a row with {', '.join(map(str, result)) or 'nothing'}"
            expected = "prompt, chosen and rejected" if self.method == "dpo" else "messages, or prompt and response"
            raise DataError(where, what, f"return {expected}")
        made = Row(result)
        language = record_language(made, self.source)
        language = language if language != UNKNOWN_LANGUAGE else record_language(record, self.source)
        example = to_example(made, data_format, self.method, language, self.source.path)
        row.absorb(made)
        return example

    def _validate(self, result: Conversation | PreferencePair, record: Record, where: str) -> Example:
        """A reader's own Conversation or PreferencePair, with the same checks as a record."""
        kind, is_pair = type(result).__name__, isinstance(result, PreferencePair)
        if is_pair != (self.method == "dpo"):
            raise DataError(where, f"a {kind} is not for method {self.method}", "correct the reader")
        try:
            names = ("role", "content", "tool_calls", "train", "reasoning")
            turns = [{name: getattr(turn, name) for name in names} for turn in result.turns]
            turns = [{**turn, "tool_calls": list(turn["tool_calls"])} for turn in turns]
            tools = [dict(tool) for tool in result.tools]
        except (AttributeError, TypeError, ValueError) as error:
            what = f"a {kind} of this reader does not consist of Messages and tools ({first_line(error)})"
            raise DataError(where, what, 'create it from Message("user", "…")') from None
        data_format = load_format("preference" if is_pair else "messages")
        plain: Record = {"messages": turns, "tools": tools}
        if is_pair:
            plain = {"prompt": turns[:-2], "chosen": turns[-2:-1], "rejected": turns[-1:], "tools": tools}
        has_language = isinstance(result.language, str) and result.language != UNKNOWN_LANGUAGE
        language = result.language if has_language else record_language(record, self.source)
        return to_example(plain, data_format, self.method, language, self.source.path)

    def _apply_rule(self, rule: Rule | None, record: Record, where: str) -> None:
        """Raises Unusable if the rule of its language drops the record."""
        if rule is not None and not rule.keep:
            raise Unusable("language_not_kept")
        min_score = self.source.min_score if rule is None or rule.min_score is None else rule.min_score
        if min_score is not None:
            _check_score(record, self.source, min_score, where)


def make_record_reader(
    source: Source,
    method: str,
    clean: CleanSection = CleanSection(),  # noqa: B008 - frozen
) -> RecordReader:
    """The reader of a source; its format is chosen from the first records that `where` selects.

    Args:
        source: the source.
        method: `sft` requires conversations, `dpo` preference pairs.
        clean: the cleaning steps.

    Raises:
        DataError: if there are no records, or they are not of the kind that the method requires.
    """
    records = (record for record, _ in source_records(source))
    selected = (record for record in records if not source.where or is_selected(record, source))
    first = list(islice(selected, FORMAT_RECORDS))
    tools = read_tool_file(local_path(source.tools_file)) if source.tools_file is not None else ()
    return RecordReader(source, _choose_format(source, method, first), method, clean, tools)


def read_examples(
    reader: RecordReader, records: Iterable[LocatedRecord], dropped: DropCounter, unread: UnreadCounts
) -> Iterator[Example | None]:
    """The example of each record, or None for a dropped one; the reason is counted in `dropped`."""
    for record, where in records:
        row = Row(record)
        try:
            example = reader.read(row, where)
            unread.add(row)
            yield example
        except Unusable as error:
            dropped.add_unusable(error, where)
            yield None


class Drop(NamedTuple):
    """A dropped record: its location, the reason as a keyword, and details."""

    where: str
    reason: str
    detail: str = ""


class DropCounter(Counter[str]):
    """Counts dropped records by reason and keeps the first of each reason as an example."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}

    def add(self, drop: Drop) -> None:
        """Counts one dropped record."""
        self[drop.reason] += 1
        self.examples.setdefault(drop.reason, f"{drop.where}: {drop.detail}" if drop.detail else drop.where)

    def add_unusable(self, error: Unusable, where: str) -> None:
        """Counts the record at `where`."""
        self.add(Drop(where, str(error), error.detail))

    def merge(self, other: DropCounter) -> None:
        """Adds the counts of another source."""
        self.update(other)
        self.examples = other.examples | self.examples


def language_rule(source: Source, language: str) -> Rule | None:
    """The rule of a source for a language, or its rule for all other languages."""
    return source.rules.get(language) or source.rules.get(OTHER_KEY)


def is_selected(record: Record, source: Source) -> bool:
    """Whether a record has the column values that `where` requires."""
    for column, expected in source.where.items():
        value = column_value(record, column)
        if not any(is_equal(value, v) for v in (expected if isinstance(expected, tuple) else (expected,))):
            return False
    return True


def _check_score(record: Record, source: Source, min_score: float, where: str) -> None:
    """Raises Unusable if the score of a record is too low, DataError if it is not a number."""
    assert source.score_field is not None
    score = as_number(column_value(record, source.score_field))
    if score is None:
        raise DataError(where, f"`{source.score_field}` is not a number", "correct it, or remove min_score")
    if not score >= min_score:  # true for NaN as well
        raise Unusable("below_min_score")


@lru_cache(maxsize=1)
def _known_formats() -> list[DataFormat]:
    return [load_format(name) for name in (*DETECTED_FORMATS, *EXPLICIT_FORMATS)]


def _choose_format(source: Source, method: str, records: Sequence[Record]) -> DataFormat | UserReader:
    if not records and source.where and next(source_records(source), None) is not None:
        wanted = ", ".join(f"{column}: {value}" for column, value in source.where.items())
        raise DataError(source.path, f"no row matches `where` ({wanted})", "correct it, or remove the source")
    if not records:
        raise DataError(source.path, "contains no rows", "give a file with rows, or remove the source")
    if is_user_reader(source.format):
        return load_user_reader(source.format, source.reads)
    if source.format == "auto" and recognise_format(source, records) is None and recognise_nested(records) is None:
        check_named_columns(source)
        _suggest_columns(source, records)
    data_format = choose_format(source, records)
    _check_kind(source, method, data_format, records)
    check_named_columns(source, data_format)
    return data_format


def check_named_columns(source: Source, data_format: DataFormat | None = None) -> None:
    """Raises DataError for a column, or a message key of a known format, that the source names and no record has."""
    keys = (*(key for key in type(source).model_fields if key.endswith("_field")), "choice_fields", "label_fields")
    keys = keys if data_format is not None else tuple(key for key in keys if key not in _KEYS_OF_ENTRIES)
    named = [(key, name) for key in keys if (value := getattr(source, key)) is not None
             for name in ((value,) if isinstance(value, str) else value)]  # fmt: skip
    missing, columns = dict.fromkeys(named), dict[str, None]()
    for record, _ in source_records(source.model_copy(update={"max_rows": None})) if named else ():
        for key, name in list(missing):
            if _has_named(record, key, name, data_format):
                del missing[key, name]
        if not missing:
            return
        columns.update(dict.fromkeys(record))
    for key, name in missing:
        guess, known = closest(name, list(columns)), describe_columns([columns])
        remedy = f"did you mean `{shortened(guess)}`? " if guess else ""
        raise DataError(source.path, f"no column `{name}` ({key})", f"{remedy}its columns are {known}")


def _has_named(record: Record, key: str, name: str, data_format: DataFormat | None) -> bool:
    """Whether a record has what a key of its source names: a column, a key of its messages, or of its answers."""
    of_entries = key in _KEYS_OF_ENTRIES[:2] or (data_format is not None and data_format.kind == "ranking")
    if data_format is not None and key in _KEYS_OF_ENTRIES and of_entries:
        lists = (*data_format.messages_field, *data_format.prompt_field, *data_format.response_field,
                 *data_format.chosen_field, *data_format.rejected_field, *data_format.answers_field)  # fmt: skip
        values = [lookup(record, (column,)) for column in lists]
        entries = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
        texts = any(isinstance(value, str) and value.lstrip().startswith("[") for value in values)
        return texts or any(isinstance(entry, Mapping) and name in entry for entry in entries)
    return find_column(record, (name,)) is not None


def _suggest_columns(source: Source, records: Sequence[Record]) -> None:
    """Raises DataError with the likely recipe keys of an unrecognised format, if they can be inferred."""
    if (inferred := infer_format(records)) is not None:
        keys = ", ".join(f"{key}: {value}" for key, value in {"format": inferred.name, **inferred.fields}.items())
        raise DataError(
            source.path, f"its format is not recognised (its columns are {describe_columns(records)})",
            f"name its columns, probably {keys.replace(chr(39), '')}",
        )  # fmt: skip


def _check_kind(source: Source, method: str, data_format: DataFormat, records: Sequence[Record]) -> None:
    requires_pairs = method == "dpo"
    # Messages beside two answers are the prompt of a pair, unless the recipe names their column
    is_prompt = data_format.kind == "conversation" and source.messages_field is None and _mostly_pairs(records)
    if data_format.has_pairs == requires_pairs and (requires_pairs or not is_prompt):
        return
    if requires_pairs:
        raise DataError(
            source.path, "contains conversations, but DPO needs a chosen and a rejected answer",
            "use preference data, or method: sft",
        )  # fmt: skip
    raise DataError(
        source.path, "contains preference pairs, but SFT needs conversations", "use method: dpo, or another source"
    )


def _mostly_pairs(records: Sequence[Record]) -> bool:
    pairs = [load_format(name) for name in PAIR_FORMATS]
    return sum(any(known.matches(record) for known in pairs) for record in records) > len(records) / 2

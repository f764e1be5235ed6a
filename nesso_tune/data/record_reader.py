"""From a source's records to cleaned examples: format detection, conversion, selection by `where`, scores and rules."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple

from nesso_tune.chat.render import TOOL_CALL
from nesso_tune.conversation import UNKNOWN_LANGUAGE, Completion, Conversation, Message, PreferencePair
from nesso_tune.data.convert import Example, Tool, Unusable, is_empty, read_tool_file, record_language, to_example
from nesso_tune.data.files import LocatedRecord, Record
from nesso_tune.data.formats import (
    DETECTED_FORMATS,
    EXPLICIT_FORMATS,
    DataFormat,
    choose_format,
    describe_columns,
    infer_format,
    load_format,
    lookup,
    recognise_format,
)
from nesso_tune.data.languages import detect_example_language
from nesso_tune.data.sources import source_records
from nesso_tune.data.user_readers import UserReader, is_user_reader, load_user_reader
from nesso_tune.errors import DataError, first_line
from nesso_tune.recipes.builtin import local_path
from nesso_tune.recipes.sections import AUTO, CleanSection, Rule, Source

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

    def read(self, record: Record, where: str) -> Example:
        """The example of a record.

        Raises:
            Unusable: with the reason, if the record is dropped.
            DataError: if its score is not a number, or a user-defined reader fails.
        """
        source = self.source
        if source.where and not is_selected(record, source):
            raise Unusable("not_selected")
        if source.min_score is not None and not source.rules:
            _check_score(record, source, source.min_score, where)
        example = self._convert(record, where)
        if source.language == AUTO and example.language == UNKNOWN_LANGUAGE:
            example = replace(example, language=detect_example_language(example))
        if source.rules:
            self._apply_rule(language_rule(source, example.language), record, where)
        if self.tools and not example.tools and isinstance(example, (Conversation, PreferencePair)):
            example = replace(example, tools=self.tools)
        return clean(example, self.clean)

    def _convert(self, record: Record, where: str) -> Example:
        if isinstance(self.data_format, DataFormat):
            language = record_language(record, self.source)
            return to_example(record, self.data_format, self.method, language, self.source.path)
        return self._convert_with(self.data_format, record, where)

    def _convert_with(self, reader: UserReader, record: Record, where: str) -> Example:
        try:
            result = reader.function(dict(record))
        except (Exception, SystemExit) as error:  # user code may raise anything
            what = f"{reader.name} raised {type(error).__name__}: {first_line(error)}"
            raise DataError(where, what, "correct the function, or let it return None for such rows") from None
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
        language = record_language(result, self.source)
        language = language if language != UNKNOWN_LANGUAGE else record_language(record, self.source)
        return to_example(result, data_format, self.method, language, self.source.path)

    def _validate(self, result: Conversation | PreferencePair, record: Record, where: str) -> Example:
        """A reader's own Conversation or PreferencePair, with the same checks as a record."""
        kind, is_pair = type(result).__name__, isinstance(result, PreferencePair)
        if is_pair != (self.method == "dpo"):
            raise DataError(where, f"a {kind} is not for method {self.method}", "correct the reader")
        try:
            names = ("role", "content", "tool_calls", "train")
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
    reader: RecordReader, records: Iterable[LocatedRecord], dropped: DropCounter
) -> Iterator[Example | None]:
    """The example of each record, or None for a dropped one; the reason is counted in `dropped`."""
    for record, where in records:
        try:
            yield reader.read(record, where)
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
        value = lookup(record, (column,))
        allowed = expected if isinstance(expected, tuple) else (expected,)
        if not any(isinstance(value, bool) == isinstance(v, bool) and value == v for v in allowed):
            return False
    return True


def _check_score(record: Record, source: Source, min_score: float, where: str) -> None:
    """Raises Unusable if the score of a record is too low, DataError if it is not a number."""
    assert source.score_field is not None
    score = lookup(record, (source.score_field,))
    if isinstance(score, bool) or not isinstance(score, (int, float)):
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
    if source.format == "auto" and recognise_format(source, records) is None:
        _suggest_columns(source, records)
    data_format, column = choose_format(source, records), source.language_field
    if column is not None and not any(column in record for record in records):
        columns = sorted({name for record in records for name in record})
        raise DataError(source.path, f"no column `{column}` (language_field)", f"its columns are {', '.join(columns)}")
    _check_kind(source, method, data_format, records)
    return data_format


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
    return sum("chosen" in record and "rejected" in record for record in records) > len(records) / 2


# Zero-width and control characters except tab, line feed and carriage return; soft hyphens; directional marks
INVISIBLE_CHARACTERS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"
    # The two joiners have a meaning in emoji and in Arabic and Indic scripts, but not next to Latin letters or spaces
    "|(?<![^\x00-\u024f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\u024f])"
)

_TextStep = Callable[[str], str]


def clean(example: Example, settings: CleanSection) -> Example:
    """Applies the cleaning steps to characters, empty turns and the order of roles.

    Raises:
        Unusable: if a step drops the example, or a text becomes empty.
    """
    steps = _text_steps(settings)
    if isinstance(example, Completion):
        text = _apply(steps, example.text)
        if not text.strip():
            raise Unusable("empty_text")
        return example if text is example.text else replace(example, text=text)
    if isinstance(example, Conversation):
        messages = _clean_messages(example.messages, settings, steps)
        return example if messages is example.messages else replace(example, messages=messages)
    if isinstance(example, PreferencePair):
        return _clean_pair(example, settings, steps)
    return example


def _text_steps(settings: CleanSection) -> list[_TextStep]:
    steps: list[_TextStep] = []
    if settings.invisible == "remove":
        steps.append(partial(INVISIBLE_CHARACTERS.sub, ""))
    if settings.unicode == "nfc":
        steps.append(_normalize_nfc)
    return steps


def _normalize_nfc(text: str) -> str:
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _apply(steps: Sequence[_TextStep], text: str) -> str:
    for step in steps:
        text = step(text)
    return text


def _clean_pair(pair: PreferencePair, settings: CleanSection, steps: Sequence[_TextStep]) -> PreferencePair:
    """Cleans the prompt with each of the two answers after it."""
    first, second = (
        _clean_messages((*pair.prompt, answer), settings, steps) for answer in (pair.chosen, pair.rejected)
    )
    if len(first) < 2:
        raise Unusable("no_prompt")
    if (first[-1].content, first[-1].tool_calls) == (second[-1].content, second[-1].tool_calls):
        raise Unusable("chosen_equals_rejected")
    return replace(pair, prompt=first[:-1], chosen=first[-1], rejected=second[-1])


def _clean_messages(
    messages: tuple[Message, ...], settings: CleanSection, steps: Sequence[_TextStep]
) -> tuple[Message, ...]:
    if steps:
        messages = tuple(replace(m, content=_apply(steps, m.content)) for m in messages)
        if any(m.role == "assistant" and is_empty(m) for m in messages):
            raise Unusable("empty_answer")
    if settings.empty_turns != "keep" and any(is_empty(m) and m.role in ("user", "system") for m in messages):
        if settings.empty_turns == "drop":
            raise Unusable("empty_turn")
        messages = tuple(m for m in messages if not (is_empty(m) and m.role in ("user", "system")))
    fault = None if settings.role_order == "keep" else role_order_fault(messages)
    if fault is not None and settings.role_order == "merge":
        messages = merge_consecutive_turns(messages)
        fault = role_order_fault(messages)
    if fault is not None:
        raise Unusable("roles_out_of_order", fault)
    return messages


def role_order_fault(messages: Sequence[Message]) -> str | None:
    """A description of the first fault in the order of roles; None if the order is valid."""
    previous_role, speaker = "", None
    for message in messages:
        role = message.role
        if role == previous_role and role != "tool":
            return f"{role} twice in a row"
        if role == "system" and previous_role:
            return f"system after {previous_role}"
        if role == "tool" and not _calls_tool(speaker):
            return "a tool's result without a call"
        if role != "tool":
            speaker = message
        previous_role = role
    return None


def _calls_tool(message: Message | None) -> bool:
    if message is None or message.role != "assistant":
        return False
    return bool(message.tool_calls) or TOOL_CALL.search(message.content) is not None


def merge_consecutive_turns(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Merges consecutive messages of one role, with a blank line between their texts; tool results stay separate."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last is None or last.role != message.role or message.role == "tool" or last.train != message.train:
            merged.append(message)
            continue
        text = "\n\n".join(m.content for m in (last, message) if m.content)
        merged[-1] = replace(last, content=text, tool_calls=(*last.tool_calls, *message.tool_calls))
    return tuple(merged)

"""Data formats: which columns hold the conversation, texts or answers of a record, and what its roles are called.

A format is chosen by name, or recognised by the columns of the first records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from nesso_tune.data.blocks import Record, load_list
from nesso_tune.data.columns import find_column, lookup
from nesso_tune.data.remedies import TO_JSON_LINES
from nesso_tune.errors import DataError, RecipeError, closest, shortened
from nesso_tune.recipes.data_rules import ALL_FORMAT_KEYS, FORMAT_KEYS
from nesso_tune.recipes.load import find_spec, read_spec
from nesso_tune.recipes.sections import NonEmpty, Plain, Role, Section, Source

Names = Annotated[tuple[NonEmpty, ...], Field(strict=False)]

TEMPLATE_COLUMN = re.compile(r"\{([^{}]+)\}")
DETECTED_FORMATS = (  # the most specific columns first
    "hh_rlhf", "ms_swift", "openai_preference", "preference", "messages", "sharegpt", "exchanges", "alpaca",
    "prompt_completion", "ultrafeedback",
)  # fmt: skip
PAIR_FORMATS = ("hh_rlhf", "ms_swift", "openai_preference", "preference", "ultrafeedback")  # those of them with pairs
NESTED_FORMATS = ("messages", "sharegpt", "exchanges")  # detected inside an object, too
EXPLICIT_FORMATS = {  # never detected, since a wrong guess would go unnoticed
    "completion": "trains on whole texts, without turns",
    "pretokenized": "uses token ids as they are",
}

# Keys of a source that replace those of a format: with one column, and with a list
_COLUMN_KEYS = ("messages_field", "role_field", "content_field", "system_field", "tools_field", "prompt_field",
                "input_field", "response_field", "text_field", "chosen_field", "rejected_field")  # fmt: skip
_KTO_LABELS = ("label", "kto_tag")
_LIST_KEYS = ("choice_fields", "label_fields", "labels")
_MAX_SHOWN = 30  # columns, and keys of objects, in a message


class DataFormat(Section):
    """A mapping from columns to the parts of an example.

    Each `*_field` lists column names in order of precedence; a dotted name descends into objects and lists
    (`answers.0.text`).
    """

    kind: Literal["conversation", "instruction", "completion", "pretokenized", "preference", "choice", "ranking"]
    messages_field: Names = ()
    role_field: Names = ()
    content_field: Names = ()
    speakers: Annotated[tuple[Role, ...], Field(strict=False)] = ()
    """Roles in turn, for messages that are plain texts without roles; lists of such texts are concatenated."""
    turn_fields: dict[Role, Names] = Field(default_factory=dict)
    """Keys of the texts of each role, for objects that hold several turns: {user: [input], assistant: [output]}."""
    turn_markers: dict[Role, NonEmpty] = Field(default_factory=dict)
    """What a turn begins with, for conversations in one text: {user: "Human:", assistant: "Assistant:"}."""
    system_field: Names = ()
    tools_field: Names = ()
    prompt_field: Names = ()
    prompt_template: NonEmpty | None = None
    """The prompt as a text with columns in braces, `{context} {question}`, instead of prompt_field."""
    input_field: Names = ()
    """A text that follows the prompt after a blank line."""
    history_field: Names = ()
    """Turns before the prompt: a list of pairs of a question and its answer."""
    response_field: Names = ()
    text_field: Names = ()
    ids_field: Names = ()
    labels_field: Names = ()
    mask_field: Names = ()
    chosen_field: Names = ()
    rejected_field: Names = ()
    choice_fields: Names = ()
    """Columns of the two answers, one of which is preferred."""
    answers_field: Names = ()
    """A list of answers with scores, of which the best and the worst make a pair (kind ranking). response_field and
    answer_score_field are keys of an answer."""
    answer_score_field: Names = ()
    label_fields: Names = ()
    """Columns of the preference: one label, or the votes of several annotators."""
    labels: Annotated[tuple[Plain, ...], Field(strict=False)] = ()
    """The label of the first answer and that of the second; any other value is ignored."""
    roles: dict[str, Role] = Field(default_factory=dict)
    call_roles: Names = ()
    """Roles whose content is a tool call as JSON."""

    @property
    def has_pairs(self) -> bool:
        """Whether its records are preference pairs."""
        return self.kind in ("preference", "choice", "ranking")

    def adapted(self, source: Source) -> DataFormat:
        """This format with the columns and roles that a source sets."""
        update: dict[str, Any] = {
            key: (getattr(source, key),) for key in _COLUMN_KEYS if getattr(source, key) is not None
        }
        update |= {key: getattr(source, key) for key in _LIST_KEYS if getattr(source, key)}
        if source.prompt_field is not None:
            update["prompt_template"] = None
        elif self.kind == "preference" and source.messages_field is not None:  # messages beside two answers
            update["prompt_field"] = (source.messages_field,)
        if source.roles is not None:
            update["roles"] = {**self.roles, **source.roles}
        return self.model_copy(update=update)

    def role_of(self, name: Any) -> Role | None:
        """The role that the data calls `name`: an exact match, or a match of the lower-case name; None if unknown."""
        if isinstance(name, (int, float)):
            name = json.dumps(name) if isinstance(name, bool) else f"{name:g}"
        if not isinstance(name, str):
            return None
        return self.roles.get(name) or self.roles.get(name.strip().lower())

    @property
    def role_keys(self) -> Names:
        """Keys of a message that hold its role."""
        return self.role_field or ("role",)

    @property
    def content_keys(self) -> Names:
        """Keys of a message that hold its text."""
        return self.content_field or ("content",)

    @property
    def fault(self) -> tuple[str, str] | None:
        """The first key with too few columns for its kind, and what is wrong; None if the format is complete."""
        prompt = [] if self.prompt_template is not None else ["prompt_field"]
        set_keys = [key for key in ("role_field", "content_field") if key in self.model_fields_set]
        needed = {
            "conversation": ["messages_field", *([] if self.speakers or self.turn_fields else set_keys)],
            "instruction": [*prompt, "response_field"],
            "completion": ["text_field"],
            "pretokenized": ["ids_field", "labels_field or mask_field"],
            "preference": ["chosen_field", "rejected_field", *set_keys],
            "choice": [*prompt, "choice_fields", "label_fields"],
            "ranking": [*prompt, "answers_field", "response_field", "answer_score_field"],
        }[self.kind]
        for key in needed:
            if not any(getattr(self, name) for name in key.split(" or ")):
                return key, f"names no column in {key}, which kind {self.kind} requires"
        if self.kind == "choice" and len(self.choice_fields) != 2:
            return "choice_fields", f"names {len(self.choice_fields)} columns in choice_fields instead of two"
        return None

    @property
    def required_columns(self) -> tuple[Names, ...]:
        """The alternative names of each column that every record of this format has."""
        template = tuple((name,) for name in TEMPLATE_COLUMN.findall(self.prompt_template or ""))
        prompt = (self.prompt_field,) if self.prompt_template is None else template
        return {
            "conversation": (self.messages_field,),
            "instruction": (*prompt, self.response_field),
            "completion": (self.text_field,),
            "pretokenized": (self.ids_field, (*self.labels_field, *self.mask_field)),
            "preference": (self.chosen_field, self.rejected_field),
            "choice": (*((name,) for name in self.choice_fields), self.label_fields),
            "ranking": (*prompt, self.answers_field),
        }[self.kind]

    def matches(self, record: Record) -> bool:
        """Whether the columns of a record have the names and types of this format."""
        if not all(find_column(record, names) is not None for names in self.required_columns):
            return False
        values = [lookup(record, names) for names in self.required_columns]
        if self.kind == "conversation":
            return self._is_conversation(values[0])
        if self.kind == "completion":
            return isinstance(values[0], str)
        if self.kind == "instruction":
            *prompt, answer = values
            is_answer = isinstance(answer, (str, int, float)) or self._is_messages(answer)
            return is_answer and all(isinstance(value, str) or self._is_messages(value) for value in prompt)
        if self.kind == "ranking":
            answer = values[1][0] if isinstance(values[1], list) and values[1] else None
            return _has_keys(answer, (self.response_field, self.answer_score_field))
        if self.turn_markers:
            texts = [lookup(record, names) for names in (self.prompt_field, self.chosen_field)]
            return any(isinstance(text, str) and split_turns(text, self.turn_markers) for text in texts)
        return True

    def _is_conversation(self, messages: Any) -> bool:
        if isinstance(messages, str) and split_turns(messages, self.turn_markers):
            return True
        if isinstance(messages, str) and messages.lstrip().startswith("["):
            with suppress(ValueError, RecursionError):
                messages = load_list(messages)
        if not isinstance(messages, list) or not messages:
            return False
        first = messages[0]
        if self.speakers:
            return isinstance(first, (str, list))
        if self.turn_fields:
            roles = [role for role, names in self.turn_fields.items() if isinstance(first, Mapping)
                     and isinstance(lookup(first, names), str)]  # fmt: skip
            return {"user", "assistant"} <= set(roles)
        return _has_keys(first, (self.role_keys, self.content_keys))

    def _is_messages(self, value: Any) -> bool:
        """Whether a value is a message or a list of messages, in a format that allows these instead of a text."""
        first = value[0] if isinstance(value, list) and value else value
        return bool(self.role_field) and _has_keys(first, (self.role_keys,))


def _has_keys(value: Any, keys: Sequence[Names]) -> bool:
    return isinstance(value, Mapping) and all(find_column(value, names) is not None for names in keys)


def split_turns(text: str, markers: Mapping[Role, str]) -> list[tuple[Role, str]] | None:
    """The (role, text) of each turn of a text that begins with a marker, without the spaces around; None for others.

    A turn begins with its marker at the beginning of the text, or after a blank line.
    """
    if not markers or not (pattern := _marker_pattern(tuple(markers.values()))).match(text):
        return None
    roles = {marker: role for role, marker in markers.items()}
    _, *parts = pattern.split(text)
    return [(roles[marker], part.strip()) for marker, part in zip(parts[::2], parts[1::2], strict=True)]


@lru_cache(maxsize=16)
def _marker_pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?:\A\s*|\n\n)({'|'.join(map(re.escape, markers))})")


def load_format(name: str) -> DataFormat:
    """A shipped format by name, or the format in a YAML file.

    Raises:
        RecipeError: if there is none, or the file is invalid.
    """
    path = find_spec("formats", name, "format", also=("auto",))
    status = path.stat()
    return _read_format(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)  # the detection of a format tries all shipped ones on every source
def _read_format(path: Path, modified_ns: int, size: int) -> DataFormat:
    return read_spec(path, DataFormat)[0]


def choose_format(source: Source, records: Sequence[Record]) -> DataFormat:
    """The format of a source: the one it names, or the shipped one that most of its first records match.

    Raises:
        DataError: if the records do not match the named format, or no shipped one.
    """
    named = None if source.format == "auto" else load_format(source.format).adapted(source)
    if named is not None and named.fault is not None:
        raise _incomplete(source.format, *named.fault)
    name = recognise_format(source, records, DETECTED_FORMATS if source.format == "auto" else (source.format,))
    nested = recognise_nested(records) if name is None and source.format == "auto" else None
    if name is None and nested is None:
        raise not_matching(source, records)
    if nested is not None:
        name, fields = nested
        source = source.model_copy(update={key: v for key, v in fields.items() if getattr(source, key) is None})
    assert name is not None
    data_format = load_format(name).adapted(source)
    if source.format == "auto":
        _check_keys_used(source, name)
        if not data_format.has_pairs:
            check_not_labelled(source, records)
    if data_format.kind == "choice" and len(data_format.labels) != 2:
        columns = data_format.label_fields
        values = sorted({str(record[column]) for record in records for column in columns if column in record})
        raise DataError(
            source.path, f"the recipe does not say which answer each label prefers: {', '.join(columns)} "
            f"{'is' if len(columns) == 1 else 'are'} {', '.join(values[:5])}",
            "give the label of the first answer and that of the second, e.g. labels: [1, 2]",
        )  # fmt: skip
    return data_format


def recognise_format(source: Source, records: Sequence[Record], names: Sequence[str] = DETECTED_FORMATS) -> str | None:
    """The format among `names` that most records match; None if no record matches any."""
    best, most = None, 0
    for name in names:
        data_format = load_format(name).adapted(source)
        count = sum(data_format.matches(record) for record in records)
        if count > most:
            best, most = name, count
        if most == len(records):  # no later format can match more
            break
    return best


def recognise_nested(records: Sequence[Record], depth: int = 3) -> tuple[str, dict[str, str]] | None:
    """The format of conversations inside an object, and the keys of a source that name them (`data.messages`).

    Of objects inside objects, `depth` are searched.
    """
    for column in {column: None for record in records for column in record}:
        inner = [record[column] for record in records if isinstance(record.get(column), Mapping)]
        if len(inner) <= len(records) / 2:
            continue
        name, fields = recognise_format(Source(path="-"), inner, NESTED_FORMATS), dict[str, str]()
        if name is not None:
            for key in ("messages_field", "system_field", "tools_field"):
                names = [name for name in getattr(load_format(name), key) if any(name in record for record in inner)]
                fields |= {key: names[0]} if names else {}
        elif depth > 1 and (found := recognise_nested(inner, depth - 1)) is not None:
            name, fields = found
        if name is not None:
            return name, {key: f"{column}.{inside}" for key, inside in fields.items()}
    return None


def find_label(records: Sequence[Record]) -> tuple[str, Any] | None:
    """The column that labels answers as good or bad, as for KTO, and the value of a good one; None if there is none.

    It is true or false, also as text, or 1 or 0 beside a `completion`.
    """
    for column in _KTO_LABELS:
        labels = [record[column] for record in records if record.get(column) is not None]
        if len(labels) <= len(records) / 2:
            continue
        if all(isinstance(label, bool) or str(label).strip().lower() in ("true", "false") for label in labels):
            return column, True
        if all(str(label).strip() in ("0", "1") and "completion" in records[0] for label in labels):
            return column, 1
    return None


def check_not_labelled(source: Source, records: Sequence[Record]) -> None:
    """Raises DataError for answers labelled good or bad, as for KTO: SFT would train on the bad ones too."""
    if (found := find_label(records)) is not None and found[0] not in source.where:
        column, good, bad = found[0], json.dumps(found[1]), "false" if found[1] is True else "0"
        raise DataError(
            source.path, f"each answer has a `{column}`, good or bad (as for KTO, which is not supported)",
            f"keep the good ones for SFT (where: {{{column}: {good}}}), make pairs for DPO, or keep all of them "
            f"(where: {{{column}: [{good}, {bad}]}})",
        )  # fmt: skip


def _check_keys_used(source: Source, name: str) -> None:
    """Raises DataError for a key that names columns and that the detected format does not use."""
    unused = [key for key in ALL_FORMAT_KEYS if key not in FORMAT_KEYS[name] and getattr(source, key) is not None]
    if unused:
        what = f"`{unused[0]}` has no effect: the detected format is {name}"
        raise DataError(source.path, what, "remove it, or name the format that the rows have")


def describe_columns(records: Sequence[Record]) -> str:
    """The columns of records, and the keys of objects in lists, as a text."""
    shown, columns = [], sorted({column for record in records for column in record})
    for column in columns[:_MAX_SHOWN]:
        value = next((record[column] for record in records if record.get(column)), None)
        inner = value[0] if isinstance(value, list) and value else value
        keys = ""
        if isinstance(inner, Mapping):
            names = ", ".join(shortened(str(key)) for key in islice(inner, _MAX_SHOWN))
            keys = f" ({'an object' if inner is value else 'a list of objects'} with {names})"
        shown.append(f"{shortened(column)}{keys}")
    left = len(columns) - len(shown)
    return ", ".join([*shown, *([f"and {left:,} more"] if left else [])]) or "none"


def _incomplete(name: str, key: str, fault: str) -> RecipeError:
    """The error for a format that names too few columns, with the line of its file."""
    path = find_spec("formats", name, "format")
    _, document = read_spec(path, DataFormat)
    where = next((document.where((one,)) for one in key.split(" or ") if one in document.value), f"{path}:1")
    in_source = ", or in the source" if key in (*_COLUMN_KEYS, *_LIST_KEYS) else ""
    remedy = f"name the column there, e.g. {key.split(' or ')[0]}: [NAME]{in_source}"
    return RecipeError(where, f"the format {fault}", remedy)


def not_matching(source: Source, records: Sequence[Record]) -> DataError:
    """The error for records that do not match the format of their source."""
    columns = f"its columns are {describe_columns(records)}"
    if source.format == "auto":
        return _not_recognised(source, records, columns)
    likely = recognise_format(Source(path=source.path), records)
    if likely is not None and likely != source.format:
        what = f"its rows are not of format {source.format} ({columns})"
        pairs = " (preference pairs, for method: dpo)" if load_format(likely).has_pairs else ""
        return DataError(source.path, what, f"they look like format {likely}{pairs}: set format: {likely}, or auto")
    data_format = load_format(source.format).adapted(source)
    for names in data_format.required_columns:
        if not any(find_column(record, names) for record in records):
            guess = closest(names[0], sorted({column for record in records for column in record}))
            return DataError(
                source.path, f"no column `{'` or `'.join(names)}` for format {source.format}; {columns}",
                f"did you mean `{guess}`?" if guess else "name the column in the recipe, or set format: auto",
            )  # fmt: skip
    return _wrong_values(source, source.format, data_format, records)


def _not_recognised(source: Source, records: Sequence[Record], columns: str) -> DataError:
    """The error for records that match no format that is detected."""
    for name in DETECTED_FORMATS:
        data_format = load_format(name).adapted(source)
        named = [record for record in records if not _missing(record, data_format)]
        if len(named) > len(records) / 2 and data_format.kind != "ranking":
            return _wrong_values(source, name, data_format, records)
    remedy = ("name the columns (prompt_field: COLUMN and response_field: COLUMN, or messages_field: COLUMN; for init, "
              "--field prompt=COLUMN …), or convert the rows with a reader of your own (see docs/data.md)")  # fmt: skip
    explicit = recognise_format(source, records, tuple(EXPLICIT_FORMATS))
    if explicit is not None:
        remedy = f"set format: {explicit} if they are of this kind ({EXPLICIT_FORMATS[explicit]}), or {remedy}"
    if all(" " in column.strip() for record in records for column in record):
        remedy = f"if it is a table, its first line must name the columns; or {remedy}"
    return DataError(source.path, f"its format is not recognised ({columns})", remedy)


def _wrong_values(source: Source, name: str, data_format: DataFormat, records: Sequence[Record]) -> DataError:
    """The error for records with the columns of a format, whose values are of other types."""

    wrong = [record for record in records if not data_format.matches(record)]
    record = min(wrong, key=lambda record: _missing(record, data_format))
    held = {column: lookup(record, names) for names in data_format.required_columns
            if (column := find_column(record, names)) is not None}  # fmt: skip
    column = next((column for column, value in held.items() if not isinstance(value, str)), "")
    fault, remedy = f"`{column}` is {_kind_of(held.get(column))}, not text", "check the rows, or name other columns"
    if data_format.kind == "instruction" and data_format.role_field:
        fault = f"{' and '.join(f'`{column}`' for column in held)} are not both text or messages"
    if not column:
        fault = "no row has text in all of them"
    if data_format.kind == "ranking":
        fault = "not a list of answers with scores"
    if data_format.kind == "conversation":
        keys = f"{'/'.join(data_format.role_keys)} and {'/'.join(data_format.content_keys)}"
        fault, remedy = f"not messages with {keys}", "set role_field and content_field to the keys of a message"
        if not column and held:
            fault, remedy = f"`{next(iter(held))}` is a text, not a list of messages", TO_JSON_LINES
    return DataError(source.path, f"its rows have the columns of format {name}, but {fault}", remedy)


def _missing(record: Record, data_format: DataFormat) -> int:
    """The number of columns that a format requires and a record has no value for."""
    return sum(lookup(record, names) is None for names in data_format.required_columns)


def _kind_of(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", type(None): "null", bool: "true or false", int: "a number",
             bytes: "bytes"}  # fmt: skip
    return kinds.get(type(value), f"a {type(value).__name__}")

"""Converts a record to an example: a conversation, preference pair, plain text or sequence of token ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nesso_tune.chat.encoding import IGNORE_INDEX
from nesso_tune.conversation import (
    UNKNOWN_LANGUAGE,
    Completion,
    Conversation,
    Message,
    PreferencePair,
    Tokenized,
    language_code,
)
from nesso_tune.data.blocks import Record
from nesso_tune.data.columns import Row, Unusable, as_number, check_text, find_column, is_equal, lookup, missing
from nesso_tune.data.formats import TEMPLATE_COLUMN, DataFormat, split_turns
from nesso_tune.data.messages import answer_text, first_key, is_parts, text_of_parts, to_message, to_messages
from nesso_tune.data.tools import Tool, parse_json, read_tools
from nesso_tune.recipes.sections import AUTO, Source

Example = Conversation | Completion | Tokenized | PreferencePair


def to_example(record: Record | Row, data_format: DataFormat, method: str, language: str, source: str) -> Example:
    """The example of a record: a preference pair for `dpo`, any other kind for `sft`.

    A `Row` notes what is read of its record, so that the rest can be reported.

    Raises:
        Unusable: with the reason.
    """
    row = Row.of(record)
    if method == "dpo":
        return to_pair(row, data_format, language, source)
    if data_format.kind == "completion":
        text = check_text(row.require(data_format.text_field)[1])
        if not text.strip():
            raise Unusable("empty_text")
        return Completion(text, language, source)
    if data_format.kind == "pretokenized":
        return _to_tokenized(row, data_format, language, source)
    return to_conversation(row, data_format, language, source)


def to_conversation(record: Record | Row, data_format: DataFormat, language: str, source: str) -> Conversation:
    """The conversation of a record.

    Raises:
        Unusable: with the reason.
    """
    row = Row.of(record)
    if data_format.kind == "conversation":
        name, value = row.require(data_format.messages_field)
        messages = to_messages(value, data_format, row, str(name))
    else:
        messages = _question_and_answer(row, data_format)
    messages = [*_system_message(row, data_format, messages), *messages]
    if not any(message.role == "assistant" for message in messages):
        raise Unusable("no_assistant_turn")
    if any(is_empty(message) for message in messages if message.role == "assistant"):
        raise Unusable("empty_answer")
    return Conversation(tuple(messages), _tools(row, data_format), language, source)


def to_pair(record: Record | Row, data_format: DataFormat, language: str, source: str) -> PreferencePair:
    """The preference pair of a record.

    Raises:
        Unusable: with the reason.
    """
    row = Row.of(record)
    prompt, better, worse = _common_prompt(*_prompt_and_answers(row, data_format))
    if not prompt:
        raise Unusable("no_prompt")
    prompt = [*_system_message(row, data_format, prompt), *prompt]
    if better.role != "assistant" or worse.role != "assistant" or prompt[-1].role == "assistant":
        raise Unusable("answer_not_by_assistant")
    if better.train is False or worse.train is False:
        raise Unusable("answer_not_supervised")
    if is_empty(better) or is_empty(worse):
        raise Unusable("empty_answer")
    if (better.content, better.tool_calls, better.reasoning) == (worse.content, worse.tool_calls, worse.reasoning):
        raise Unusable("chosen_equals_rejected")
    return PreferencePair(tuple(prompt), better, worse, language, source, _tools(row, data_format))


def record_language(record: Record | Row, source: Source) -> str:
    """The language code of a record: that of its source, or of its language column; `und` if neither is set.

    With `language: auto` it is that of the column too; where that is empty, the language is detected later.

    Raises:
        Unusable: if the column is not valid Unicode.
    """
    if source.language not in (None, AUTO):
        return language_code(source.language) or UNKNOWN_LANGUAGE
    columns = (source.language_field,) if source.language_field else ("language", "lang")
    value = Row.of(record).lookup(columns)
    if not isinstance(value, str) or not value.strip():
        return UNKNOWN_LANGUAGE
    return language_code(check_text(value)) or UNKNOWN_LANGUAGE


def is_empty(message: Message) -> bool:
    """Whether a message has neither text nor tool calls."""
    return not message.content.strip() and not message.tool_calls


def _to_tokenized(row: Row, data_format: DataFormat, language: str, source: str) -> Tokenized:
    """The token ids of a record, with its labels, or with labels from its mask.

    Raises:
        Unusable: if they are not integers or differ in length, or a label is neither its token nor -100.
    """
    ids, labels = row.lookup(data_format.ids_field), row.lookup(data_format.labels_field)
    if not _are_integers(ids):
        raise Unusable("ids_not_numbers")
    if labels is None:
        mask = row.lookup(data_format.mask_field)
        if not isinstance(mask, list) or len(mask) != len(ids) or not all(m in (0, 1) for m in mask):
            raise Unusable("no_labels")
        labels = [token if m else IGNORE_INDEX for token, m in zip(ids, mask, strict=True)]
    if not _are_integers(labels) or len(labels) != len(ids):
        raise Unusable("labels_do_not_fit")
    if any(label not in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True)):
        raise Unusable("labels_do_not_fit", "a label is neither its token nor -100")
    return Tokenized(tuple(ids), tuple(labels), language, source)


def _are_integers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(number) is int for number in value)


def _question_and_answer(row: Row, data_format: DataFormat) -> list[Message]:
    """The turns of a record with a prompt and a response, each a text, or messages if the format names their keys.

    As in TRL, only the response is supervised if the prompt is a list of messages.
    """
    prompt = _prompt(row, data_format)
    name, value = row.require(data_format.response_field)
    if data_format.role_field:
        answers = _to_turns(value, "assistant", data_format, row, str(name))
        prompt = [replace(turn, train=False) if turn.role == "assistant" else turn for turn in prompt]
    else:
        answers = [Message("assistant", answer_text(value, row))]
    return [*prompt, *answers]


def _prompt(row: Row, data_format: DataFormat) -> list[Message]:
    """The turns before the answer: history, and prompt with its input; or the filled-in template; or messages.

    Empty for a preference pair without prompt.
    """
    if data_format.prompt_template is not None:
        text = TEMPLATE_COLUMN.sub(
            lambda match: check_text(row.require((match.group(1),))[1]), data_format.prompt_template
        )
        return [*_history(row, data_format), Message("user", text)]
    name, value = row.find(data_format.prompt_field)
    if value is None and data_format.kind != "preference":
        raise missing(row.columns, data_format.prompt_field)
    if value is None:
        return []
    turns = split_turns(value, data_format.turn_markers) if isinstance(value, str) else None
    if turns is not None and turns[-1] == ("assistant", ""):  # the beginning of the answer
        turns = turns[:-1]
    if turns is not None:
        return [Message(role, check_text(text)) for role, text in turns]
    if isinstance(value, (list, Mapping)) and (data_format.role_field or data_format.kind == "preference"):
        return _to_turns(value, "user", data_format, row, str(name))
    prompt = check_text(value)
    further = row.lookup([column for column in data_format.input_field if column != name])
    further = "" if further is None else answer_text(further, row)
    text = f"{prompt}\n\n{further}" if further.strip() else prompt
    return [*_history(row, data_format), Message("user", text)]


def _history(row: Row, data_format: DataFormat) -> list[Message]:
    """Earlier turns in a column of their own: pairs of a question and its answer, as in LLaMA-Factory, or messages."""
    name, value = row.find(data_format.history_field)
    value = parse_json(value, "history_not_readable")
    if value is None or value in ("", []):
        return []
    if not isinstance(value, list):
        raise Unusable("history_not_readable")
    if data_format.role_field and all(isinstance(entry, Mapping) for entry in value):
        return to_messages(value, data_format, row, str(name))
    if not all(isinstance(entry, list) and len(entry) == 2 for entry in value):
        raise Unusable("history_not_readable", "not a list of pairs")
    turns = ((Message("user", check_text(q)), Message("assistant", answer_text(a, row))) for q, a in value)
    return [message for pair in turns for message in pair]


def _prompt_and_answers(row: Row, data_format: DataFormat) -> tuple[list[Message], list[Message], list[Message]]:
    """The prompt of a pair, and the chosen and the rejected answer, either of which may be a whole conversation."""
    prompt = _prompt(row, data_format)
    if data_format.kind in ("choice", "ranking"):
        answers = _answers_by_vote if data_format.kind == "choice" else _answers_by_score
        better, worse = answers(row, data_format)
        return prompt, [Message("assistant", better)], [Message("assistant", worse)]
    (name, chosen), (other, rejected) = row.require(data_format.chosen_field), row.require(data_format.rejected_field)
    return (
        prompt,
        _to_turns(chosen, "assistant", data_format, row, str(name)),
        _to_turns(rejected, "assistant", data_format, row, str(other)),
    )


def _common_prompt(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], Message, Message]:
    """The prompt and the two answers. The prompt of whole conversations is their common beginning.

    If one of the two is a single answer, it answers the beginning of the other.
    """
    conversations = [turns for turns in (chosen, rejected) if len(turns) > 1]
    if conversations:
        shared = conversations[0][:-1]
        if conversations[-1][:-1] != shared:
            raise Unusable("no_common_prompt")
        if prompt and shared[-len(prompt) :] != prompt:
            raise Unusable("prompt_differs_from_dialogue")
        prompt = shared
    return prompt, chosen[-1], rejected[-1]


def _to_turns(value: Any, role: str, data_format: DataFormat, row: Row, path: str) -> list[Message]:
    """A text as one message of `role` or, if its turns are marked, as several; a single message; or a list."""
    if isinstance(value, str):
        if (turns := split_turns(value, data_format.turn_markers)) is not None:
            return [Message(speaker, check_text(text)) for speaker, text in turns]
        return [Message(role, check_text(value.strip() if data_format.turn_markers else value))]
    if isinstance(value, (bool, int, float)) and role == "assistant":
        return [Message(role, answer_text(value, row))]
    if isinstance(value, Mapping):
        return [to_message(value, data_format, row, path)]
    return to_messages(value, data_format, row, path)


def _answers_by_vote(row: Row, data_format: DataFormat) -> tuple[str, str]:
    """The better and the worse of two answers, by label or by majority vote."""
    first, second = (answer_text(row.require((name,))[1], row) for name in data_format.choice_fields)
    votes = [row.lookup((name,)) for name in data_format.label_fields]
    if all(vote is None for vote in votes):
        raise Unusable("missing_field", f"no {' or '.join(data_format.label_fields)}")
    counts = [sum(is_equal(vote, label) for vote in votes) for label in data_format.labels]
    if counts[0] == counts[1]:
        raise Unusable("no_preferred_answer", "a tie, or no label that the recipe names")
    return (first, second) if counts[0] > counts[1] else (second, first)


def _answers_by_score(row: Row, data_format: DataFormat) -> tuple[str, str]:
    """The answers with the highest and the lowest score of a list; of several with one score, the first."""
    name, value = row.require(data_format.answers_field)
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise Unusable("answers_not_readable")
    scored: list[tuple[float, Any]] = []
    for entry in value:
        key, score = first_key(entry, data_format.answer_score_field)
        content, text = first_key(entry, data_format.response_field)
        row.note_unread(str(name), entry, (key, content))
        number = as_number(score)
        if number is not None and math.isfinite(number) and text is not None:
            scored.append((number, text))
    scores = [score for score, _ in scored]
    if len(set(scores)) < 2:
        raise Unusable("no_preferred_answer", "fewer than two answers with different scores")
    best, worst = (scored[scores.index(bound(scores))][1] for bound in (max, min))
    return answer_text(best, row), answer_text(worst, row)


def _system_message(row: Row, data_format: DataFormat, messages: Sequence[Message]) -> list[Message]:
    """The system message in a column of its own: a text, a list of lines or parts, or a message.

    None if the messages begin with one.
    """
    if messages[0].role == "system":
        column = find_column(row.columns, data_format.system_field)
        if column is not None and lookup(row.columns, (column,)) in (None, "", messages[0].content):
            row.read.add(column)
        return []
    name, value = row.find(data_format.system_field)
    if isinstance(value, Mapping):  # a message, or what it contains
        key, inner = first_key(value, (*data_format.content_keys, "content", "parts", "text"))
        row.note_unread(str(name), value, (key, "role"))
        value = inner
    if is_parts(value):
        value = text_of_parts(value, row, str(name))
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if name is not None and value is not None and not isinstance(value, str):
        row.read.discard(name)
    if not isinstance(value, str) or not value.strip():
        return []
    return [Message("system", check_text(value))]


def _tools(row: Row, data_format: DataFormat) -> tuple[Tool, ...]:
    name, value = row.find(data_format.tools_field)
    return read_tools(value, row, str(name))

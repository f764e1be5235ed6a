"""From a row of a data set to a conversation or a preference pair, or to the reason why it cannot be used."""

from __future__ import annotations

from typing import Any

from nesso_tune.chat.encoding import IGNORED
from nesso_tune.conversation import (
    UNKNOWN_LANGUAGE,
    Completion,
    Conversation,
    Message,
    PreferencePair,
    Tokenized,
    language_code,
)
from nesso_tune.data.formats import PLACEHOLDER, DataFormat, Row, find, lookup
from nesso_tune.data.messages import column_of, is_empty, messages_of, system_of, text_of, turns_of
from nesso_tune.data.tools import Tool, Unusable, read_tools
from nesso_tune.recipes.data import AUTO, Source

Item = Conversation | Completion | Tokenized | PreferencePair


def to_item(row: Row, fmt: DataFormat, method: str, language: str, source: str) -> Item:
    """What a row holds for a method: `sft` learns conversations and texts, `dpo` pairs.

    Raises:
        Unusable: with the reason.
    """
    if method == "dpo":
        return to_pair(row, fmt, language, source)
    if fmt.kind == "completion":
        text = text_of(column_of(row, fmt.text_field))
        if not text.strip():
            raise Unusable("empty_text")
        return Completion(text, language, source)
    return (
        tokenized(row, fmt, language, source)
        if fmt.kind == "pretokenized"
        else to_conversation(row, fmt, language, source)
    )


def to_conversation(row: Row, fmt: DataFormat, language: str, source: str) -> Conversation:
    """The conversation that a row holds.

    Raises:
        Unusable: with the reason.
    """
    if fmt.kind == "conversation":
        messages = messages_of(column_of(row, fmt.messages_field), fmt)
    else:
        answer = Message("assistant", text_of(column_of(row, fmt.response_field)))
        messages = [Message("user", _prompt(row, fmt)), answer]
    messages = [*system_of(row, fmt, messages), *messages]
    if not any(message.role == "assistant" for message in messages):
        raise Unusable("no_assistant_turn")
    if any(is_empty(message) for message in messages if message.role == "assistant"):
        raise Unusable("empty_answer")
    return Conversation(tuple(messages), _tools(row, fmt), language, source)


def to_pair(row: Row, fmt: DataFormat, language: str, source: str) -> PreferencePair:
    """The preference pair that a row holds.

    Raises:
        Unusable: with the reason.
    """
    if fmt.kind == "choice":
        prompt = [Message("user", _prompt(row, fmt))]
        better, worse = _voted(row, fmt)
        chosen, rejected = [Message("assistant", better)], [Message("assistant", worse)]
    else:
        said = lookup(row, fmt.prompt_field)
        prompt = [] if said is None else turns_of(said, "user", fmt)
        chosen = turns_of(column_of(row, fmt.chosen_field), "assistant", fmt)
        rejected = turns_of(column_of(row, fmt.rejected_field), "assistant", fmt)
    if len(chosen) > 1 or len(rejected) > 1:  # whole dialogues: the prompt is what both begin with
        shared = chosen[:-1]
        if shared != rejected[:-1]:
            raise Unusable("no_common_prompt")
        if prompt and shared[-len(prompt) :] != prompt:
            raise Unusable("prompt_differs_from_dialogue")
        prompt, chosen, rejected = shared, chosen[-1:], rejected[-1:]
    if not prompt:
        raise Unusable("no_prompt")
    prompt = [*system_of(row, fmt, prompt), *prompt]
    answer, other = chosen[0], rejected[0]
    if answer.role != "assistant" or other.role != "assistant" or prompt[-1].role == "assistant":
        raise Unusable("answer_not_by_assistant")
    if is_empty(answer) or is_empty(other):
        raise Unusable("empty_answer")
    if (answer.content, answer.tool_calls) == (other.content, other.tool_calls):
        raise Unusable("chosen_equals_rejected")
    return PreferencePair(tuple(prompt), answer, other, language, source, _tools(row, fmt))


def tokenized(row: Row, fmt: DataFormat, language: str, source: str) -> Tokenized:
    """The token ids that a row holds, with labels or a mask.

    Raises:
        Unusable: if they are no whole numbers, of different length, or a label is not its token.
    """
    ids, labels, mask = (lookup(row, names) for names in (fmt.ids_field, fmt.labels_field, fmt.mask_field))
    if not _numbers(ids):
        raise Unusable("ids_not_numbers")
    if labels is None:
        if not isinstance(mask, list) or len(mask) != len(ids) or not all(m in (0, 1) for m in mask):
            raise Unusable("no_labels")
        labels = [token if m else IGNORED for token, m in zip(ids, mask, strict=True)]
    if not _numbers(labels) or len(labels) != len(ids):
        raise Unusable("labels_do_not_fit")
    if any(label not in (IGNORED, token) for token, label in zip(ids, labels, strict=True)):
        raise Unusable("labels_do_not_fit", "a label is neither its token nor -100")
    return Tokenized(tuple(ids), tuple(labels), language, source)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(number) is int for number in value)


def _prompt(row: Row, fmt: DataFormat) -> str:
    """The prompt of a row without turns: its column and further input, or the template filled in."""
    if fmt.prompt_template is not None:
        return PLACEHOLDER.sub(lambda match: text_of(column_of(row, (match.group(1),))), fmt.prompt_template)
    prompt, further = text_of(column_of(row, fmt.prompt_field)), lookup(row, fmt.input_field)
    if further is None or find(row, fmt.prompt_field) == find(row, fmt.input_field):
        return prompt
    further = text_of(further)
    return f"{prompt}\n\n{further}" if further.strip() else prompt


def _voted(row: Row, fmt: DataFormat) -> tuple[str, str]:
    """The better and the worse of two answers, by label or by the majority of the votes."""
    first, second = (text_of(column_of(row, (name,))) for name in fmt.choice_fields)
    votes = [lookup(row, (name,)) for name in fmt.label_fields]
    if all(vote is None for vote in votes):
        raise Unusable("missing_field", f"no {' or '.join(fmt.label_fields)}")
    counts = [sum(_same(vote, label) for vote in votes) for label in fmt.labels]
    if counts[0] == counts[1]:
        raise Unusable("no_preferred_answer", "a tie, or no label that the recipe names")
    return (first, second) if counts[0] > counts[1] else (second, first)


def _same(vote: Any, label: Any) -> bool:
    """Whether a vote is a label: 1, 1.0 and "1" are, true is not."""
    if isinstance(vote, bool) or isinstance(label, bool):
        return vote is label
    return bool(vote == label or str(vote).strip() == str(label))


def language_of(row: Row, source: Source) -> str:
    """The language code of a row: the source's, or that of the row's own field; `und` if neither says.

    `language: auto` is the row's own too; where a row says nothing, its words are asked (`languages.py`).

    Raises:
        Unusable: if it is not Unicode text.
    """
    if source.language not in (None, AUTO):
        return _code(source.language)
    names = (source.language_field,) if source.language_field else ("language", "lang")
    said = lookup(row, names)
    if not isinstance(said, str) or not said.strip():
        return UNKNOWN_LANGUAGE
    return _code(text_of(said))


def _code(said: str) -> str:
    return language_code(said) or UNKNOWN_LANGUAGE


def _tools(row: Row, fmt: DataFormat) -> tuple[Tool, ...]:
    return read_tools(lookup(row, fmt.tools_field))

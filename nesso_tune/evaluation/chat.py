"""Answers to everyday prompts: whether they end, their language, loops, length, empty ones, and reference answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nesso_tune.conversation import Conversation, Message, language_code
from nesso_tune.data.languages import CANDIDATE_LANGUAGES, detect_language
from nesso_tune.evaluation.prompts import Row, answer_all, answer_losses
from nesso_tune.evaluation.results import KNOWN, AnsweredPrompt, Metric, TaskResult, means_by_group
from nesso_tune.evaluation.suites import Task
from nesso_tune.generation.answers import Answer, ends_in_loop, has_prose
from nesso_tune.generation.inference import AnswerLoss, ChatModel
from nesso_tune.metric_registry import better_direction, own_metrics, score_of

MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt: a conversation that ends with a user turn, its id, and a reference answer if there is one."""

    id: str
    conversation: Conversation
    answer: str | None = None

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.conversation.messages[-1].content


def parse_row(row: Row) -> ChatPrompt:
    """A row `{"prompt": …}` or `{"messages": […]}`, with an optional `language`, detected otherwise, `id` and `answer`.

    A last assistant turn in `messages` is the reference answer.

    Raises:
        KeyError, ValueError: if there is no prompt, it is empty or does not end with a user turn, or a value is wrong.
    """
    messages = _messages(row)
    answer = None if row.get("answer") is None else _text(row["answer"], "answer")
    if len(messages) > 1 and messages[-1].role == "assistant":
        *messages, last = messages
        answer = last.content
    if messages[-1].role != "user":
        raise ValueError("does not end with a user turn")
    if not messages[-1].content.strip():
        raise ValueError("the prompt is empty")
    return ChatPrompt(str(row.get("id", "")), Conversation(tuple(messages), language=_language(row, messages)), answer)


def _messages(row: Row) -> list[Message]:
    """The turns of a row; at least one."""
    if "messages" not in row:
        return [Message("user", _text(row["prompt"], "prompt"))]
    turns = row["messages"]
    if not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("`messages` is not a list of turns")
    return [Message(str(turn["role"]), _text(turn["content"], "content")) for turn in turns]


def _text(value: Any, key: str) -> str:
    """A value as text, numbers too."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"`{key}` is neither a text nor a number")
    return str(value)


def _language(row: Row, messages: Sequence[Message]) -> str:
    """The language code of a row, detected if it has none."""
    if row.get("language") in (None, ""):
        return detect_language(" ".join(message.content for message in messages if message.role == "user"))
    code = language_code(str(row["language"]))
    if code is None:
        raise ValueError(f"`language` is `{row['language']}`, which is no language code such as it or en")
    return code


def run(task: Task, prompts: Sequence[ChatPrompt], model: ChatModel) -> TaskResult:
    """Answers of a model, and their metrics."""
    conversations = [prompt.conversation for prompt in prompts]
    answers = answer_all(model, conversations, task.max_new_tokens or MAX_NEW_TOKENS)
    return score(prompts, answers, answer_losses(model, conversations, [prompt.answer for prompt in prompts]))


def _is_in_language(answer: Answer) -> bool | None:
    """Whether an answer is in the language of its prompt; None if it is short, or that language is unknown.

    A longer answer without a detectable language is in none. If it were left out, broken answers would not count.
    """
    is_broken = answer.language in CANDIDATE_LANGUAGES and answer.in_language is None and has_prose(answer.text)
    return False if is_broken else answer.in_language


def score(prompts: Sequence[ChatPrompt], answers: Sequence[Answer], losses: Sequence[AnswerLoss | None]) -> TaskResult:
    """Metrics over all prompts and by language (`stop_rate/it`).

    - `stop_rate`: share of answers that end with the end token.
    - `language_fidelity`: share in the language of the prompt, of the answers with enough letters to tell.
    - `repetition_rate`: share that ends in a loop (see `ends_in_loop`).
    - `empty_rate`: share without text.
    - `answer_tokens`: mean length in tokens.
    - `bits_per_byte`: loss of the reference answers without their end tokens, a mean over prompts that have one.
    - `known`: share of these prompts whose reference answer has less than half the loss of guessing. What a model does
      on other prompts is chance, so a gate does not compare them.
    - own metrics (see `answer_metric`), as they are registered.

    Raises:
        RecipeError: if the function of an own metric fails.
    """
    languages = [prompt.conversation.language for prompt in prompts]
    groups = [lambda i: languages[i]]
    bits = [None if loss is None else loss.bits_per_byte for loss in losses]
    metrics: dict[str, Metric] = {
        **means_by_group("stop_rate", [a.stopped for a in answers], groups),
        **means_by_group("language_fidelity", map(_is_in_language, answers), groups),
        **means_by_group("repetition_rate", [ends_in_loop(a.ids) for a in answers], groups, "lower"),
        **means_by_group("empty_rate", [not a.text.strip() for a in answers], groups, "lower"),
        **means_by_group("answer_tokens", [len(a.ids) for a in answers], groups, None),
        **means_by_group("bits_per_byte", bits, groups, "lower"),
        **means_by_group(KNOWN, [None if loss is None else loss.is_known for loss in losses]),
    }
    for name, function in own_metrics().items():
        scores = [score_of(name, function, answer) for answer in answers]
        metrics |= means_by_group(name, scores, groups, better_direction(name))
    shown = tuple(
        AnsweredPrompt(prompt.id or str(i), prompt.conversation.language, prompt.text, answer.text, answer.stopped)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    )
    return TaskResult(metrics, shown)

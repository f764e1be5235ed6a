"""Answers of a model to prompts from the data, and their metrics: the quality of the model during training."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nesso_tune.conversation import UNKNOWN_LANGUAGE
from nesso_tune.data.languages import CANDIDATE_LANGUAGES, detect_language
from nesso_tune.data.packing import Rows
from nesso_tune.data.token_store import Documents
from nesso_tune.metric_registry import AnswerScore, score_of
from nesso_tune.model.forward import generate_greedily
from nesso_tune.model.lm_head import GenerationMode, forward_path

BATCH_SIZE = 32  # prompts per batch of generation
SOURCE = "source/"  # prefix of a source's name in the name of a metric

# Prompts


@dataclass(frozen=True)
class Prompt:
    """Token ids to generate from, and the answers in the data.

    Attributes:
        ids: up to and including the assistant header.
        expected: ids of the answer, end token included; in preference data, of the chosen answer.
        rejected: ids of the rejected answer; empty for conversations.
        language: code.
        source: index of its source.
        private: its text must not be shown.
    """

    ids: list[int]
    expected: list[int]
    rejected: list[int]
    language: str
    source: int = 0
    private: bool = False


def select_prompts(rows: Rows, count: int) -> list[Prompt]:
    """Up to `count` prompts of the records in `rows`, deterministic.

    They are balanced over the languages, and within a language taken from its sources in turn.
    """
    by_language: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number in map(int, np.unique(rows.records)):
        by_language[rows.documents.language(number)][int(rows.documents.sources[number])].append(number)
    prompts: list[Prompt] = []
    queues = [_round_robin([by_source[i] for i in sorted(by_source)]) for _, by_source in sorted(by_language.items())]
    while queues and len(prompts) < count:
        for queue in list(queues):
            record = next(queue, None)
            if record is None:
                queues.remove(queue)
            elif len(prompts) < count and (prompt := _prompt_of(rows.documents, record)) is not None:
                prompts.append(prompt)
    return prompts


def _round_robin(queues: Sequence[Sequence[int]]) -> Iterator[int]:
    """The first item of each queue, then the second of each, and so on."""
    rounds = zip_longest(*queues)
    return (item for items in rounds for item in items if item is not None)


def _prompt_of(documents: Documents, record: int) -> Prompt | None:
    """The prompt of a pair, or of the last answer of a conversation; None if there is none."""
    origin = documents.language(record), int(documents.sources[record]), documents.is_private(record)
    if documents.documents_per_record == 3:
        prompt, chosen, rejected = (documents.input_ids(record, part).tolist() for part in range(3))
        return Prompt(prompt, chosen, rejected, *origin)
    ids, supervised = documents.input_ids(record).tolist(), documents.supervised[documents.token_slice(record)]
    start, end = _last_span(supervised.tolist())
    return Prompt(ids[:start], ids[start:end], [], *origin) if start > 0 else None


def _last_span(flags: Sequence[int]) -> tuple[int, int]:
    """Bounds of the last span of nonzero flags; (0, 0) if there is none."""
    end = next((i + 1 for i in range(len(flags) - 1, -1, -1) if flags[i]), 0)
    start = end
    while start > 0 and flags[start - 1]:
        start -= 1
    return start, end


# Answers


@dataclass(frozen=True)
class Answer:
    """A generated answer and the answers in the data.

    Attributes:
        prompt: the prompt.
        text: of the answer, without special tokens.
        expected: text of the data's answer.
        rejected: text of the data's rejected answer; empty if there is none.
        stopped: the model generated the end token.
        ids: tokens of the answer, without the end token.
        expected_tokens: number of tokens of the data's answer, without the end token.
        expected_stops: the data's answer, with its end token, fits into `max_new_tokens`.
        prompt_text: the whole prompt as text, without special tokens.
    """

    prompt: Prompt
    text: str
    expected: str
    rejected: str
    stopped: bool
    ids: Sequence[int] = ()
    expected_tokens: int = 0
    expected_stops: bool = True
    prompt_text: str = ""

    @property
    def language(self) -> str:
        """Code of the language of the prompt."""
        return self.prompt.language

    @cached_property
    def in_language(self) -> bool | None:
        """See `is_in_language`."""
        return is_in_language(self.text, self.prompt.language, self.expected)


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    autocast: AbstractContextManager[Any],
    rank: int = 0,
    world_size: int = 1,
    mode: GenerationMode | None = None,
) -> list[Answer]:
    """Greedy answers, in the order of the prompts. Does not change the state of random generators.

    With a world size, each process answers its part of every batch, and all processes get all answers. `mode` is that
    of the model's forward path by default.
    """
    mode = mode or forward_path(model).generation
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    generated: dict[int, list[int]] = {}
    with autocast:
        for start in range(0, len(by_length), BATCH_SIZE):
            batch = by_length[start : start + BATCH_SIZE]
            limit = _new_tokens(model, len(prompts[batch[-1]].ids), max_new_tokens)
            own = batch[rank::world_size]
            # a rank without a prompt answers one too: FSDP prefetches by its record of forward passes, and would hang
            answers = _generate(model, tokenizer, [prompts[i] for i in own or batch[:1]], limit, mode)
            generated |= dict(zip(own, answers, strict=bool(own)))
    if world_size > 1:
        generated = dict(gather_object(list(generated.items())))
    return [_decode(tokenizer, prompt, generated[i], max_new_tokens) for i, prompt in enumerate(prompts)]


def _new_tokens(model: PreTrainedModel, longest: int, max_new_tokens: int) -> int:
    """The length of answers in a batch whose longest prompt has `longest` tokens: they end with the context."""
    context = getattr(model.config, "max_position_embeddings", None) or longest + max_new_tokens
    return max(1, min(max_new_tokens, context - longest))


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    limit: int,
    mode: GenerationMode,
) -> list[list[int]]:
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return generate_greedily(model, [prompt.ids for prompt in prompts], mode, limit, pad=pad, end=end)


def _decode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: list[int], max_new_tokens: int) -> Answer:
    end = tokenizer.eos_token_id
    own, expected, rejected = (_before(end, part) for part in (ids, prompt.expected, prompt.rejected))
    parts = (own, expected, rejected, prompt.ids)
    text, expected_text, rejected_text, asked = (tokenizer.decode(ids, skip_special_tokens=True) for ids in parts)
    return Answer(
        prompt, text, expected_text, rejected_text, stopped=end in ids, ids=own, expected_tokens=len(expected),
        expected_stops=len(expected) < max_new_tokens, prompt_text=asked,
    )  # fmt: skip


def _before(end: int | None, ids: list[int]) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


# Metrics

AnswerMetric = Callable[[Answer], "float | bool | None"]  # of a single answer; None if undefined


def answer_metrics(
    answers: Sequence[Answer], prefix: str = "", sources: Sequence[str] = (), own: Mapping[str, AnswerScore] = {}
) -> dict[str, float]:
    """Means over answers: in total, by language (`name/it`), and by source (`name/source/NAME`).

    - `answers`: number of answers.
    - `stop_rate`: share that ends with the end token.
    - `expected_stop_rate`: share for which the data's answer is short enough to end in time.
    - `exact_match`: share equal to the data's (chosen) answer.
    - `closer_to_chosen`: in preference data, share that is more similar to the chosen than to the rejected answer, by
      characters.
    - `language_fidelity`: share in the language of the prompt, among the `answers_told` with a detected language (see
      `is_in_language`); absent without such answers.
    - `repetition_rate`: share that ends in a loop (see `ends_in_loop`).
    - `answer_tokens`, `expected_tokens`: length of the answers and of the data's answers.

    Args:
        answers: any number.
        prefix: of each name.
        sources: names of the sources, indexed by `Prompt.source`; with fewer than two there are no metrics by source.
        own: further metrics by name.

    Raises:
        RecipeError: if the function of an own metric fails.
    """
    metrics: dict[str, AnswerMetric] = {
        "stop_rate": lambda a: a.stopped,
        "expected_stop_rate": lambda a: a.expected_stops,
        "exact_match": lambda a: a.text == a.expected,
        "language_fidelity": lambda a: a.in_language,
        "repetition_rate": lambda a: ends_in_loop(a.ids),
        "answer_tokens": lambda a: len(a.ids),
        "expected_tokens": lambda a: a.expected_tokens,
    }
    if any(a.rejected for a in answers):
        metrics["closer_to_chosen"] = _is_closer_to_chosen
    metrics |= {name: partial(score_of, name, function) for name, function in own.items()}
    groups = _groups(answers, sources)
    out: dict[str, float] = {f"{prefix}answers{suffix}": len(group) for suffix, group in groups.items()}
    detected = {suffix: sum(a.in_language is not None for a in group) for suffix, group in groups.items()}
    out |= {f"{prefix}answers_told{suffix}": count for suffix, count in detected.items()}
    for name, metric in metrics.items():
        for suffix, group in groups.items():
            values = [float(value) for a in group if (value := metric(a)) is not None]
            if values:
                out[f"{prefix}{name}{suffix}"] = sum(values) / len(values)
    return out


def _groups(answers: Sequence[Answer], sources: Sequence[str]) -> dict[str, list[Answer]]:
    """Answers by the suffix of their metrics."""
    groups = {"": list(answers)} if answers else {}
    for answer in answers:
        groups.setdefault(f"/{answer.prompt.language}", []).append(answer)
        if len(sources) > 1:
            groups.setdefault(f"/{SOURCE}{sources[answer.prompt.source]}", []).append(answer)
    return groups


def length_ratios(metrics: Mapping[str, float], parent: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """`answer_length_ratio`, in total and by group: mean length of the answers over that of the parent's answers.

    Args:
        metrics: `answer_metrics` with this prefix.
        parent: `answer_metrics` of the parent's answers to the same prompts, without a prefix.
    """
    name = f"{prefix}answer_tokens"
    suffixes = [key.removeprefix(name) for key in metrics if key == name or key.startswith(f"{name}/")]
    return {
        f"{prefix}answer_length_ratio{suffix}": metrics[name + suffix] / parent[f"answer_tokens{suffix}"]
        for suffix in suffixes
        if parent.get(f"answer_tokens{suffix}")
    }


def _is_closer_to_chosen(answer: Answer) -> bool:
    chosen, rejected = (
        SequenceMatcher(None, answer.text, other).ratio() for other in (answer.expected, answer.rejected)
    )
    return chosen > rejected


# Left out of language detection: reasoning, code in fences or backticks, tool calls, URLs.
NOT_PROSE = re.compile(
    r"<think>.*?(?:</think>|\Z)|```.*?(?:```|\Z)|`[^`\n]*`|<tool_call>.*?(?:</tool_call>|\Z)|https?://\S+", re.DOTALL
)
# In UTF-8: 12 Latin letters or 4 Chinese ones. For English and Italian texts the detector is wrong in 0.4 % of cases
# from 12 letters on, and in 3 % with 8 to 11 letters.
MIN_LETTER_BYTES = 12


def is_in_language(text: str, language: str, expected: str) -> bool | None:
    """Whether an answer is in the language of its prompt; None if unknown.

    Args:
        text: the answer.
        language: code of the prompt's language. If the row has none (`und`), the detected language of `expected`.
        expected: the data's answer.
    """
    wanted = detected_language(expected) if language == UNKNOWN_LANGUAGE else language
    if wanted not in CANDIDATE_LANGUAGES:  # the detector never returns it
        return None
    found = detected_language(text)
    return None if found == UNKNOWN_LANGUAGE else found == wanted


def detected_language(text: str) -> str:
    """The language of the prose of a text; `und` if it has fewer than 12 bytes of letters.

    Code, tool calls and URLs are left out.
    """
    return detect_language(NOT_PROSE.sub(" ", text)) if has_prose(text) else UNKNOWN_LANGUAGE


def has_prose(text: str) -> bool:
    """Whether a text has enough letters, outside of code, tool calls and URLs, to tell its language."""
    letters = "".join(filter(str.isalpha, NOT_PROSE.sub(" ", text))).encode(errors="surrogatepass")
    return len(letters) >= MIN_LETTER_BYTES


MAX_PERIOD, MIN_REPEATS, MIN_LOOP_TOKENS = 64, 3, 24


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether the last tokens of an answer repeat a block.

    They do if for some period p of at most 64 tokens the last max(3 * p, 24) tokens each equal the token p before. Then
    the block occurs at least three times and the loop has at least 24 tokens, so that a refrain, a horizontal rule or a
    word repeated a few times is not a loop. The last copy may be incomplete.
    """
    for period in range(1, min(MAX_PERIOD, len(ids) // MIN_REPEATS) + 1):
        length = max(MIN_REPEATS * period, MIN_LOOP_TOKENS)
        tail = ids[-length:]
        if len(tail) == length and all(a == b for a, b in zip(tail[period:], tail, strict=False)):
            return True
    return False

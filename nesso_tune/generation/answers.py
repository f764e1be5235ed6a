"""Prompts with known answers, taken from the data: what a model is asked while it trains."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nesso_tune.conversation import UNKNOWN_LANGUAGE
from nesso_tune.data.languages import CANDIDATES, NO_LANGUAGE, detect_language
from nesso_tune.data.packing import Rows
from nesso_tune.data.token_store import Documents
from nesso_tune.model.forward import generate_greedily
from nesso_tune.model.lm_head import forward_path


@dataclass(frozen=True)
class Prompt:
    """Token ids that a generation starts from, and the answers that the data has for it.

    Attributes:
        ids: up to and with the assistant's header.
        expected: the answer's ids, end token included (in preference data the chosen one).
        rejected: the rejected answer's ids; empty for conversations.
        language: code.
        source: index of the source that it comes from.
        private: whether nothing of it may be shown.
    """

    ids: list[int]
    expected: list[int]
    rejected: list[int]
    language: str
    source: int = 0
    private: bool = False


def select_prompts(rows: Rows, count: int) -> list[Prompt]:
    """`count` prompts of the entries in `rows`, as evenly as possible over the languages, in a fixed order.

    Those of a language are taken from its sources in turn.
    """
    by_language: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number in map(int, np.unique(rows.entries)):
        by_language[rows.documents.language(number)][int(rows.documents.sources[number])].append(number)
    chosen: list[Prompt] = []
    queues = [_in_turn([by_source[i] for i in sorted(by_source)]) for _, by_source in sorted(by_language.items())]
    while queues and len(chosen) < count:
        for queue in list(queues):
            entry = next(queue, None)
            if entry is None:
                queues.remove(queue)
            elif len(chosen) < count and (prompt := _prompt(rows.documents, entry)) is not None:
                chosen.append(prompt)
    return chosen


def _in_turn(queues: Sequence[Sequence[int]]) -> Iterator[int]:
    """The first of each, then the second of each, and so on."""
    rounds = zip_longest(*queues)
    return (entry for entries in rounds for entry in entries if entry is not None)


def _prompt(documents: Documents, entry: int) -> Prompt | None:
    """The last answer of a conversation, or a pair."""
    origin = documents.language(entry), int(documents.sources[entry]), documents.is_private(entry)
    if documents.parts == 3:
        prompt, chosen, rejected = (documents.input_ids(entry, part).tolist() for part in range(3))
        return Prompt(prompt, chosen, rejected, *origin)
    ids, learned = documents.input_ids(entry).tolist(), documents.trained[documents.part(entry)]
    start, end = _last_run(learned.tolist())
    return Prompt(ids[:start], ids[start:end], [], *origin) if start > 0 else None


def _last_run(flags: Sequence[int]) -> tuple[int, int]:
    """Bounds of the last run of true flags; (0, 0) if there is none."""
    end = next((i + 1 for i in range(len(flags) - 1, -1, -1) if flags[i]), 0)
    start = end
    while start > 0 and flags[start - 1]:
        start -= 1
    return start, end


# Words of these are no language that a person speaks: code in fences or backticks, calls of tools, addresses.
NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|<tool_call>.*?(?:</tool_call>|\Z)|https?://\S+", re.DOTALL)
# Bytes of letters: 12 Latin ones, 4 Chinese. Of English and Italian texts of 12 letters and more the detector takes
# 0.6 % for another language, of those of 8 to 11 letters 15 %.
LEAST = 12
BLOCK, COPIES, STRETCH = 64, 3, 24  # tokens of the longest block, how often it comes, and tokens of a loop at least


def detected_language(text: str) -> str:
    """The language of an answer's prose; `und` where it is too short to tell, or holds none.

    Code, calls of tools and addresses are left out, and fewer than 12 letters are not told.
    """
    prose = NOT_PROSE.sub(" ", text)
    letters = "".join(filter(str.isalpha, prose))
    return detect_language(prose) if len(letters.encode(errors="surrogatepass")) >= LEAST else UNKNOWN_LANGUAGE


def in_language(text: str, language: str, expected: str) -> bool | None:
    """Whether an answer is in the language of its prompt; None where that cannot be told.

    Args:
        text: the answer.
        language: code of the prompt's language. Of a prompt whose row names none (`und`), it is the language that the
            data's own answer is told to be in.
        expected: the data's own answer.
    """
    wanted = detected_language(expected) if language == UNKNOWN_LANGUAGE else language
    if wanted not in CANDIDATES or wanted == NO_LANGUAGE:  # the detector could never say so
        return None
    told = detected_language(text)
    return None if told == UNKNOWN_LANGUAGE else told == wanted


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether the last tokens of an answer repeat one block.

    So it is if for some length p of at most 64 tokens the last max(3 * p, 24) tokens have period p: each equals the one
    p before it. The block then stands there three times or more, and the loop is 24 tokens long or more: a refrain, a
    ruled line or a word said a few times is none. The last copy may be cut anywhere.
    """
    for period in range(1, min(BLOCK, len(ids) // COPIES) + 1):
        stretch = max(COPIES * period, STRETCH)
        tail = ids[-stretch:]
        if len(tail) == stretch and all(a == b for a, b in zip(tail[period:], tail, strict=False)):
            return True
    return False


BATCH = 32  # prompts answered at a time
SOURCE = "source/"  # before the name of a source in the name of a figure


@dataclass(frozen=True)
class Answer:
    """What a model wrote to a prompt.

    Attributes:
        prompt: the prompt.
        text: the answer without special tokens.
        expected: the data's answer as text.
        rejected: the data's rejected answer as text, if there is one.
        stopped: whether the model ended it with the end token.
        ids: its tokens, without the end token.
        expected_tokens: tokens of the data's answer, without the end token.
        expected_stops: whether the data's answer, with an end token, is no longer than an answer may become.
    """

    prompt: Prompt
    text: str
    expected: str
    rejected: str
    stopped: bool
    ids: Sequence[int] = ()
    expected_tokens: int = 0
    expected_stops: bool = True

    @cached_property
    def in_language(self) -> bool | None:
        """See `traits.in_language`."""
        return in_language(self.text, self.prompt.language, self.expected)


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    autocast: AbstractContextManager[Any],
) -> list[Answer]:
    """Greedy answers, in the order of the prompts. The random generators are not touched."""
    ordered = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    written: dict[int, list[int]] = {}
    with autocast:
        for start in range(0, len(ordered), BATCH):
            some = ordered[start : start + BATCH]
            written |= dict(
                zip(some, _generate(model, tokenizer, [prompts[i] for i in some], max_new_tokens), strict=True)
            )
    return [_answer(tokenizer, prompt, written[i], max_new_tokens) for i, prompt in enumerate(prompts)]


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[list[int]]:
    longest = max(len(prompt.ids) for prompt in prompts)
    context = getattr(model.config, "max_position_embeddings", None) or longest + max_new_tokens
    most = max(1, min(max_new_tokens, context - longest))
    way, pad, end = forward_path(model).generation, tokenizer.pad_token_id, tokenizer.eos_token_id
    return generate_greedily(model, [prompt.ids for prompt in prompts], way, most, pad=pad, end=end)


def _answer(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: list[int], max_new_tokens: int) -> Answer:
    end = tokenizer.eos_token_id
    own, expected, rejected = (_up_to(end, some) for some in (ids, prompt.expected, prompt.rejected))
    text, wanted, other = (tokenizer.decode(some, skip_special_tokens=True) for some in (own, expected, rejected))
    return Answer(
        prompt, text, wanted, other, end in ids, own, len(expected), expected_stops=len(expected) < max_new_tokens
    )


def _up_to(end: int | None, ids: list[int]) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


Figure = Callable[[Answer], "float | bool | None"]  # of one answer; None if it says nothing


def answer_metrics(answers: Sequence[Answer], prefix: str = "", sources: Sequence[str] = ()) -> dict[str, float]:
    """Means over answers: whole, by language (`name/it`), and by source (`name/source/NAME`).

    `answers`: how many there are. `stop_rate`: share that ended with the end token; `expected_stop_rate`: share whose
    answer in the data is short enough to end in time. `exact_match`: share that is equal to the data's (chosen) answer.
    In preference data also `closer_to_chosen`: share that is more alike to the chosen than to the rejected answer, by
    characters. `language_fidelity`: share in the language of their prompt, of the `answers_told` of which it can be
    told (see `traits.in_language`); absent where there are none. `repetition_rate`: share that ends in a loop (see
    `traits.ends_in_loop`). `answer_tokens` and `expected_tokens`: length of the answers, and of the data's.

    Args:
        answers: what is measured.
        prefix: stands before each name.
        sources: names of the sources, by the prompts' index; fewer than two give no figures by source.
    """
    figures: dict[str, Figure] = {
        "stop_rate": lambda a: a.stopped,
        "expected_stop_rate": lambda a: a.expected_stops,
        "exact_match": lambda a: a.text == a.expected,
        "language_fidelity": lambda a: a.in_language,
        "repetition_rate": lambda a: ends_in_loop(a.ids),
        "answer_tokens": lambda a: len(a.ids),
        "expected_tokens": lambda a: a.expected_tokens,
    }
    if any(a.rejected for a in answers):
        figures["closer_to_chosen"] = _closer
    parts = _parts(answers, sources)
    out: dict[str, float] = {f"{prefix}answers{part}": len(group) for part, group in parts.items()}
    told = {part: sum(a.in_language is not None for a in group) for part, group in parts.items()}
    out |= {f"{prefix}answers_told{part}": count for part, count in told.items()}
    for name, figure in figures.items():
        for part, group in parts.items():
            values = [float(value) for a in group if (value := figure(a)) is not None]
            if values:
                out[f"{prefix}{name}{part}"] = sum(values) / len(values)
    return out


def _parts(answers: Sequence[Answer], sources: Sequence[str]) -> dict[str, list[Answer]]:
    parts = {"": list(answers)} if answers else {}
    for one in answers:
        parts.setdefault(f"/{one.prompt.language}", []).append(one)
        if len(sources) > 1:
            parts.setdefault(f"/{SOURCE}{sources[one.prompt.source]}", []).append(one)
    return parts


def length_ratios(metrics: Mapping[str, float], parent: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """`answer_length_ratio`, whole and by part: mean length of the answers, over that of the parent's to these prompts.

    Args:
        metrics: what `answer_metrics` gave, with this prefix.
        parent: what it gave for the parent's answers, without a prefix.
    """
    before = f"{prefix}answer_tokens"
    parts = [name.removeprefix(before) for name in metrics if name == before or name.startswith(f"{before}/")]
    return {
        f"{prefix}answer_length_ratio{part}": metrics[before + part] / parent[f"answer_tokens{part}"]
        for part in parts
        if parent.get(f"answer_tokens{part}")
    }


def _closer(one: Answer) -> bool:
    chosen, rejected = (SequenceMatcher(None, one.text, other).ratio() for other in (one.expected, one.rejected))
    return chosen > rejected

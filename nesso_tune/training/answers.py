"""Greedy answers to prompts, and what can be measured on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nesso_tune.model.forward import generate_greedily
from nesso_tune.model.head import forward_path
from nesso_tune.training.prompts import Prompt
from nesso_tune.training.traits import ends_in_a_loop, in_language

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


def measure(answers: Sequence[Answer], prefix: str = "", sources: Sequence[str] = ()) -> dict[str, float]:
    """Means over answers: whole, by language (`name/it`), and by source (`name/source/NAME`).

    `answers`: how many there are. `stop_rate`: share that ended with the end token; `expected_stop_rate`: share whose
    answer in the data is short enough to end in time. `exact_match`: share that is equal to the data's (chosen) answer.
    In preference data also `closer_to_chosen`: share that is more alike to the chosen than to the rejected answer, by
    characters. `language_fidelity`: share in the language of their prompt, of the `answers_told` of which it can be
    told (see `traits.in_language`); absent where there are none. `repetition_rate`: share that ends in a loop (see
    `traits.ends_in_a_loop`). `answer_tokens` and `expected_tokens`: length of the answers, and of the data's.

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
        "repetition_rate": lambda a: ends_in_a_loop(a.ids),
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
        metrics: what `measure` gave, with this prefix.
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

"""Greedy answers to prompts, and what can be measured on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nesso_tune.training.prompts import Prompt

BATCH = 32  # prompts answered at a time


@dataclass(frozen=True)
class Answer:
    """What a model wrote to a prompt.

    Attributes:
        prompt: the prompt.
        text: the answer without special tokens.
        expected: the data's answer as text.
        rejected: the data's rejected answer as text, if there is one.
        stopped: whether the model ended it with the end token.
    """

    prompt: Prompt
    text: str
    expected: str
    rejected: str
    stopped: bool


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
    return [_answer(tokenizer, prompt, written[i]) for i, prompt in enumerate(prompts)]


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int
) -> Iterator[list[int]]:
    longest = max(len(prompt.ids) for prompt in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p.ids)) + p.ids for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=model.device)
    context = getattr(model.config, "max_position_embeddings", None) or longest + max_new_tokens
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max(1, min(max_new_tokens, context - longest)),
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    return (row[longest:].tolist() for row in out)


def _answer(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: list[int]) -> Answer:
    stopped = tokenizer.eos_token_id in ids
    own = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
    text, expected, rejected = (
        tokenizer.decode(some, skip_special_tokens=True) for some in (own, prompt.expected, prompt.rejected)
    )
    return Answer(prompt, text, expected, rejected, stopped)


def measure(answers: Sequence[Answer], prefix: str = "") -> dict[str, float]:
    """Rates over answers, whole and by language.

    `stop_rate`: ended with the end token. `exact_match`: equal to the data's (chosen) answer. In preference data also
    `closer_to_chosen`: more alike to the chosen than to the rejected answer, by characters.
    """
    kinds = {"stop_rate": lambda a: a.stopped, "exact_match": lambda a: a.text == a.expected}
    if any(a.rejected for a in answers):
        kinds["closer_to_chosen"] = _closer
    groups = {"": list(answers)}
    for one in answers:
        groups.setdefault(f"/{one.prompt.language}", []).append(one)
    return {
        f"{prefix}{name}{suffix}": sum(bool(rate(a)) for a in group) / len(group)
        for name, rate in kinds.items()
        for suffix, group in groups.items()
        if group
    }


def _closer(one: Answer) -> bool:
    chosen, rejected = (SequenceMatcher(None, one.text, other).ratio() for other in (one.expected, one.rejected))
    return chosen > rejected

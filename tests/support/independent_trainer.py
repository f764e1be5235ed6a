"""SFT and DPO training in plain torch, implemented from the documentation without nesso-tune, TRL or accelerate.

Each document has its own forward pass in float64, without masks or padding, so there is no leakage between documents.
The caller provides the documents of each optimizer step, because shuffling and packing belong to nesso-tune.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

LogProbs = Callable[[Sequence[int]], Tensor]  # token log-probabilities under the reference model


@dataclass(frozen=True)
class Settings:
    """Hyperparameters, named as in a recipe."""

    learning_rate: float
    warmup_steps: int
    constant_ratio: float
    min_ratio: float
    weight_decay: float
    max_grad_norm: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    beta: float = 0.1
    sft: float = 0.0
    ld_alpha: float = 1.0


@dataclass
class Result:
    """Loss, gradient norm and learning rate of each step, and the final weights."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


class ChatML:
    """`<|im_start|>role\\n` text `<|im_end|>\\n`; header and text are tokenized separately."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._start, self._end = (self._tokenizer.token_to_id(f"<|im_{edge}|>") for edge in ("start", "end"))

    def text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def header(self, role: str) -> list[int]:
        return [self._start, *self.text(f"{role}\n")]

    def conversation(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Token ids and the supervision mask: text and end token of assistant turns."""
        ids: list[int] = []
        supervised: list[bool] = []
        for message in messages:
            header, turn, after = self.header(message["role"]), self.answer(message["content"]), self.text("\n")
            ids += [*header, *turn, *after]
            is_supervised = message["role"] == "assistant"
            supervised += [False] * len(header) + [is_supervised] * len(turn) + [False] * len(after)
        return ids, supervised

    def answer(self, text: str) -> list[int]:
        return [*self.text(text), self._end]


def token_log_probs(model: Any, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of all tokens except the first, [length - 1]."""
    tensor = torch.tensor(ids)
    scores = model(input_ids=tensor[None]).logits[0, :-1].double().log_softmax(-1)
    return scores.gather(-1, tensor[1:, None])[:, 0]


def sft_step(model: Any, _: LogProbs, chat: ChatML, conversations: Sequence[Any], settings: Settings) -> float:
    """Mean negative log-likelihood of the supervised tokens of a step; gradients accumulate in the weights."""
    encoded = [chat.conversation(messages) for messages in conversations]
    count, total = sum(sum(supervised[1:]) for _, supervised in encoded), 0.0
    for ids, supervised in encoded:
        loss = -token_log_probs(model, ids)[torch.tensor(supervised[1:])].sum() / count
        loss.backward()
        total += float(loss.detach())
    return total


def dpo_step(model: Any, reference: LogProbs, chat: ChatML, pairs: Sequence[Any], settings: Settings) -> float:
    """DPO sigmoid loss, mean over pairs, plus the SFT term, mean over the tokens of chosen answers."""
    count, total = sum(len(chat.answer(pair["chosen"])) for pair in pairs), 0.0
    for pair in pairs:
        prompt = [*chat.header("user"), *chat.answer(pair["prompt"]), *chat.text("\n"), *chat.header("assistant")]
        answers = [chat.answer(pair[side]) for side in ("chosen", "rejected")]
        shared, shifts = min(map(len, answers)), []
        for answer in answers:
            whole, start = [*prompt, *answer], len(prompt) - 1
            own = token_log_probs(model, whole)[start:]
            shifts.append((own - reference(whole)[start:], own))
        gaps = [shift[:shared].sum() + settings.ld_alpha * shift[shared:].sum() for shift, _ in shifts]
        preference = -logsigmoid(settings.beta * (gaps[0] - gaps[1])) / len(pairs)
        loss = preference - shifts[0][1].sum() * settings.sft / count
        loss.backward()
        total += float(loss.detach())
    return total


def rate_at(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up, cosine decay to `min_ratio` at `constant_ratio` of the run, then constant."""
    if step < settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.constant_ratio * steps - settings.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return settings.learning_rate * (settings.min_ratio + (1 - settings.min_ratio) * cosine)


def train(base: Path, steps: Sequence[Sequence[Any]], step_loss: Any, settings: Settings) -> Result:
    """AdamW from the weights in `base`; each item of `steps` holds the documents of one global batch."""
    model, frozen = (
        AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").double().eval() for _ in range(2)
    )
    reference = cache(torch.no_grad()(lambda ids: token_log_probs(frozen, ids)))
    weights, chat, found = dict(model.named_parameters()), ChatML(base), Result()
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step, documents in enumerate(steps):
        model.zero_grad()
        found.losses.append(step_loss(model, lambda ids: reference(tuple(ids)), chat, documents, settings))
        norm = torch.stack([weight.grad.norm() for weight in weights.values()]).norm()
        rate, (decay1, decay2) = rate_at(step, len(steps), settings), settings.betas
        found.norms.append(float(norm))
        found.rates.append(rate)
        for name, weight in weights.items():
            gradient = weight.grad * torch.clamp(settings.max_grad_norm / (norm + 1e-6), max=1.0)
            first[name] = decay1 * first[name] + (1 - decay1) * gradient
            second[name] = decay2 * second[name] + (1 - decay2) * gradient**2
            mean, variance = first[name] / (1 - decay1 ** (step + 1)), second[name] / (1 - decay2 ** (step + 1))
            shrink = rate * settings.weight_decay if weight.ndim > 1 else 0.0  # no decay of norms and biases
            weight.data = weight.data * (1 - shrink) - rate * mean / (variance.sqrt() + settings.epsilon)
    found.weights = {name: weight.detach() for name, weight in weights.items()}
    return found

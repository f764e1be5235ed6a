"""Are the numbers right on this device? Both sides in bfloat16 against float32 without packing, padding or sharing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from nesso_tune.model import attention as attention_module
from nesso_tune.model.attention import AttentionSpans, last_hidden_states
from nesso_tune.model.lm_head import attach_supervised_head
from nesso_tune.model.loading import load_model
from nesso_tune.training.dataset import ConversationCollator, PairCollator
from nesso_tune.training.grouped_metrics import Groups

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIDES = ("ours", "ours, bfloat16 weights", "TRL")
Figures = dict[str, Any]


def look(work: Path, section: Any, prepared: dict[str, tuple[Any, list[dict[str, Any]]]], attention: str) -> Figures:
    """Differences of either side from the exact numbers.

    Args:
        work: the folder with the base.
        section: the recipe's model.
        prepared: by method, the data and the rows of a run.
        attention: the kernel that TRL gets.

    Returns:
        For each of `SIDES`: `loss` and `gradient` of the first packed row, relative; `hidden`, the last hidden states
        of its documents, as a share of the largest; `answers`, log-probabilities of the first pairs' answers, in nats
        a token; the largest difference each. `attention` counts which kernel was called. Also `losses` of the row.
    """
    (sft, rows), (dpo, some) = prepared["sft"], prepared["dpo"]
    row, some = rows[0], some[:8]
    wanted, theirs = _exact_and_theirs(work, row, some, sft, dpo, attention)
    found, called = {"TRL": theirs}, {"TRL": attention}
    model = load_model(section, sft.chat, 0).to(DEVICE)
    attach_supervised_head(model)
    forward, answers = (lambda: packed(model, row, sft)), (lambda: shared(model, some, dpo))
    for name, autocast in (("ours", True), ("ours, bfloat16 weights", False)):
        with kernels_counted() as calls:
            if not autocast:
                model.to(torch.bfloat16)  # the kernels of bfloat16 then get nothing else
            found[name] = measured(model, forward, answers, autocast)
        called[name] = ", ".join(f"{kernel} {count} times" for kernel, count in calls.items() if count)
    tokens = torch.tensor([len(pair[name]) for name in ("chosen_ids", "rejected_ids") for pair in some], device=DEVICE)
    losses = {name: float(of[0]) for name, of in {**found, "float32": wanted}.items()}
    return {name: apart(found[name], wanted, tokens) | {"attention": called[name]} for name in SIDES} | {
        "losses": losses
    }


@contextmanager
def kernels_counted() -> Iterator[dict[str, int]]:
    """How often each of our kernels is called, whatever the model was told to use."""
    kernels = {"flash": "_flash", "sdpa by run": "_sdpa_per_span"}
    calls, honest = dict.fromkeys(kernels, 0), {name: getattr(attention_module, own) for name, own in kernels.items()}

    def counting(name: str) -> Callable[..., Tensor]:
        def called(*arguments: Any) -> Tensor:
            calls[name] += 1
            result: Tensor = honest[name](*arguments)
            return result

        return called

    for name, own in kernels.items():
        setattr(attention_module, own, counting(name))
    try:
        yield calls
    finally:
        for name, own in kernels.items():
            setattr(attention_module, own, honest[name])


Found = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, gradient, hidden states, log-probabilities of answers


def measured(
    model: Any, forward: Callable[[], tuple[Tensor, Tensor]], answers: Callable[[], Tensor], autocast: bool
) -> Found:
    """What is compared; under autocast in bfloat16, as both trainers compute."""
    precision = partial(torch.autocast, DEVICE.type, torch.bfloat16, enabled=autocast)
    with precision():
        loss, hidden = forward()
    loss.backward()
    gradient = torch.cat([p.grad.flatten().float() for p in model.parameters()])
    model.zero_grad()
    with precision(), torch.no_grad():
        return loss.detach(), gradient, hidden.detach().float(), answers()


def _exact_and_theirs(work: Path, row: Any, some: Any, sft: Any, dpo: Any, attention: str) -> tuple[Found, Found]:
    """The exact numbers, and TRL's, of one model."""
    model = LlamaForCausalLM.from_pretrained(work / "base", dtype=torch.float32, attn_implementation="sdpa").to(DEVICE)
    model.get_input_embeddings().padding_idx = None  # padding is the end token, whose row is learned
    wanted = measured(model, lambda: alone(model, row), lambda: answers_alone(model, some), False)
    add_fused_lm_head(model)
    model.set_attn_implementation(attention)
    pad_id = sft.chat.pad_id
    theirs = measured(model, lambda: theirs_packed(model, row, pad_id), lambda: theirs_padded(model, some, dpo), True)
    return wanted, theirs


def apart(found: Found, wanted: Found, tokens: Tensor) -> dict[str, float]:
    """How far off everything is."""
    loss, gradient, hidden, answers = (a - b for a, b in zip(found, wanted, strict=True))
    return {
        "loss": float(loss.abs() / wanted[0]),
        "gradient": float(gradient.norm() / wanted[1].norm()),
        "hidden": float(hidden.abs().max() / wanted[2].abs().max()),
        "answers": float((answers.abs() / tokens).max()),
    }


def alone(model: Any, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Loss and last hidden states, [tokens, width], of each document by itself."""
    total, states, start = torch.zeros((), device=DEVICE), [], 0
    for length in row["seq_lengths"]:
        ids, labels = (torch.tensor([row[n][start : start + length]], device=DEVICE) for n in ("input_ids", "labels"))
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits = model.get_output_embeddings()(hidden[:-1])
        total = total + functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
        states.append(hidden)
        start += length
    return total / sum(label != -100 for label in row["labels"]), torch.cat(states)


def answers_alone(model: Any, pairs: list[dict[str, Any]]) -> Tensor:
    """Log-probability of each answer by itself: all chosen ones, then all rejected ones."""
    sums = []
    for name in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            ids = torch.tensor([pair["prompt_ids"] + pair[name]], device=DEVICE)
            first = len(pair["prompt_ids"])
            scores = model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1].log_softmax(-1)
            sums.append(scores.gather(-1, ids[0, first:, None]).sum())
    return torch.stack(sums)


def packed(model: Any, row: dict[str, Any], data: Any) -> tuple[Tensor, Tensor]:
    """Ours, on the packed row."""
    batch = ConversationCollator(data.chat.pad_id, Groups.of(data.stream.documents))([row])
    own, labels = batch["packed_row"].to(DEVICE), batch["labels"].to(DEVICE)
    out = model(labels=labels, packed_row=own, fused_lm_head=True)
    segments = AttentionSpans.from_documents(row["seq_lengths"]).to(DEVICE)
    with torch.no_grad():
        hidden = last_hidden_states(model, own.input_ids, segments)[0]
    return -out.log_probs.sum() / out.label_mask.sum(), hidden


def theirs_packed(model: Any, row: dict[str, Any], pad_id: int) -> tuple[Tensor, Tensor]:
    """TRL's, on the same row."""
    batch = DataCollatorForLanguageModeling(pad_token_id=pad_id, padding_free=True)([row])
    batch = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in batch.items()} | {"use_cache": False}
    out = model(**batch, fused_lm_head=True)
    with torch.no_grad():
        hidden = model.base_model(**{n: v for n, v in batch.items() if n != "labels"}).last_hidden_state[0]
    return -out.log_probs.sum() / out.label_mask.sum(), hidden


def shared(model: Any, pairs: list[dict[str, Any]], data: Any) -> Tensor:
    """Ours: answers that share their prompts, without padding."""
    batch = PairCollator(data.chat.pad_id, Groups.of(data.stream.documents))(pairs)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100).to(DEVICE)
    return model(labels=labels, packed_row=batch["packed_row"].to(DEVICE), fused_lm_head=True).log_probs.sum(dim=1)


def theirs_padded(model: Any, pairs: list[dict[str, Any]], data: Any) -> Tensor:
    """TRL's: each answer after its own copy of the prompt, padded."""
    batch = PairCollator(data.chat.pad_id, Groups.of(data.stream.documents), by_document=False)(pairs)
    ids, mask, completion = (batch[n].to(DEVICE) for n in ("input_ids", "attention_mask", "completion_mask"))
    labels = ids.masked_fill(completion == 0, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs.sum(dim=1)

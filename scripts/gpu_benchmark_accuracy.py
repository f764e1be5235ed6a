"""Numerical accuracy: both sides in bfloat16 against float32 without packing, padding or shared prompts."""

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


def compare_accuracy(
    work: Path, section: Any, prepared: dict[str, tuple[Any, list[dict[str, Any]]]], attention: str
) -> Figures:
    """Differences of each side from the float32 reference.

    Args:
        work: folder with the base model.
        section: `model` section of the recipe.
        prepared: by method, the prepared data and the rows of a run.
        attention: attention implementation for TRL.

    Returns:
        For each of `SIDES` the differences: `loss` and `gradient` (norm) of the first packed row, relative; `hidden`,
        maximum over the last hidden states of its documents, relative to the largest value; `answers`, maximum over
        the answers of the first pairs, nats/token. `attention` names the kernels called. Also `losses` of the row.
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
                model.to(torch.bfloat16)  # as the bfloat16 kernels require
            found[name] = measured(model, forward, answers, autocast)
        called[name] = ", ".join(f"{kernel} {count} times" for kernel, count in calls.items() if count)
    tokens = torch.tensor([len(pair[name]) for name in ("chosen_ids", "rejected_ids") for pair in some], device=DEVICE)
    losses = {name: float(of[0]) for name, of in {**found, "float32": wanted}.items()}
    return {name: differences(found[name], wanted, tokens) | {"attention": called[name]} for name in SIDES} | {
        "losses": losses
    }


@contextmanager
def kernels_counted() -> Iterator[dict[str, int]]:
    """Counts the calls of each attention kernel of nesso-tune."""
    kernels = {"flash": "_flash", "sdpa by run": "_sdpa_per_span"}
    calls, original = dict.fromkeys(kernels, 0), {name: getattr(attention_module, own) for name, own in kernels.items()}

    def counting(name: str) -> Callable[..., Tensor]:
        def called(*arguments: Any) -> Tensor:
            calls[name] += 1
            result: Tensor = original[name](*arguments)
            return result

        return called

    for name, own in kernels.items():
        setattr(attention_module, own, counting(name))
    try:
        yield calls
    finally:
        for name, own in kernels.items():
            setattr(attention_module, own, original[name])


Measured = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, gradient, hidden states, log-probabilities of answers


def measured(
    model: Any, forward: Callable[[], tuple[Tensor, Tensor]], answers: Callable[[], Tensor], autocast: bool
) -> Measured:
    """The compared tensors; under bfloat16 autocast, as in both trainers, if `autocast`."""
    precision = partial(torch.autocast, DEVICE.type, torch.bfloat16, enabled=autocast)
    with precision():
        loss, hidden = forward()
    loss.backward()
    gradient = torch.cat([p.grad.flatten().float() for p in model.parameters()])
    model.zero_grad()
    with precision(), torch.no_grad():
        return loss.detach(), gradient, hidden.detach().float(), answers()


def _exact_and_theirs(work: Path, row: Any, some: Any, sft: Any, dpo: Any, attention: str) -> tuple[Measured, Measured]:
    """The float32 reference and the results of TRL, from the same weights."""
    model = LlamaForCausalLM.from_pretrained(work / "base", dtype=torch.float32, attn_implementation="sdpa").to(DEVICE)
    model.get_input_embeddings().padding_idx = None  # padding is the end token, whose embedding has a gradient
    wanted = measured(model, lambda: alone(model, row), lambda: answers_alone(model, some), False)
    add_fused_lm_head(model)
    model.set_attn_implementation(attention)
    pad_id = sft.chat.pad_id
    theirs = measured(model, lambda: theirs_packed(model, row, pad_id), lambda: theirs_padded(model, some, dpo), True)
    return wanted, theirs


def differences(found: Measured, wanted: Measured, tokens: Tensor) -> dict[str, float]:
    """Differences between two measurements."""
    loss, gradient, hidden, answers = (a - b for a, b in zip(found, wanted, strict=True))
    return {
        "loss": float(loss.abs() / wanted[0]),
        "gradient": float(gradient.norm() / wanted[1].norm()),
        "hidden": float(hidden.abs().max() / wanted[2].abs().max()),
        "answers": float((answers.abs() / tokens).max()),
    }


def alone(model: Any, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Loss and last hidden states [tokens, hidden_size], each document in its own forward pass."""
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
    """Log-probabilities [2 * pairs], each answer in its own forward pass: chosen answers, then rejected ones."""
    sums = []
    for name in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            ids = torch.tensor([pair["prompt_ids"] + pair[name]], device=DEVICE)
            first = len(pair["prompt_ids"])
            scores = model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1].log_softmax(-1)
            sums.append(scores.gather(-1, ids[0, first:, None]).sum())
    return torch.stack(sums)


def packed(model: Any, row: dict[str, Any], data: Any) -> tuple[Tensor, Tensor]:
    """The same with nesso-tune on the packed row."""
    batch = ConversationCollator(data.chat.pad_id, Groups.of(data.stream.documents))([row])
    own, labels = batch["packed_row"].to(DEVICE), batch["labels"].to(DEVICE)
    out = model(labels=labels, packed_row=own, fused_lm_head=True)
    segments = AttentionSpans.from_documents(row["seq_lengths"]).to(DEVICE)
    with torch.no_grad():
        hidden = last_hidden_states(model, own.input_ids, segments)[0]
    return -out.log_probs.sum() / out.label_mask.sum(), hidden


def theirs_packed(model: Any, row: dict[str, Any], pad_id: int) -> tuple[Tensor, Tensor]:
    """The same with TRL on the packed row."""
    batch = DataCollatorForLanguageModeling(pad_token_id=pad_id, padding_free=True)([row])
    batch = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in batch.items()} | {"use_cache": False}
    out = model(**batch, fused_lm_head=True)
    with torch.no_grad():
        hidden = model.base_model(**{n: v for n, v in batch.items() if n != "labels"}).last_hidden_state[0]
    return -out.log_probs.sum() / out.label_mask.sum(), hidden


def shared(model: Any, pairs: list[dict[str, Any]], data: Any) -> Tensor:
    """Log-probabilities of answers with nesso-tune: shared prompts, no padding."""
    batch = PairCollator(data.chat.pad_id, Groups.of(data.stream.documents))(pairs)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100).to(DEVICE)
    return model(labels=labels, packed_row=batch["packed_row"].to(DEVICE), fused_lm_head=True).log_probs.sum(dim=1)


def theirs_padded(model: Any, pairs: list[dict[str, Any]], data: Any) -> Tensor:
    """Log-probabilities of answers with TRL: each after its own copy of the prompt, padded."""
    batch = PairCollator(data.chat.pad_id, Groups.of(data.stream.documents), by_document=False)(pairs)
    ids, mask, completion = (batch[n].to(DEVICE) for n in ("input_ids", "attention_mask", "completion_mask"))
    labels = ids.masked_fill(completion == 0, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs.sum(dim=1)

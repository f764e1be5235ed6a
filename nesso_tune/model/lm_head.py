"""The LM head on supervised positions only.

With a vocabulary of 128k, the logits of a whole batch are the largest tensor of a training step, although about half of
the positions of chat data are not supervised. `attach_supervised_head` gives a model a head that computes, in chunks,
the log-probabilities of the supervised tokens only. It returns the output that TRL's trainers expect of a model called
with `fused_lm_head=True`.

Some models compute more between hidden states and logits than one matrix product. A model's `ForwardPath` says which
head and which form of batches reproduce its own forward; `choose_forward_path` in `forward.py` finds it.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from nesso_tune.chat.encoding import IGNORE_INDEX
from nesso_tune.model.attention import AttentionSpans, last_hidden_states
from nesso_tune.planning.memory import HEAD_CHUNK_BACKWARD, HEAD_CHUNK_FORWARD

GenerationMode = Literal["batch", "alone", "uncached"]
LossPair = tuple[float, float]  # mean loss of the same tokens on the rejected path and by the model's own forward


@dataclass(frozen=True)
class ForwardPath:
    """How a model trains so that it computes what its own forward computes for each document alone.

    Attributes:
        head: `supervised` is the head of this module; `trl` is TRL's fused head, which supports some models that cap or
            scale their logits; `own` uses the logits of the model's own forward.
        padding_free: whether the model supports document attention, so that batches need no padding.
        packs_by_position_ids: whether the model, without document attention, isolates the documents of a packed row by
            `position_ids` that restart.
        padding: right padding of rows of unequal length: with an attention mask (`mask`), without one (`none`), or no
            padding, one forward call for each row (`alone`).
        max_positions: number of learned position embeddings; None without such a limit.
        generation: how greedy answers equal those of the model's own forward: prompts left-padded in a batch (`batch`),
            one prompt at a time (`alone`), or one prompt at a time without a KV cache (`uncached`).
        head_losses: losses that show the error of the `supervised` head, if another head is used.
        packing_losses: losses that show the error of packing, if packing is not supported.
    """

    head: Literal["supervised", "trl", "own"] = "supervised"
    padding_free: bool = False
    packs_by_position_ids: bool = True
    padding: Literal["mask", "none", "alone"] = "mask"
    max_positions: int | None = None
    generation: GenerationMode = "batch"
    head_losses: LossPair | None = None
    packing_losses: LossPair | None = None

    @property
    def supports_packing(self) -> bool:
        """Whether the model can train on packed rows."""
        return self.padding_free or self.packs_by_position_ids


def forward_path(model: PreTrainedModel) -> ForwardPath:
    """The path that was chosen for a model when it was loaded."""
    return getattr(model, "nesso_forward_path", ForwardPath())


@dataclass(frozen=True)
class PackedRow:
    """A batch of sequences as one row of tokens without padding.

    Attributes:
        input_ids: [1, row].
        spans: which tokens attend to each other.
        logits_to_keep: row index of the hidden state that predicts each supervised token, in the order of the labels of
            the batch, [supervised].
    """

    input_ids: Tensor
    spans: AttentionSpans
    logits_to_keep: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRow:
        """Returns a copy on `device`."""
        return PackedRow(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.spans.to(device, non_blocking),
            self.logits_to_keep.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> PackedRow:
        """Returns a copy in pinned memory; the data loader calls this."""
        return PackedRow(self.input_ids.pin_memory(), self.spans.pin_memory(), self.logits_to_keep.pin_memory())


def attach_supervised_head(model: PreTrainedModel, path: ForwardPath | None = None, compiled: bool = False) -> None:
    """Replaces the fused head that TRL attached to a model by the head of its path; `generate` is unaffected.

    Called with `fused_lm_head=True`, the model takes `labels` and returns a `FusedCausalLMOutput`. With `packed_row=`,
    a `PackedRow` of the same sequences as `labels`, it computes on that row alone. With `supervised_index=`, the
    positions of the supervised tokens in the flattened `labels[:, 1:]`, it does not wait for the device to find them.

    Args:
        model: must use document attention to be called with `packed_row`.
        path: the model's own path by default.
        compiled: whether to compile the reduction of the logits of a `packed_row`; see `token_log_probs`.
    """
    path = path or forward_path(model)
    if path.head == "trl":
        model.forward = types.MethodType(_without_supervised_index(model.forward), model)
        return
    log_probs_of = _from_model_logits if path.head == "own" else _from_hidden_states
    plain_forward = types.MethodType(type(model).forward, model)

    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain_forward(*args, **kwargs)
        labels, row, index = (kwargs.pop(name, None) for name in ("labels", "packed_row", "supervised_index"))
        targets = labels[:, 1:]
        mask = targets != IGNORE_INDEX
        index = _positions(mask) if index is None else index
        if row is not None:
            hidden = last_hidden_states(self, row.input_ids, row.spans).squeeze(0).index_select(0, row.logits_to_keep)
            wanted = targets.flatten().index_select(0, index)
            scores = token_log_probs(hidden, self.get_output_embeddings(), wanted, compiled)
            return fused_output(*scores, mask, index)
        if path.padding == "none":
            kwargs.pop("attention_mask", None)
        if path.padding != "alone":
            return fused_output(*log_probs_of(self, kwargs, targets, index), mask, index)
        results = []
        for i, batch in enumerate(_split_rows(kwargs)):
            part = slice(i, i + 1), slice(batch["input_ids"].shape[1] - 1)
            results.append(log_probs_of(self, batch, targets[part], _positions(mask[part])))
        log_probs, is_top1 = (torch.cat(parts) for parts in zip(*results, strict=True))
        return fused_output(log_probs, is_top1, mask, index)

    # `generate` reads the supported arguments of a model from the signature
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _without_supervised_index(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward method without the argument `supervised_index`, which TRL's head does not know."""

    def without(self: PreTrainedModel, *args: Any, supervised_index: Tensor | None = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    without.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return without


def _positions(mask: Tensor) -> Tensor:
    """Indices of the true values of a flattened mask; waits for the device."""
    return mask.flatten().nonzero().flatten()


def plain_logits(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Logits of the model's own forward, [batch, length, vocabulary], without a KV cache."""
    forward = type(model).forward
    supported = inspect.signature(forward).parameters
    # the load-balancing loss of a router is not part of our loss
    disabled = {name: False for name in ("use_cache", "output_router_logits") if name in supported}
    inputs = {name: value for name, value in batch.items() if name not in ("use_cache", "output_router_logits")}
    logits: Tensor = forward(model, **inputs, **disabled).logits
    return logits


def _from_model_logits(
    model: PreTrainedModel, batch: dict[str, Any], targets: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the supervised tokens from the model's own logits, and whether each is the top-1 token."""
    logits, wanted = _predictions(plain_logits(model, batch), index), targets.flatten().index_select(0, index)
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32).gather(-1, wanted[:, None]).squeeze(-1)
    return log_probs, logits.detach().argmax(dim=-1) == wanted


def _from_hidden_states(
    model: PreTrainedModel, batch: dict[str, Any], targets: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """The same from the last hidden states and the output embeddings."""
    hidden = _predictions(model.base_model(**batch | {"use_cache": False}).last_hidden_state, index)
    return token_log_probs(hidden, model.get_output_embeddings(), targets.flatten().index_select(0, index))


def _predictions(values: Tensor, index: Tensor) -> Tensor:
    """Hidden states or logits of all tokens, [batch, length, ...], at the tokens before the supervised ones."""
    before = index + index // max(1, values.shape[1] - 1)  # rows have `length` values, but `length - 1` targets
    return values.flatten(0, 1).index_select(0, before)


def _split_rows(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits a right-padded batch into batches of one row without padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(dim=1).tolist()
    return [{"input_ids": row[None, :length]} for row, length in zip(ids, lengths, strict=True)]


def token_log_probs(hidden: Tensor, head: nn.Linear, targets: Tensor, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities of target tokens, computed in chunks of logits.

    Args:
        hidden: the hidden state before each target, [supervised, hidden size].
        head: the LM head; its parameters may be sharded.
        targets: token ids, [supervised].
        compiled: whether torch.compile makes one kernel of the reduction over the vocabulary. It reads the logits once,
            and makes no copy of them in float32; their sum is in float32 either way.

    Returns:
        Log-probabilities in float32, and whether each target is the top-1 token, both [supervised]. Only the first has
        a gradient.
    """
    parameters = (head.weight, getattr(head, "bias", None))  # peft's wrapper of a head has no bias
    weight: Tensor
    bias: Tensor | None
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in parameters)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        result: tuple[Tensor, Tensor] = _TokenLogProbs.apply(hidden, weight, bias, targets, compiled)
    return result


def fused_output(log_probs: Tensor, is_top1: Tensor, mask: Tensor, index: Tensor) -> FusedCausalLMOutput:
    """Scatters results to the positions of a mask, [batch, length - 1], as TRL's trainers expect them; zero elsewhere.

    Entropy and mean logits are 0: TRL's DPO trainer only reports them, so they are not computed.

    Args:
        log_probs, is_top1: of the supervised tokens, [supervised].
        mask: the supervised positions.
        index: the same as indices of the flattened mask, [supervised].
    """

    def scattered(values: Tensor) -> Tensor:
        # not masked_scatter, whose backward pass waits for the device
        return values.new_zeros(mask.numel()).scatter(0, index, values).view(mask.shape)

    zeros = torch.zeros((), device=mask.device).expand(mask.shape)
    return FusedCausalLMOutput(
        log_probs=scattered(log_probs), entropy=zeros, mean_logits=zeros, is_top1=scattered(is_top1), label_mask=mask
    )


class _TokenLogProbs(torch.autograd.Function):
    """log_softmax(hidden @ weight.T + bias) at the target tokens, with the logits of one chunk in memory at a time.

    The backward pass recomputes the logits: d log p_t / d logits = onehot(t) - softmax. Matrix products use the
    precision of `hidden`, sums over the vocabulary float32. The gradient of the weight has the precision of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities and whether each target is the top-1 token, both [supervised]."""
        cast_weight, cast_bias = (None if tensor is None else tensor.to(hidden.dtype) for tensor in (weight, bias))
        assert cast_weight is not None
        log_probs = torch.empty(hidden.shape[0], device=hidden.device)
        is_top1 = torch.empty_like(targets, dtype=torch.bool)
        for chunk in _chunks(hidden, weight, HEAD_CHUNK_FORWARD):
            logits = functional.linear(hidden[chunk], cast_weight, cast_bias)
            score = _compiled_scores if compiled else _scores
            log_probs[chunk], is_top1[chunk] = score(logits, targets[chunk])
            del logits  # freed before the next chunk is computed
        ctx.save_for_backward(hidden, weight, cast_weight, cast_bias, targets, log_probs)
        ctx.mark_non_differentiable(is_top1)
        return log_probs, is_top1

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Returns the gradients of hidden states, weight and bias; `grad` is [supervised]."""
        hidden, weight, cast_weight, cast_bias, targets, log_probs = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros(weight.shape[0], device=weight.device) if needs_bias else None
        scale = -grad[:, None]
        for chunk in _chunks(hidden, weight, HEAD_CHUNK_BACKWARD):
            slope = torch.softmax(
                functional.linear(hidden[chunk], cast_weight, cast_bias), dim=-1
            )  # becomes p - onehot
            # p - 1 of a target with p close to 1 is computed in float32: rounding p first would lose it
            slope.scatter_(-1, targets[chunk, None], torch.expm1(log_probs[chunk, None]).to(slope.dtype))
            if grad_hidden is not None:
                grad_hidden[chunk] = (slope @ cast_weight) * scale[chunk]
            if needs_weight:
                share = slope.T @ (hidden[chunk] * scale[chunk]).to(hidden.dtype)
                grad_weight = share.to(weight.dtype) if grad_weight is None else grad_weight.add_(share)
            if grad_bias is not None:
                grad_bias += (slope * scale[chunk]).sum(dim=0)
            del slope
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        return grad_hidden, grad_weight, grad_bias, None, None


def _scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target in float32, and whether it is the top-1 token, from logits of a chunk."""
    is_top1 = logits.max(dim=-1).indices == targets
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    return log_probs.gather(-1, targets[:, None]).squeeze(-1), is_top1


def _compiled_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same, compiled for any number of targets."""
    for tensor in (logits, targets):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    scores: tuple[Tensor, Tensor] = _compile_scores()(logits, targets)
    return scores


@cache
def _compile_scores() -> Callable[[Tensor, Tensor], Any]:
    return torch.compile(_scores, dynamic=False)


def _chunks(hidden: Tensor, weight: Tensor, max_logits: dict[str, int]) -> Iterator[slice]:
    """Slices of equal size, each with at most `max_logits` logits of the device."""
    count = hidden.shape[0]
    chunks = max(1, math.ceil(count * weight.shape[0] / max_logits.get(hidden.device.type, max_logits["cuda"])))
    size = max(1, math.ceil(count / chunks))
    return (slice(start, start + size) for start in range(0, count, size))

"""Document attention: varlen attention without padding or dense masks.

A batch is one row of tokens. Its `AttentionSpans` say which tokens attend to each other: each span is causal, and no
token attends outside of its span. This isolates the documents of a packed row, and lets the chosen and the rejected
answer of a preference pair share their prompt.

The attention functions are registered with transformers' `AttentionInterface`. Some models cannot use them: they do not
forward the spans to their attention layers, or mix tokens in another way, such as convolution. `isolates_documents`
detects them, and they train with transformers' own attention and masks instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from nesso_tune.errors import RecipeError
from nesso_tune.model.flash import (
    FLASH_DEVICES,
    FLASH_DTYPES,
    FLASH_KERNELS,
    FLASH_MAX_HEAD_DIM,
    AttentionShape,
    FlashKernel,
    VarlenInput,
    flash_problem,
    sdpa_per_sequence,
)

Kernel = Literal["flash-attn", "flash", "sdpa", "eager"]  # flash: torch's
# Names in AttentionInterface, registered below. transformers treats names that contain "flash" as its own kernels.
DOCUMENT_ATTENTION: dict[Kernel, str] = {
    "flash-attn": "nesso_document_varlen_package",
    "flash": "nesso_document_varlen",
    "sdpa": "nesso_document_per_span",
}
IN_WORDS: dict[Kernel, str] = {"flash-attn": "flash-attn", "flash": "flash of torch", "sdpa": "sdpa", "eager": "eager"}
# Tolerance of the isolation probe, relative to the largest hidden state: above rounding errors, far below any leak.
ISOLATION_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class AttentionSpans:
    """The spans of a row: tokens of a span attend causally to each other, and to no other token.

    Attributes:
        lengths: number of tokens of each span.
        longest: no less than the longest length; compiled layers need the same value for every row.
        cu_seqlens: cumulative span lengths as varlen kernels take them, int32, [spans + 1].
        position_ids: position of each token within its span, [1, row].
        gather_indices: row index of each token of the concatenated spans, [sum of lengths]; None if the spans are the
            row itself.
        restore_indices: index in the concatenated spans of each token of the row, [row]; None likewise.
    """

    lengths: tuple[int, ...]
    longest: int
    cu_seqlens: Tensor
    position_ids: Tensor
    gather_indices: Tensor | None = None
    restore_indices: Tensor | None = None

    @classmethod
    def from_documents(cls, lengths: Sequence[int], longest: int | None = None) -> AttentionSpans:
        """Spans of concatenated documents of these lengths; empty documents are skipped."""
        spans = tuple(length for length in lengths if length)
        positions = torch.cat([torch.arange(length) for length in spans])[None]
        return cls(spans, longest or max(spans), _cu_seqlens(spans), positions)

    @classmethod
    def from_pairs(cls, sizes: Sequence[tuple[int, int, int]]) -> AttentionSpans:
        """Spans of concatenated preference pairs, given as (prompt, chosen, rejected) lengths.

        The row holds each prompt once. Its spans are [prompt, chosen] and [prompt, rejected].
        """
        gather, restore, positions, row_start, span_start = [], [], [], 0, 0
        for prompt, chosen, rejected in sizes:
            first, whole = prompt + chosen, prompt + chosen + rejected
            prompt_indices = torch.arange(row_start, row_start + prompt)
            rejected_indices = torch.arange(row_start + first, row_start + whole)
            gather += [torch.arange(row_start, row_start + first), prompt_indices, rejected_indices]
            restore += [
                torch.arange(span_start, span_start + first),
                torch.arange(span_start + first + prompt, span_start + whole + prompt),
            ]
            positions += [torch.arange(first), torch.arange(prompt, prompt + rejected)]
            row_start, span_start = row_start + whole, span_start + whole + prompt
        lengths = tuple(n for prompt, chosen, rejected in sizes for n in (prompt + chosen, prompt + rejected))
        indices = (torch.cat(gather), torch.cat(restore))
        return cls(lengths, max(lengths), _cu_seqlens(lengths), torch.cat(positions)[None], *indices)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionSpans:
        """Returns a copy on `device`."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AttentionSpans:
        """Returns a copy in pinned memory."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> AttentionSpans:
        names = ("cu_seqlens", "position_ids", "gather_indices", "restore_indices")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})


def _cu_seqlens(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel of a run, and in words why it is not a faster one; empty on a machine without a GPU."""

    kernel: Kernel
    reason: str = ""

    def __str__(self) -> str:
        return IN_WORDS[self.kernel] + (f" ({self.reason})" if self.reason else "")


def choose_attention(setting: str, dtype: str = "bfloat16", shape: AttentionShape | None = None) -> AttentionChoice:
    """Returns the kernel for `model.attention`.

    flash and auto take the first flash kernel that works on this GPU in a forward and a backward pass; without one,
    auto takes sdpa.

    Args:
        setting: `model.attention`.
        dtype: precision of the computation.
        shape: sizes of the model's attention layers.

    Raises:
        RecipeError: if the setting is flash and no flash kernel works on this machine.
    """
    if setting in ("sdpa", "eager"):
        return AttentionChoice(setting)  # type: ignore[arg-type]
    unusable = _no_flash(dtype)
    problems = [] if unusable is None else [unusable]
    for kernel in FLASH_KERNELS if unusable is None else ():
        problem = flash_problem(kernel, getattr(torch, dtype), shape or AttentionShape())
        if problem is None:
            return AttentionChoice(kernel, "; ".join(problems))
        problems.append(f"{IN_WORDS[kernel]} {problem}")
    if setting == "flash":
        raise RecipeError("model.attention", f"flash cannot run: {'; '.join(problems)}", "set attention: auto")
    return AttentionChoice("sdpa", "; ".join(problems) if torch.cuda.is_available() else "")


def _no_flash(dtype: str) -> str | None:
    """Why this machine has no flash kernel at all."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "this GPU is older than Ampere"
    return None if getattr(torch, dtype) in FLASH_DTYPES else f"flash kernels do not compute in {dtype}"


def enable_document_attention(model: PreTrainedModel, kernel: Kernel) -> bool:
    """Switches a model to document attention if it supports it; otherwise the model stays unchanged.

    Args:
        model: neither wrapped nor sharded.
        kernel: the kernel to use; `eager` has no document attention.

    Returns:
        Whether the model now uses document attention.
    """
    before = model.config._attn_implementation
    if kernel == "eager" or not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(DOCUMENT_ATTENTION[kernel])
    if isolates_documents(model):
        return True
    model.set_attn_implementation(before)
    return False


def uses_document_attention(model: PreTrainedModel) -> bool:
    """Whether document attention is enabled in a model."""
    return model.config.get_text_config()._attn_implementation in DOCUMENT_ATTENTION.values()


def attention_description(model: PreTrainedModel) -> str:
    """Describes the attention of a model for the run's manifest."""
    used = model.config.get_text_config()._attn_implementation
    words = [IN_WORDS[kernel] for kernel, name in DOCUMENT_ATTENTION.items() if name == used]
    return f"{words[0]}, by document" if words else f"{used}, with masks"


@torch.no_grad()
def isolates_documents(model: PreTrainedModel) -> bool:
    """Whether a model with document attention computes the same hidden states for packed and for separate documents.

    Probes the model with a few tokens: two packed documents, and a pair of answers that share a prompt.
    """
    training, device = model.training, next(model.parameters()).device
    vocabulary = min(model.get_input_embeddings().weight.shape[0], 97)
    a, b, c = (torch.arange(at, at + n, device=device)[None] % vocabulary for at, n in ((3, 7), (41, 5), (60, 6)))
    model.eval()
    try:
        separate = [
            model.base_model(input_ids=ids, use_cache=False)[0][0]
            for ids in (a, b, torch.cat([a, b], 1), torch.cat([a, c], 1))
        ]
        documents = last_hidden_states(model, torch.cat([a, b], 1), AttentionSpans.from_documents([7, 5]).to(device))
        pair = last_hidden_states(model, torch.cat([a, b, c], 1), AttentionSpans.from_pairs([(7, 5, 6)]).to(device))
    except Exception:  # the model rejects `attention_spans`, or passes options that we do not support
        return False
    finally:
        model.train(training)
    expected = torch.cat([*separate[:2], separate[2], separate[3][7:]])
    tolerance = ISOLATION_TOLERANCE.get(expected.dtype, 1e-3) * float(expected.abs().max())
    return bool((torch.cat([documents[0], pair[0]]) - expected).abs().max() <= tolerance)


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor, spans: AttentionSpans) -> Tensor:
    """Last hidden states of a row of tokens under document attention, [1, row, hidden size]."""
    torch._dynamo.maybe_mark_dynamic(spans.cu_seqlens, 0)  # compiled layers take any number of documents
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)  # prevents a mask of [row, row]
    hidden: Tensor = model.base_model(
        input_ids=input_ids, position_ids=spans.position_ids, attention_mask=no_mask, use_cache=False,
        attention_spans=spans,
    ).last_hidden_state  # fmt: skip
    return hidden


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    flash: FlashKernel | None,
    attention_spans: AttentionSpans | None = None, dropout: float = 0.0, scaling: float | None = None,
    sliding_window: int | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function that transformers calls in every layer.

    Without spans, as in generation, it is transformers' own sdpa with its masks.

    Shapes:
        query: [1, heads, row, head dim]; key and value may have fewer heads (GQA).
        result: [1, row, heads, head dim].

    Raises:
        NotImplementedError: for logit soft-capping, attention sinks and learned position biases.
    """
    spans = attention_spans
    if spans is None:
        options |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        result, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result, None
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("document attention does not support soft-capping, sinks or position biases")
    device = query.device.type
    # rotary embeddings are float32, and with them queries and keys: flash kernels need the autocast precision
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    q, k, v = (tensor.transpose(1, 2)[0].to(dtype) for tensor in (query, key, value))  # [row, heads, head dim]
    if spans.gather_indices is not None:
        q, k, v = (tensor.index_select(0, spans.gather_indices) for tensor in (q, k, v))
    supported = device in FLASH_DEVICES and dtype in FLASH_DTYPES
    if flash is not None and supported and value.shape[-1] == query.shape[-1] <= FLASH_MAX_HEAD_DIM and not dropout:
        sequences = VarlenInput(spans.cu_seqlens, spans.longest)
        result = FLASH_KERNELS[flash](q, k, v, sequences, scaling, sliding_window)
    else:
        result = _untraced_sdpa(q, k, v, spans.lengths, scaling, dropout, sliding_window)
    if spans.restore_indices is not None:
        result = result.index_select(0, spans.restore_indices)
    return result[None], None


# Not traced by torch.compile: the computation depends on the lengths of each row.
_untraced_sdpa: Any = torch.compiler.disable(sdpa_per_sequence)
_untraced_attention: Any = torch.compiler.disable(_attention)
# torch's flash kernel is one operator to torch.compile, with the number of documents as a dynamic size.
_ATTENTION: dict[Kernel, Any] = {
    "flash": partial(_attention, flash="flash"),
    "flash-attn": partial(_untraced_attention, flash="flash-attn"),
    "sdpa": partial(_untraced_attention, flash=None),
}
for _kernel, _name in DOCUMENT_ATTENTION.items():
    AttentionInterface.register(_name, _ATTENTION[_kernel])
    AttentionMaskInterface.register(_name, sdpa_mask)

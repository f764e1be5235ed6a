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
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from nesso_tune.errors import RecipeError

Kernel = Literal["flash", "sdpa", "eager"]
# Names in AttentionInterface, registered below. transformers treats names that contain "flash" as its own kernels.
DOCUMENT_ATTENTION = {"flash": "nesso_document_varlen", "sdpa": "nesso_document_per_span"}
FLASH_ATTN_INSTALLED = find_spec("flash_attn") is not None
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_MAX_HEAD_DIM = 256
# Tolerance of the isolation probe, relative to the largest hidden state: above rounding errors, far below any leak.
ISOLATION_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class AttentionSpans:
    """The spans of a row: tokens of a span attend causally to each other, and to no other token.

    Attributes:
        lengths: number of tokens of each span.
        cu_seqlens: cumulative span lengths as varlen kernels take them, int32, [spans + 1].
        position_ids: position of each token within its span, [1, row].
        gather_indices: row index of each token of the concatenated spans, [sum of lengths]; None if the spans are the
            row itself.
        restore_indices: index in the concatenated spans of each token of the row, [row]; None likewise.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    position_ids: Tensor
    gather_indices: Tensor | None = None
    restore_indices: Tensor | None = None

    @classmethod
    def from_documents(cls, lengths: Sequence[int]) -> AttentionSpans:
        """Spans of concatenated documents of these lengths; empty documents are skipped."""
        spans = tuple(length for length in lengths if length)
        return cls(spans, _cu_seqlens(spans), torch.cat([torch.arange(length) for length in spans])[None])

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
        return cls(lengths, _cu_seqlens(lengths), torch.cat(positions)[None], torch.cat(gather), torch.cat(restore))

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


def choose_attention(setting: str) -> Kernel:
    """Returns the kernel for `model.attention`; `auto` is flash on GPUs that support it, otherwise sdpa.

    Raises:
        RecipeError: if the setting is flash and it cannot run on this machine.
    """
    can_flash = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if setting == "flash" and not can_flash:
        missing = "this GPU is older than Ampere" if torch.cuda.is_available() else "there is no GPU"
        raise RecipeError("model.attention", f"flash cannot run: {missing}", "set attention: auto")
    if setting == "auto":
        return "flash" if can_flash else "sdpa"
    return setting  # type: ignore[return-value]


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


def attention_description(model: PreTrainedModel, dtype: str) -> str:
    """Describes the attention of a model for the run's manifest; `dtype` is the compute precision."""
    used = model.config.get_text_config()._attn_implementation
    if not uses_document_attention(model):
        return f"{used}, with masks"
    if used == DOCUMENT_ATTENTION["flash"] and dtype == "bfloat16":
        return f"{'flash-attn' if FLASH_ATTN_INSTALLED else 'flash of torch'}, by document"
    return "sdpa, by document"


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
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)  # prevents a mask of [row, row]
    hidden: Tensor = model.base_model(
        input_ids=input_ids, position_ids=spans.position_ids, attention_mask=no_mask, use_cache=False,
        attention_spans=spans,
    ).last_hidden_state  # fmt: skip
    return hidden


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, flash: bool,
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
    supported = dtype in FLASH_DTYPES and query.shape[-1] <= FLASH_MAX_HEAD_DIM and query.is_cuda
    if flash and supported and not dropout:
        result = _flash(q, k, v, spans, scaling, sliding_window)
    else:
        result = _sdpa_per_span(q, k, v, spans, scaling, dropout, sliding_window)
    if spans.restore_indices is not None:
        result = result.index_select(0, spans.restore_indices)
    return result[None], None


def _flash(q: Tensor, k: Tensor, v: Tensor, spans: AttentionSpans, scaling: float | None, window: int | None) -> Tensor:
    """One varlen kernel for all spans: flash-attn if it is installed, otherwise torch's."""
    longest, cu_seqlens = max(spans.lengths), spans.cu_seqlens
    window_size = (-1 if window is None else window - 1, 0)  # tokens to the left and to the right
    result: Tensor
    if FLASH_ATTN_INSTALLED:
        from flash_attn import flash_attn_varlen_func

        result = flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scaling, causal=True,
            window_size=window_size,
        )  # fmt: skip
        return result
    result = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=window_size,
                         enable_gqa=q.shape[1] != k.shape[1])  # fmt: skip
    return result


def _sdpa_per_span(
    q: Tensor, k: Tensor, v: Tensor, spans: AttentionSpans, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    """One call of scaled_dot_product_attention for each span."""
    parts = (tensor.split(spans.lengths) for tensor in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    results = []
    for span in zip(*parts, strict=True):
        length = len(span[0])
        span_q, span_k, span_v = (part.transpose(0, 1)[None] for part in span)
        windowed = window is not None and window < length
        out = functional.scaled_dot_product_attention(
            span_q,
            span_k,
            span_v,
            attn_mask=_sliding_window_mask(length, window, q.device) if windowed and window else None,
            is_causal=not windowed,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=grouped,
        )
        results.append(out[0].transpose(0, 1))
    return torch.cat(results)


def _sliding_window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Causal mask of a sliding window: each token and the `window - 1` before it, [length, length]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


# Not traced by torch.compile: the computation depends on the lengths of each row.
_untraced_attention: Any = torch.compiler.disable(_attention)
for _kernel, _name in DOCUMENT_ATTENTION.items():
    AttentionInterface.register(_name, partial(_untraced_attention, flash=_kernel == "flash"))
    AttentionMaskInterface.register(_name, sdpa_mask)

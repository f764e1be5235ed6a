"""Attention by document: packed rows never meet each other, in whatever kernel computes.

A row of tokens comes with its `Segments`: runs of tokens that attend causally within themselves and see nothing else.
That is how packed documents are kept apart, and how the chosen and the rejected answer of a pair share their prompt.
Nothing is padded and no mask is made. The attention is registered with transformers under a name of its own; a model
that does not hand the segments on to it, or mixes tokens in another way, is found out by `isolates` and trained
with transformers' own attention and masks instead.
"""

from __future__ import annotations

from collections.abc import Sequence
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
# Registered below. transformers takes what has "flash" in its name for one of its own kernels.
BY_DOCUMENT = {"flash": "nesso_by_document_varlen", "sdpa": "nesso_by_document_by_run"}
FLASH_TYPES = (torch.bfloat16, torch.float16)
FLASH_ATTN = find_spec("flash_attn") is not None  # asked once: a layer asks for every row
FLASH_HEAD = 256  # widest head of the flash kernels
# How far hidden states may be off, as a share of the largest: rounding stays far below, a leak is far above.
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Segments:
    """Which tokens of a row attend to each other.

    Attributes:
        lengths: tokens of each run.
        bounds: int32, where each run begins, and the end of the last.
        positions: of each token of the row in its run, [1, row].
        gather: which tokens of the row the runs are made of, [sum of lengths]; None where they are the row itself.
        back: where in the runs each token of the row has its result, [row]; None likewise.
    """

    lengths: tuple[int, ...]
    bounds: Tensor
    positions: Tensor
    gather: Tensor | None = None
    back: Tensor | None = None

    @classmethod
    def of_documents(cls, lengths: Sequence[int]) -> Segments:
        """Documents laid end to end."""
        own = tuple(length for length in lengths if length)
        return cls(own, _bounds(own), torch.cat([torch.arange(length) for length in own])[None])

    @classmethod
    def of_pairs(cls, parts: Sequence[tuple[int, int, int]]) -> Segments:
        """Pairs laid end to end, each as prompt, chosen and rejected answer of these lengths.

        Both answers follow the one prompt: the runs are [prompt, chosen] and [prompt, rejected].
        """
        gather, back, positions, start, ran = [], [], [], 0, 0
        for prompt, chosen, rejected in parts:
            first, whole = prompt + chosen, prompt + chosen + rejected
            shared, own = torch.arange(start, start + prompt), torch.arange(start + first, start + whole)
            gather += [torch.arange(start, start + first), shared, own]
            back += [torch.arange(ran, ran + first), torch.arange(ran + first + prompt, ran + whole + prompt)]
            positions += [torch.arange(first), torch.arange(prompt, prompt + rejected)]
            start, ran = start + whole, ran + whole + prompt
        lengths = tuple(n for prompt, chosen, rejected in parts for n in (prompt + chosen, prompt + rejected))
        return cls(lengths, _bounds(lengths), torch.cat(positions)[None], torch.cat(gather), torch.cat(back))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """The same on a device."""
        tensors = {name: getattr(self, name) for name in ("bounds", "positions", "gather", "back")}
        moved = {n: t.to(device, non_blocking=non_blocking) for n, t in tensors.items() if t is not None}
        return replace(self, **moved)


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def choose_attention(wanted: str) -> Kernel:
    """The kernel for `model.attention`; `auto` takes flash on GPUs that have it, else sdpa.

    Raises:
        RecipeError: if flash is asked for and cannot run here.
    """
    can_flash = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if wanted == "flash" and not can_flash:
        missing = "this GPU is older than Ampere" if torch.cuda.is_available() else "there is no GPU"
        raise RecipeError("model.attention", f"flash cannot run: {missing}", "set attention: auto")
    if wanted == "auto":
        return "flash" if can_flash else "sdpa"
    return wanted  # type: ignore[return-value]


def attends_by_document(model: PreTrainedModel) -> bool:
    """Whether a model's attention is ours."""
    return model.config.get_text_config()._attn_implementation in BY_DOCUMENT.values()


def kernel_in_words(model: PreTrainedModel, dtype: str) -> str:
    """The attention that a model trains with, as a run records it; `dtype` is what it computes in."""
    used = model.config.get_text_config()._attn_implementation
    if not attends_by_document(model):
        return f"{used}, with masks"
    if used == BY_DOCUMENT["flash"] and dtype == "bfloat16":
        return f"{'flash-attn' if FLASH_ATTN else 'flash of torch'}, by document"
    return "sdpa, by document"


def attend_by_document(model: PreTrainedModel, kernel: Kernel) -> bool:
    """Makes a model attend by document if it can; otherwise it stays as it is.

    Args:
        model: neither wrapped nor sharded.
        kernel: what computes; `eager` never does.

    Returns:
        Whether it does.
    """
    before = model.config._attn_implementation
    if kernel == "eager" or not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(BY_DOCUMENT[kernel])
    if isolates(model):
        return True
    model.set_attn_implementation(before)
    return False


@torch.no_grad()
def isolates(model: PreTrainedModel) -> bool:
    """Whether packed documents, and answers that share a prompt, compute what they compute alone.

    Asked of the model itself, with a handful of tokens.
    """
    training, device = model.training, next(model.parameters()).device
    rows = min(model.get_input_embeddings().weight.shape[0], 97)
    one, two, three = (torch.arange(at, at + n, device=device)[None] % rows for at, n in ((3, 7), (41, 5), (60, 6)))
    model.eval()
    try:
        alone = [
            model.base_model(input_ids=ids, use_cache=False)[0][0]
            for ids in (one, two, torch.cat([one, two], 1), torch.cat([one, three], 1))
        ]
        documents = through(model, torch.cat([one, two], 1), Segments.of_documents([7, 5]).to(device))
        pair = through(model, torch.cat([one, two, three], 1), Segments.of_pairs([(7, 5, 6)]).to(device))
    except Exception:  # it takes no segments, or we not its options, or its base is no base
        return False
    finally:
        model.train(training)
    wanted = torch.cat([*alone[:2], alone[2], alone[3][7:]])
    allowed = CLOSE.get(wanted.dtype, 1e-3) * float(wanted.abs().max())
    return bool((torch.cat([documents[0], pair[0]]) - wanted).abs().max() <= allowed)


def through(model: PreTrainedModel, ids: Tensor, segments: Segments) -> Tensor:
    """Last hidden states of a row of tokens, [1, row, width]."""
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # or transformers makes one of [row, row]
    hidden: Tensor = model.base_model(
        input_ids=ids, position_ids=segments.positions, attention_mask=no_mask, use_cache=False, segments=segments
    ).last_hidden_state
    return hidden


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, flash: bool,
    segments: Segments | None = None, dropout: float = 0.0, scaling: float | None = None,
    sliding_window: int | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls in every layer; queries are [1, heads, row, width], the result [1, row, heads, width].

    Without segments (a generation, say) it is transformers' own sdpa with its masks.

    Raises:
        NotImplementedError: for what no kernel here does: capped scores, sinks, learned biases.
    """
    if segments is None:
        options |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        result, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result, None
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("attention by document knows no caps, sinks or biases")
    device = query.device.type
    # rotary embeddings are float32, and so are queries and keys after them: flash kernels want what is computed in
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    q, k, v = (tensor.transpose(1, 2)[0].to(precision) for tensor in (query, key, value))  # [row, heads, width]
    if segments.gather is not None:
        q, k, v = (tensor.index_select(0, segments.gather) for tensor in (q, k, v))
    fits = precision in FLASH_TYPES and query.shape[-1] <= FLASH_HEAD and query.is_cuda
    if flash and fits and not dropout:
        result = _flash(q, k, v, segments, scaling, sliding_window)
    else:
        result = _run_by_run(q, k, v, segments, scaling, dropout, sliding_window)
    if segments.back is not None:
        result = result.index_select(0, segments.back)
    return result[None], None


def _run_by_run(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    parts = (tensor.split(segments.lengths) for tensor in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    results = []
    for run in zip(*parts, strict=True):
        length = len(run[0])
        own_q, own_k, own_v = (part.transpose(0, 1)[None] for part in run)
        narrow = window is not None and window < length
        out = functional.scaled_dot_product_attention(
            own_q,
            own_k,
            own_v,
            attn_mask=_band(length, window, q.device) if narrow and window else None,
            is_causal=not narrow,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=grouped,
        )
        results.append(out[0].transpose(0, 1))
    return torch.cat(results)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """What a token sees under a sliding window: itself and the `window - 1` before it; [length, length]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float | None, window: int | None) -> Tensor:
    longest, bounds = max(segments.lengths), segments.bounds
    sees = (-1 if window is None else window - 1, 0)  # tokens to the left and to the right
    result: Tensor
    if FLASH_ATTN:
        from flash_attn import flash_attn_varlen_func

        result = flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, softmax_scale=scaling, causal=True, window_size=sees
        )
        return result
    result = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=sees,
                         enable_gqa=q.shape[1] != k.shape[1])  # fmt: skip
    return result


# Not traced where layers are compiled: what it does depends on the lengths of every row.
_apart: Any = torch.compiler.disable(_attention)
for _kernel, _name in BY_DOCUMENT.items():
    AttentionInterface.register(_name, partial(_apart, flash=_kernel == "flash"))
    AttentionMaskInterface.register(_name, sdpa_mask)

"""Flash kernels of document attention, and their test on the training device.

There are two: that of the package flash-attn, and torch's `varlen_attn`. That a package is installed does not prove
that it works: it may be built for another torch, CUDA or GPU, or not support a head dimension. So a kernel is chosen
only after a forward and a backward pass on the training device have given what scaled_dot_product_attention gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from nesso_tune.errors import RunEnvironmentError, first_line

FlashKernel = Literal["flash-attn", "flash"]
FLASH_DEVICES = ("cuda",)
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_MAX_HEAD_DIM = 256
VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)  # torch 2.11 has no `enable_gqa`
PROBE_LENGTHS = (19, 1, 140)  # tokens of the documents of the test: torch may use cuDNN for rows above 128
PROBE_WINDOW = 8
PROBE_TOLERANCE = 5e-2  # relative to the largest value; bfloat16 rounds to 4e-3


@dataclass(frozen=True)
class AttentionShape:
    """What a kernel must support for a model.

    Attributes:
        heads, key_value_heads, head_dim: sizes of an attention layer.
        window: whether layers have a sliding window.
    """

    heads: int = 8
    key_value_heads: int = 4
    head_dim: int = 64
    window: bool = False

    @classmethod
    def of(cls, config: Any) -> AttentionShape:
        """The shape that a model's configuration states; the default where it states none."""
        text = config.get_text_config(decoder=True)
        heads = getattr(text, "num_attention_heads", None)
        if not isinstance(heads, int):
            return cls()
        groups = getattr(text, "num_key_value_heads", None)
        dim = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // heads or cls.head_dim
        window = getattr(text, "sliding_window", None) is not None
        return cls(heads, groups if isinstance(groups, int) and groups else heads, dim, window)


@dataclass(frozen=True)
class VarlenInput:
    """Concatenated sequences: their cumulated lengths as int32 on the device, [sequences + 1], and no less than the
    length of the longest."""

    cu_seqlens: Tensor
    longest: int


Varlen = Callable[[Tensor, Tensor, Tensor, VarlenInput, float | None, int | None], Tensor]


@cache
def _flash_attn_function() -> Any:
    from flash_attn import flash_attn_varlen_func  # an optional package

    return flash_attn_varlen_func


def flash_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, sequences: VarlenInput, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention within each sequence by the package flash-attn; arguments as of `torch_varlen`."""
    longest, cu_seqlens = sequences.longest, sequences.cu_seqlens
    result: Tensor = _flash_attn_function()(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scaling, causal=True,
        window_size=_window_size(window), deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return result


def torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, sequences: VarlenInput, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention within each sequence by torch: flash attention or, from torch 2.15 on Hopper, cuDNN's.

    Shapes:
        q: [tokens, heads, head dim]; k and v may have fewer heads.

    Args:
        q, k, v: on a GPU, in one of `FLASH_DTYPES`.
        sequences: sequences that the tokens belong to.
        scaling: factor of the scores; None for 1/√(head dim).
        window: tokens that each token attends to, itself included; None for all before it.
    """
    longest, cu_seqlens = sequences.longest, sequences.cu_seqlens
    options: dict[str, Any] = {"scale": scaling, "window_size": _window_size(window)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in VARLEN_OPTIONS:
            options["enable_gqa"] = True
        else:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    result: Tensor = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    return result


def _window_size(window: int | None) -> tuple[int, int]:
    """Tokens to the left and to the right."""
    return (-1 if window is None else window - 1, 0)


def sdpa_per_sequence(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    """One call of scaled_dot_product_attention for each sequence."""
    parts = (tensor.split(list(lengths)) for tensor in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    results = []
    for sequence in zip(*parts, strict=True):
        length = len(sequence[0])
        one_q, one_k, one_v = (part.transpose(0, 1)[None] for part in sequence)
        windowed = window is not None and window < length
        out = functional.scaled_dot_product_attention(
            one_q,
            one_k,
            one_v,
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


FLASH_KERNELS: dict[FlashKernel, Varlen] = {"flash-attn": flash_attn_varlen, "flash": torch_varlen}  # fastest first


@cache
def flash_problem(kernel: FlashKernel, dtype: torch.dtype, shape: AttentionShape) -> str | None:
    """Why a kernel cannot be used on this GPU, in words; None if a forward and a backward pass were right.

    Raises:
        RunEnvironmentError: if the GPU cannot be used any more after the kernel has failed.
        torch.OutOfMemoryError: if the GPU has no memory left.
    """
    try:
        error = _probe_error(FLASH_KERNELS[kernel], dtype, shape)
    except torch.OutOfMemoryError:
        raise
    except ModuleNotFoundError as missing:
        return "is not installed" if missing.name == "flash_attn" else f"fails ({first_line(missing)})"
    except Exception as failure:  # a broken build raises any type
        _check_usable(kernel, failure)
        return f"fails ({first_line(failure)})"
    return None if error <= PROBE_TOLERANCE else f"gives wrong results (relative error {error:.2g})"


def _probe_error(kernel: Varlen, dtype: torch.dtype, shape: AttentionShape) -> float:
    """Largest error of results and gradients of a kernel against sdpa in float32, relative to the largest value."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    sizes = (shape.heads, shape.key_value_heads, shape.key_value_heads)
    tokens = sum(PROBE_LENGTHS)
    tensors = [torch.randn(tokens, heads, shape.head_dim, generator=generator).to(device, dtype) for heads in sizes]
    weight = torch.randn(tokens, shape.heads, shape.head_dim, generator=generator).to(device)
    cumulative = torch.tensor([0, *PROBE_LENGTHS]).cumsum(0).to(device, torch.int32)
    sequences, worst = VarlenInput(cumulative, max(PROBE_LENGTHS)), 0.0
    for window in (None, PROBE_WINDOW) if shape.window else (None,):
        got = _with_gradients(tensors, weight, lambda q, k, v, w=window: kernel(q, k, v, sequences, None, w))
        expected = _with_gradients(
            [tensor.float() for tensor in tensors], weight,
            lambda q, k, v, w=window: sdpa_per_sequence(q, k, v, PROBE_LENGTHS, None, 0.0, w),
        )  # fmt: skip
        errors = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)]
        worst = max([worst, *(error if error == error else float("inf") for error in errors)])  # NaN is wrong
    return worst


def _with_gradients(tensors: list[Tensor], weight: Tensor, compute: Callable[..., Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        result = compute(*leaves)
        return [result.detach(), *torch.autograd.grad((result.float() * weight).sum(), leaves)]


def _check_usable(kernel: str, failure: Exception) -> None:
    """Raises RunEnvironmentError if the failure, such as an illegal memory access, has made the GPU unusable."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except Exception:
        raise RunEnvironmentError(
            "model.attention", f"{kernel} fails, and the GPU cannot be used after it ({first_line(failure)})",
            "set attention: sdpa, or install a build of it that fits torch and the GPU",
        ) from None  # fmt: skip

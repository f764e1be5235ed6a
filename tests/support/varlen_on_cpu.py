"""A CPU kernel for torch's `varlen_attn`, so that what torch.compile makes of it can be tested without a GPU.

Importing this module registers the kernel for the operators of torch, which are otherwise for GPUs only.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen


def _sequences(cu_seqlens: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each sequence of tensors of [tokens, heads, head dim], in float32 and as [heads, length, head dim]."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    parts = [tensor.split(lengths) for tensor in tensors]
    return (tuple(part.float().transpose(0, 1) for part in sequence) for sequence in zip(*parts, strict=True))


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    scores = q @ k.transpose(1, 2) * scale
    return scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf")).softmax(dim=-1)


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_k: Tensor, max_q: int, max_k: int,
             is_causal: bool = False, scale: float | None = None, *_: Any) -> tuple[Tensor, ...]:  # fmt: skip
    assert is_causal
    group, results = q.shape[1] // k.shape[1], []
    for one_q, one_k, one_v in _sequences(cu_seqlens, q, k, v):
        keys, values = (tensor.repeat_interleave(group, dim=0) for tensor in (one_k, one_v))
        p = _probabilities(one_q, keys, scale or q.shape[-1] ** -0.5)
        results.append((p @ values).transpose(0, 1))
    unused = torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)
    return (torch.cat(results).to(q.dtype), *unused)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
              cu_k: Tensor, max_q: int, max_k: int, is_causal: bool, rng_state: Tensor, scale: float | None = None,
              *_: Any) -> tuple[Tensor, ...]:  # fmt: skip
    group, factor = q.shape[1] // k.shape[1], scale or q.shape[-1] ** -0.5
    results = []
    for one_grad, one_q, one_k, one_v in _sequences(cu_seqlens, grad, q, k, v):
        keys, values = (tensor.repeat_interleave(group, dim=0) for tensor in (one_k, one_v))
        p = _probabilities(one_q, keys, factor)
        slope = one_grad @ values.transpose(1, 2)
        slope = p * (slope - (p * slope).sum(dim=-1, keepdim=True)) * factor
        wide = (slope.transpose(1, 2) @ one_q, p.transpose(1, 2) @ one_grad)
        grads = (slope @ keys, *(tensor.unflatten(0, (-1, group)).sum(dim=1) for tensor in wide))
        results.append([tensor.transpose(0, 1) for tensor in grads])
    return tuple(torch.cat(parts).to(q.dtype) for parts in zip(*results, strict=True))


varlen._varlen_attn.register_kernel("cpu")(_forward)
varlen._varlen_attn_backward.register_kernel("cpu")(_backward)

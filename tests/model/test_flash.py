"""Flash kernels are called by what they accept, and tested before they are chosen."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, MistralConfig

from nesso_tune import RunEnvironmentError
from nesso_tune.model import flash
from nesso_tune.model.flash import AttentionShape, flash_problem, sdpa_per_sequence

SHAPE = AttentionShape(heads=6, key_value_heads=2, head_dim=8, window=True)
LENGTHS = (5, 9)


@pytest.fixture(autouse=True)
def _forget():
    flash_problem.cache_clear()
    flash._flash_attn_function.cache_clear()
    yield
    flash_problem.cache_clear()
    flash._flash_attn_function.cache_clear()


def dense(q, k, v, cu_seqlens, scale, window_size, grouped):
    """Attention by a dense mask: another way to the result than sdpa on each sequence."""
    positions = torch.arange(len(q))
    sequence = torch.searchsorted(cu_seqlens[1:].long(), positions, right=True)
    distance = positions[:, None] - positions[None]
    seen = (sequence[:, None] == sequence[None]) & (distance >= 0)
    if window_size[0] >= 0:
        seen &= distance <= window_size[0]
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def torch_kernel(gqa, calls):
    """torch's `varlen_attn` on a CPU, with or without grouped heads as its versions have them."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, **options):
        assert gqa or not options, "torch 2.11 has no other options"
        assert options.get("enable_gqa", False) == (q.shape[1] != k.shape[1])
        assert (max_q, max_k) == (max((cu_q[1:] - cu_q[:-1]).tolist()),) * 2
        calls.append(k.shape[1])
        return dense(q, k, v, cu_q, scale, window_size, options.get("enable_gqa", False))

    return varlen_attn


@pytest.mark.parametrize("gqa", [True, False])
def test_torchs_kernel_is_called_by_its_signature(monkeypatch, gqa):
    calls = []
    monkeypatch.setattr(flash, "varlen_attn", torch_kernel(gqa, calls))
    monkeypatch.setattr(flash, "VARLEN_OPTIONS", {"scale", "window_size", *(["enable_gqa"] if gqa else [])})
    assert flash_problem("flash", torch.bfloat16, SHAPE) is None
    assert calls == [2, 2] if gqa else [6, 6], "keys are expanded only where the kernel has no grouped heads"


def test_the_options_of_the_installed_torch():
    assert {"scale", "window_size"} <= flash.VARLEN_OPTIONS


def package(monkeypatch, function):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=function))


def test_flash_attn_gets_the_deterministic_setting(monkeypatch):
    seen = []

    def function(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, deterministic):
        assert causal
        seen.append(deterministic)
        return dense(q, k, v, cu_q, softmax_scale, window_size, True)

    package(monkeypatch, function)
    assert flash_problem("flash-attn", torch.bfloat16, SHAPE) is None
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    flash_problem.cache_clear()
    assert flash_problem("flash-attn", torch.bfloat16, SHAPE) is None
    assert seen == [False, False, True, True]


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.2


def broken(q, k, v, cu_q, *_, window_size, **__):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


def ignores_documents(q, k, v, cu_q, *_, window_size, **__):
    return dense(q, k, v, torch.tensor([0, len(q)]), None, window_size, True)


def ignores_the_window(q, k, v, cu_q, *_, window_size, **__):
    return dense(q, k, v, cu_q, None, (-1, 0), True)


def wrong_backward(q, k, v, cu_q, *_, window_size, **__):
    return dense(q, k, WrongGradient.apply(v), cu_q, None, window_size, True)


def gives_nan(q, k, v, cu_q, *_, window_size, **__):
    return dense(q, k, v, cu_q, None, window_size, True) * float("nan")


@pytest.mark.parametrize(
    ("function", "problem"),
    [(broken, "fails (CUDA error: no kernel image"), (ignores_documents, "gives wrong results"),
     (ignores_the_window, "gives wrong results"), (wrong_backward, "gives wrong results (relative error 0."),
     (gives_nan, "gives wrong results (relative error inf)")],
)  # fmt: skip
def test_a_broken_kernel_is_found(monkeypatch, function, problem):
    package(monkeypatch, function)
    assert flash_problem("flash-attn", torch.bfloat16, SHAPE).startswith(problem)


def test_a_missing_package_and_one_that_does_not_load(monkeypatch):
    assert flash_problem("flash-attn", torch.bfloat16, SHAPE) == "is not installed"
    flash_problem.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    assert flash_problem("flash-attn", torch.bfloat16, SHAPE).startswith("fails (cannot import name")


def test_no_memory_is_not_taken_for_a_broken_kernel(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    package(monkeypatch, full)
    with pytest.raises(torch.OutOfMemoryError):
        flash_problem("flash-attn", torch.bfloat16, SHAPE)


def test_a_kernel_that_leaves_the_gpu_unusable_ends_the_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RunEnvironmentError, match="flash-attn fails, and the GPU cannot be used after it"):
        flash._check_usable("flash-attn", RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_shape_of_a_configuration():
    llama = LlamaConfig(hidden_size=960, num_attention_heads=15, num_key_value_heads=5, head_dim=64)
    assert AttentionShape.of(llama) == AttentionShape(15, 5, 64)
    mistral = MistralConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    assert AttentionShape.of(mistral) == AttentionShape(4, 2, 16, window=True)


def test_sdpa_on_each_sequence_is_a_dense_mask_over_all():
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), heads, 8) for heads in (6, 2, 2))
    cumulative = torch.tensor([0, *LENGTHS]).cumsum(0)
    for window, size in ((None, (-1, 0)), (4, (3, 0))):
        got = sdpa_per_sequence(q, k, v, LENGTHS, None, 0.0, window)
        torch.testing.assert_close(got, dense(q, k, v, cumulative, None, size, True))

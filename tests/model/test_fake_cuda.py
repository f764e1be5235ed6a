"""Attention, LM head and grouped metrics on fake CUDA tensors: devices, dtypes and kernel arguments without a GPU.

Fake tensors have a shape, a dtype and a device, but no values. With a CUDA build of torch, and no driver, every
operation of a forward pass on `cuda` is checked as far as torch can check it without running it. A CPU build has no
CUDA kernels to check against: there only the path for CPUs runs.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoModelForCausalLM, LlamaConfig

from nesso_tune.model import flash
from nesso_tune.model.attention import DOCUMENT_ATTENTION, AttentionSpans, last_hidden_states
from nesso_tune.model.lm_head import token_log_probs
from nesso_tune.training.grouped_metrics import GroupedMetrics, Groups
from nesso_tune.training.sft import SFT_METRICS

CUDA_BUILD = torch.version.cuda is not None
TOKENS, SUPERVISED, VOCABULARY = 64, 30, 1000
ZAGREUS = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=960, intermediate_size=2560, num_hidden_layers=2, num_attention_heads=15,
    num_key_value_heads=5, head_dim=64, tie_word_embeddings=True, attn_implementation="sdpa",
)  # fmt: skip
SPANS = {
    "documents": AttentionSpans.from_documents([40, 24]),
    "pairs": AttentionSpans.from_pairs([(10, 14, 8), (12, 9, 11)]),
}
devices = pytest.mark.parametrize("device", [
    "cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA_BUILD, reason="needs a CUDA build of torch"))
])  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """Arguments of torch's flash kernel, which is really called."""
    seen, kernel = [], flash.varlen_attn

    def recorded(q, k, v, *arguments, **options):
        seen.append((q.dtype, q.device.type, q.shape[1], k.shape[1]))
        return kernel(q, k, v, *arguments, **options)

    monkeypatch.setattr(flash, "varlen_attn", recorded)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))  # torch 2.15 chooses the kernel by it
    return seen


def autocast(device, monkeypatch):
    """bfloat16 autocast; on `cuda`, torch asks the driver, and there is none, whether the GPU has bfloat16."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        return torch.autocast(device, torch.bfloat16)


@devices
@pytest.mark.parametrize("kind", SPANS)
def test_forward_pass_and_metrics(device, kind, calls, monkeypatch):
    groups = Groups(("it", "en"), ("a",))
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), torch.no_grad():
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(ZAGREUS)
        model.set_attn_implementation(DOCUMENT_ATTENTION["flash"])
        ids, targets = torch.zeros(1, TOKENS, dtype=torch.long), torch.zeros(SUPERVISED, dtype=torch.long)
        with autocast(device, monkeypatch):
            hidden = last_hidden_states(model, ids.to(device), SPANS[kind].to(device))
            kept = hidden[0].index_select(0, targets.to(device))
            log_probs, is_top1 = token_log_probs(kept, model.get_output_embeddings(), targets.to(device))
        metrics = GroupedMetrics(SFT_METRICS, groups, device)
        metrics.add("loss", targets.to(device), -log_probs, torch.ones_like(log_probs))
        metrics.add("token_accuracy", targets.to(device), is_top1.float(), torch.ones_like(log_probs))
    assert hidden.shape == (1, TOKENS, 960)
    assert {hidden.device.type, log_probs.device.type, is_top1.device.type} == {device}
    assert log_probs.shape == is_top1.shape == (SUPERVISED,)
    assert log_probs.dtype == torch.float32
    key_value_heads = 5 if "enable_gqa" in flash.VARLEN_OPTIONS else 15
    assert calls == [(torch.bfloat16, "cuda", 15, key_value_heads)] * 2 * (device == "cuda")


@devices
def test_backward_pass_of_attention(device, calls, monkeypatch):
    """Gradients of the kernel's result: their shapes are those of queries, keys and values without expanded heads."""
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        sizes = [(15, 64), (5, 64), (5, 64)]
        tensors = [torch.randn(TOKENS, *size, dtype=dtype, device=device, requires_grad=True) for size in sizes]
        spans = SPANS["documents"].to(device)
        sequences = flash.VarlenInput(spans.cu_seqlens, spans.longest)
        if device == "cuda":
            out = flash.torch_varlen(*tensors, sequences, None, None)
        else:
            out = flash.sdpa_per_sequence(*tensors, spans.lengths, None, 0.0, None)
        try:
            gradients = torch.autograd.grad(out.float().sum(), tensors)
        except RuntimeError as error:
            if "no NVIDIA driver" in str(error) or "hasPrimaryContext" in str(error):
                pytest.skip(f"the autograd engine of this torch asks the driver: {str(error).splitlines()[0]}")
            raise
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in tensors]
    assert {gradient.device.type for gradient in gradients} == {device}

"""Compiled decoder layers and LM head: one graph for all rows, few kernels and bytes, and the results of eager ones."""

from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import LlamaConfig, LlamaForCausalLM

import tests.support.varlen_on_cpu  # noqa: F401  # registers a kernel
from nesso_tune.model import attention, lm_head
from nesso_tune.model.attention import DOCUMENT_ATTENTION, AttentionSpans, last_hidden_states
from nesso_tune.model.flash import VARLEN_OPTIONS
from nesso_tune.model.lm_head import token_log_probs
from nesso_tune.model.loading import compile_layers, not_compiled
from tests.support.kernels import EagerKernels, compiled_with
from tests.support.runs import thorough

ROW = 96
LAYOUTS = ([60, 36], [96], [10, 20, 30, 36], [1, 1, 94], [48, 47, 1])
HIDDEN, INNER, KEYS = 960, 2560, 320  # Zagreus: width, width of the MLP, width of keys and of values
TOKENS = 8 * 4096


@pytest.fixture(autouse=True)
def _flash_on_a_cpu(monkeypatch):
    monkeypatch.setattr(attention, "FLASH_DEVICES", ("cpu",))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def llama(**sizes):
    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=True, attn_implementation="sdpa", **sizes)
    model = LlamaForCausalLM(config).train()
    model.set_attn_implementation(DOCUMENT_ATTENTION["flash"])
    return model


def small():
    return llama(vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6,
                 num_key_value_heads=2, head_dim=8)  # fmt: skip


def hidden_and_gradients(model, lengths):
    model.zero_grad()
    torch.manual_seed(sum(lengths[:1]))
    ids = torch.randint(0, 64, (1, ROW))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = last_hidden_states(model, ids, AttentionSpans.from_documents(lengths, longest=ROW))
    hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.model.layers.parameters())]


def test_five_layouts_of_documents_share_one_graph():
    """Of all layers, too; results are those of eager layers up to rounding."""
    model = small()
    expected = [hidden_and_gradients(model, lengths) for lengths in LAYOUTS]
    compile_layers(model, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = [hidden_and_gradients(model, lengths) for lengths in LAYOUTS]
    assert counters["stats"]["unique_graphs"] == 1, "attention is an operator of the graph, which is not split there"
    assert not counters["graph_break"]
    for layout, plain in zip(got, expected, strict=True):
        for ours, theirs in zip(layout, plain, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-2, "bfloat16 rounds to 4e-3"


def test_an_evaluation_runs_eagerly_on_rows_of_any_length():
    model = small()
    compile_layers(model)
    with not_compiled(), torch.no_grad():
        last_hidden_states(model, torch.zeros(1, 7, dtype=torch.long), AttentionSpans.from_documents([3, 4]))
    assert not counters["stats"]


def layer_kernels(compiled):
    """Kernels of the forward and the backward pass of a decoder layer of Zagreus."""
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        model = llama(vocab_size=64, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1,
                      num_attention_heads=15, num_key_value_heads=5, head_dim=64)  # fmt: skip
        layer = model.model.layers[0]
        hidden = torch.zeros(1, TOKENS, HIDDEN, requires_grad=True)
        cos_sin = tuple(torch.zeros(1, TOKENS, 64) for _ in range(2))
        spans = AttentionSpans.from_documents([4096] * 8)
        call = torch.compile(layer, backend=compiled_with(found), fullgraph=True) if compiled else layer
        eager = [EagerKernels(), EagerKernels()]
        forward, backward = [nullcontext()] * 2 if compiled else eager
        with torch.autocast("cpu", torch.bfloat16), forward:
            out = call(hidden, position_embeddings=cos_sin, attention_spans=spans)
        gradient = torch.zeros_like(out)
        with backward:
            out.backward(gradient)
    return found if compiled else [kernels.found for kernels in eager]


# Kernels of the forward and the backward pass of a layer; those that are neither matrix products nor attention; and
# kilobytes per token that the latter move. Without `enable_gqa` (torch 2.11), each head gets a copy of keys and values.
REPEATS = "enable_gqa" not in VARLEN_OPTIONS
EAGER = ((50, 42, 182), (94, 79, 415)) if REPEATS else ((48, 40, 177), (92, 77, 410))
COMPILED = ((26, 18, 60), (32, 17, 103)) if REPEATS else ((25, 17, 57), (31, 16, 98))
# The least that kernels between matrix products can move forward, in bytes per token, with the residual stream in
# float32 and everything else in bfloat16.
WIDE, NARROW = 4 * HIDDEN, 2 * HIDDEN
FLOOR = (
    WIDE + NARROW  # first norm
    + REPEATS * 2 * NARROW  # repeated keys and values
    + 2 * (NARROW + 2 * KEYS) + 2 * 4 * 64  # rotary embedding of queries and keys, with cosine and sine
    + WIDE + NARROW + NARROW  # residual and second norm; the sum is not kept
    + 3 * 2 * INNER  # gate, up projection and their product
    + WIDE + 2 * NARROW + WIDE  # both residuals
)  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_kernels_and_bytes_of_a_layer(compiled):
    passes, most = layer_kernels(compiled), COMPILED if compiled else EAGER
    moved = []
    for kernels, (count, between, kilobytes) in zip(passes, most, strict=True):
        elementwise = [kernel for kernel in kernels if kernel.elementwise]
        moved.append(sum(kernel.bytes for kernel in elementwise) / TOKENS)
        assert len(kernels) <= count
        assert len(elementwise) <= between
        assert moved[-1] <= 1000 * kilobytes
    assert len([kernel for kernels in passes for kernel in kernels if "attn" in kernel.name]) == 2, "one each way"
    assert FLOOR < moved[0] < (1.25 if compiled else 4) * FLOOR


def test_the_compiled_head_reads_the_logits_once():
    """2 bytes per logit in bfloat16. Eagerly: 2 for the maximum, 6 for a copy in float32 and its softmax."""
    tokens, vocabulary, found = 1024, 128_256, []
    scores = torch.compile(lm_head._scores, backend=compiled_with(found), fullgraph=True)
    with FakeTensorMode(), torch.no_grad():
        scores(torch.zeros(tokens, vocabulary, dtype=torch.bfloat16), torch.zeros(tokens, dtype=torch.long))
    assert sum(kernel.bytes for kernel in found[0]) == pytest.approx(2 * tokens * vocabulary, rel=0.01)


@thorough  # compiles for a minute
def test_a_compiled_head_scores_any_number_of_tokens():
    """Against float64 on the same logits: no worse than eagerly."""
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 5003, bias=False)
    with torch.no_grad():
        head.weight.mul_(8)
    for tokens in (40, 17, 90):
        hidden, targets = torch.randn(tokens, 32, requires_grad=True), torch.randint(0, 5003, (tokens,))
        with torch.autocast("cpu", torch.bfloat16):
            (plain, plain_top1), (ours, top1) = (token_log_probs(hidden, head, targets, c) for c in (False, True))
        logits = torch.nn.functional.linear(hidden.bfloat16(), head.weight.bfloat16()).double()
        exact = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
        errors = [float((scores - exact).detach().abs().max()) for scores in (ours, plain)]
        assert errors[0] < max(2e-5, errors[1])
        assert torch.equal(top1, plain_top1)
        torch.testing.assert_close(
            *(torch.autograd.grad(scores.sum(), hidden)[0] for scores in (ours, plain)), rtol=1e-2, atol=1e-3
        )
    assert counters["stats"]["unique_graphs"] == 1

"""The LM head on supervised positions equals the plain head on all positions."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from nesso_tune.model import lm_head as module
from nesso_tune.model.attention import AttentionSpans, enable_document_attention
from nesso_tune.model.lm_head import PackedRow, attach_supervised_head, fused_output, token_log_probs
from tests.support.runs import thorough

VOCABULARY, WIDTH = 53, 16


@pytest.fixture(params=[1, 7, 10_000], ids=["one row a chunk", "uneven chunks", "one chunk"])
def chunks(request, monkeypatch):
    for most in (module.HEAD_CHUNK_FORWARD, module.HEAD_CHUNK_BACKWARD):
        monkeypatch.setitem(most, "cpu", request.param * VOCABULARY)


def example(bias=False, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(20, WIDTH, dtype=dtype, requires_grad=True)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)
    return hidden, head, torch.randint(0, VOCABULARY, (20,))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weights", ["alike", "different"])
def test_log_probs_and_gradients_equal_those_over_all_logits(bias, weights):
    hidden, head, targets = example(bias)
    of_each = torch.rand(20, dtype=torch.float64) if weights == "different" else torch.ones(20, dtype=torch.float64)
    wanted = functional.cross_entropy(head(hidden), targets, reduction="none")
    (wanted * of_each).sum().backward()
    reference = [hidden.grad.clone(), *(p.grad.clone() for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()

    log_probs, top1 = token_log_probs(hidden, head, targets)
    (-log_probs * of_each).sum().backward()
    torch.testing.assert_close(-log_probs.double(), wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(top1, head(hidden).argmax(-1) == targets)
    for ours, theirs in zip([hidden.grad, *(p.grad for p in head.parameters())], reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_in_bfloat16_a_token_with_probability_close_to_1_has_a_gradient():
    """p - 1 is lost if p is rounded before the subtraction."""
    hidden = torch.zeros(1, WIDTH, requires_grad=True)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=True)
    with torch.no_grad():
        head.bias.zero_()[5] = 12.0  # probability 0.9997
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, _ = token_log_probs(hidden, head, torch.tensor([5]))
    (-log_probs.sum()).backward()
    others = 1 - functional.softmax(head.bias.detach().double(), -1)[5]
    assert float(head.bias.grad[5]) == pytest.approx(-float(others), rel=0.02)


def test_a_batch_without_supervised_tokens_has_zero_loss_and_a_gradient():
    hidden, head, _ = example(dtype=torch.float32)
    mask = torch.zeros(2, 11, dtype=torch.bool)
    out = fused_output(
        *token_log_probs(hidden[:0], head, torch.zeros(0, dtype=torch.long)), mask, torch.zeros(0, dtype=torch.long)
    )
    out.log_probs.sum().backward()
    assert float(out.log_probs.detach().sum()) == 0.0
    assert not hidden.grad.any()
    assert not head.weight.grad.any()


def tiny(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **options))


@pytest.mark.parametrize("tied", [True, False])
def test_the_attached_head_equals_that_of_trl(tied):
    ours, theirs = tiny(tie_word_embeddings=tied), tiny(tie_word_embeddings=tied)
    attach_supervised_head(ours)
    add_fused_lm_head(theirs, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    ids = torch.randint(0, VOCABULARY, (2, 10))
    labels = ids.masked_fill(torch.rand(2, 10) < 0.4, -100)
    outputs = [model(input_ids=ids, labels=labels, fused_lm_head=True) for model in (ours, theirs)]
    for name in ("log_probs", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(outputs[0], name), getattr(outputs[1], name), rtol=1e-5, atol=1e-6)
    for model, out in zip((ours, theirs), outputs, strict=True):
        (-out.log_probs.sum()).backward()
        model.grads = {name: p.grad for name, p in model.named_parameters()}
    for name, grad in ours.grads.items():
        torch.testing.assert_close(grad, theirs.grads[name], rtol=1e-5, atol=1e-6)


def test_without_the_flag_the_model_is_unchanged():
    model, plain = tiny(), tiny()
    attach_supervised_head(model)
    ids = torch.randint(0, VOCABULARY, (1, 6))
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


LENGTHS = [9, 4, 12, 1, 6]


def test_loss_and_gradients_of_a_packed_row_equal_those_of_each_document_alone():
    """In float32, to 1e-6 of the loss and of the norm of each gradient."""
    ours, plain = tiny(tie_word_embeddings=True), tiny(tie_word_embeddings=True)
    assert enable_document_attention(ours, "sdpa")
    attach_supervised_head(ours)
    torch.manual_seed(1)
    documents = [torch.randint(0, VOCABULARY, (length,)) for length in LENGTHS]
    labels = [ids.masked_fill(torch.rand(len(ids)) < 0.4, -100) for ids in documents]
    supervised = sum(int((own[1:] != -100).sum()) for own in labels)
    wanted = sum(
        functional.cross_entropy(plain(input_ids=ids[None]).logits[0, :-1], own[1:], reduction="sum")
        for ids, own in zip(documents, labels, strict=True) if len(ids) > 1
    ) / supervised  # fmt: skip
    wanted.backward()

    for own in labels:
        own[0] = -100
    ids, targets = torch.cat(documents)[None], torch.cat(labels)[None]
    row = PackedRow(ids, AttentionSpans.from_documents(LENGTHS), (targets[0, 1:] != -100).nonzero().flatten())
    loss = -ours(labels=targets, packed_row=row, fused_lm_head=True).log_probs.sum() / supervised
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    for (name, ours_p), plain_p in zip(ours.named_parameters(), plain.parameters(), strict=True):
        off = float((ours_p.grad - plain_p.grad).norm() / plain_p.grad.norm())
        assert off < 1e-6, (name, off)


MEASURE = """
import resource, sys, torch
from nesso_tune.model.lm_head import token_log_probs
vocabulary, width, supervised = 32_000, 16, int(sys.argv[1])
torch.set_num_threads(1)
head, hidden = torch.nn.Linear(width, vocabulary, bias=False), torch.randn(supervised, width, requires_grad=True)
head.weight.grad = torch.zeros_like(head.weight)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.autocast("cpu", torch.bfloat16):
    log_probs, _ = token_log_probs(hidden, head, torch.randint(0, vocabulary, (supervised,)))
log_probs.sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@thorough
def test_memory_does_not_grow_with_logits_of_the_whole_batch():
    """Four times the tokens need no more memory; both counts fill whole chunks."""
    used = {}
    for tokens in (2096, 8384):
        done = subprocess.run([sys.executable, "-c", MEASURE, str(tokens)], capture_output=True, text=True, check=True)
        used[tokens] = int(done.stdout)
    logits = 32_000 * 2  # bytes per token in bfloat16
    assert used[8384] - used[2096] < (8384 - 2096) * logits / 8
    assert used[8384] < 8384 * logits, "less than the logits alone"

"""The LM head on supervised positions equals the plain head on all positions."""

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from nesso_tune.model import head as module
from nesso_tune.model.head import attach_supervised_head, score

VOCABULARY, WIDTH = 53, 16


@pytest.fixture(params=[1, 7, 10_000], ids=["one row a chunk", "uneven chunks", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", request.param * VOCABULARY)


def example(bias=False, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(2, 12, WIDTH, dtype=dtype, requires_grad=True)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)
    labels = torch.randint(0, VOCABULARY, (2, 12))
    labels[0, :5] = labels[1, ::3] = -100
    return hidden, head, labels


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_equal_cross_entropy_over_all_logits(bias):
    hidden, head, labels = example(bias)
    wanted = functional.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    wanted.backward()
    reference = [hidden.grad.clone(), *(p.grad.clone() for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()

    loss = -score(hidden, head, labels).log_probs.sum()
    loss.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    for ours, theirs in zip([hidden.grad, *(p.grad for p in head.parameters())], reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("chunks")
def test_statistics_equal_those_of_the_full_distribution():
    hidden, head, labels = example(dtype=torch.float32)
    out, logits = score(hidden, head, labels), head(hidden)[:, :-1]
    mask, distribution = labels[:, 1:] != -100, torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(out.entropy, distribution.entropy() * mask, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.mean_logits, logits.mean(-1) * mask, rtol=1e-5, atol=1e-6)
    assert torch.equal(out.is_top1, (logits.argmax(-1) == labels[:, 1:]) & mask)
    assert torch.equal(out.label_mask, mask)
    lean = score(hidden, head, labels, statistics=False)
    torch.testing.assert_close(lean.log_probs, out.log_probs)
    assert lean.entropy is None


def test_only_learned_positions_are_scored():
    """A position without a label may hold anything, even NaN, and changes nothing."""
    hidden, head, labels = example(dtype=torch.float32)
    before = score(hidden, head, labels).log_probs.sum()
    poisoned = hidden.detach().clone()
    poisoned[:, :-1][labels[:, 1:] == -100] = float("nan")
    assert torch.equal(score(poisoned, head, labels).log_probs.sum(), before)


def test_a_batch_without_labels_is_a_zero_with_a_gradient():
    hidden, head, labels = example(dtype=torch.float32)
    out = score(hidden, head, torch.full_like(labels, -100)).log_probs.sum()
    out.backward()
    assert float(out.detach()) == 0.0
    assert not hidden.grad.any()
    assert not head.weight.grad.any()


def tiny(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **options))


@pytest.mark.parametrize("tied", [True, False])
def test_attached_head_equals_trls_own(tied):
    ours, theirs = tiny(tie_word_embeddings=tied), tiny(tie_word_embeddings=tied)
    assert attach_supervised_head(ours, statistics=True)
    add_fused_lm_head(theirs, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    ids = torch.randint(0, VOCABULARY, (2, 10))
    labels = ids.masked_fill(torch.rand(2, 10) < 0.4, -100)
    outputs = [model(input_ids=ids, labels=labels, fused_lm_head=True) for model in (ours, theirs)]
    for name in ("log_probs", "entropy", "mean_logits", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(outputs[0], name), getattr(outputs[1], name), rtol=1e-5, atol=1e-6)
    for model, out in zip((ours, theirs), outputs, strict=True):
        (-out.log_probs.sum()).backward()
        model.grads = {name: p.grad for name, p in model.named_parameters()}
    for name, grad in ours.grads.items():
        torch.testing.assert_close(grad, theirs.grads[name], rtol=1e-5, atol=1e-6)


def test_without_the_flag_the_model_is_unchanged():
    model, plain = tiny(), tiny()
    attach_supervised_head(model, statistics=False)
    ids = torch.randint(0, VOCABULARY, (1, 6))
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_a_model_that_caps_its_logits_keeps_trls_head():
    model = tiny()
    model.config.final_logit_softcapping = 30.0
    before = model.forward
    assert not attach_supervised_head(model, statistics=False)
    assert model.forward == before

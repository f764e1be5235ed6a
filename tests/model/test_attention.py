"""Documents of a packed row are isolated: their logits equal those of each document alone."""

import re

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from nesso_tune.errors import RecipeError
from nesso_tune.model import attention
from nesso_tune.model.attention import (
    DOCUMENT_ATTENTION,
    AttentionSpans,
    attention_description,
    choose_attention,
    enable_document_attention,
    isolates_documents,
    last_hidden_states,
    uses_document_attention,
)
from nesso_tune.training.dataset import ConversationCollator
from nesso_tune.training.grouped_metrics import Groups

LENGTHS = [[5, 9, 3], [7, 4]]  # two rows of unequal length
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "pad_token_id": None,
}  # fmt: skip
GROUPS = Groups(("en", "it"), ("a", "b"))


def model(kernel="sdpa", kind="llama", **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | options)
    return AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()


def rows():
    generator = torch.Generator().manual_seed(1)
    out = []
    for lengths in LENGTHS:
        ids = torch.randint(0, 97, (sum(lengths),), generator=generator).tolist()
        of = {"languages": ["it"] * len(lengths), "sources": ["b"] * len(lengths)}
        out.append({"input_ids": ids, "labels": ids, "seq_lengths": lengths, **of})
    return out


@torch.no_grad()
def alone(net):
    """Logits of each document alone."""
    out = []
    for row in rows():
        start = 0
        for length in row["seq_lengths"]:
            ids = torch.tensor([row["input_ids"][start : start + length]])
            out.append(net(input_ids=ids).logits[0])
            start += length
    return out


@torch.no_grad()
def with_masks(net, **changes):
    """Logits of each document in a packed batch with transformers' own masks."""
    batch = ConversationCollator(0, GROUPS, by_document=False)(rows())
    logits = net(**{name: batch[name] for name in ("input_ids", "position_ids")} | changes, use_cache=False).logits
    return [part for i, own in enumerate(LENGTHS) for part in logits[i, : sum(own)].split(own)]


@torch.no_grad()
def by_document(net, spans=None, length=None):
    """Logits of each document in one row with document attention."""
    row = ConversationCollator(0, GROUPS, length=length)(rows())["packed_row"]
    hidden = last_hidden_states(net, row.input_ids, spans or row.spans)
    return list(net.get_output_embeddings()(hidden)[0, : sum(map(sum, LENGTHS))].split([*LENGTHS[0], *LENGTHS[1]]))


def worst(ours, theirs):
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_with_masks_logits_equal_those_of_documents_alone(kernel):
    net = model(kernel)
    assert worst(with_masks(net), alone(net)) < 1e-5


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("leak", ["positions do not restart", "an attention mask of ones"])
def test_a_leak_through_masks_is_detected(kernel, leak):
    """Batches that are known to leak differ, so the test above can fail."""
    net = model(kernel)
    width = max(map(sum, LENGTHS))
    change = (
        {"position_ids": torch.arange(width).expand(2, -1)}
        if leak == "positions do not restart"
        else {"attention_mask": torch.ones(2, width, dtype=torch.long)}
    )
    assert worst(with_masks(net, **change), alone(net)) > 1e-2


ALIKE = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "olmo2", "smollm3", "phi3", "gpt2", "gpt_neox"]


@pytest.mark.parametrize("filled", [None, 20], ids=["no padding document", "a padding document"])
@pytest.mark.parametrize("kind", ALIKE)
def test_with_document_attention_logits_equal_those_of_documents_alone(kind, filled):
    net = model(kind=kind, bos_token_id=None, eos_token_id=None)
    wanted = alone(net)
    assert enable_document_attention(net, "sdpa")
    assert worst(by_document(net, length=filled), wanted) < 1e-5 * max(float(x.abs().max()) for x in wanted)


def test_padding_is_split_into_documents_no_longer_than_a_row():
    """Kernels of compiled layers are prepared for one length, whatever the documents."""
    for length in (20, 100):
        batch = ConversationCollator(0, GROUPS, length=length)(rows())
        spans = batch["packed_row"].spans
        assert (spans.longest, sum(spans.lengths)) == (length, 2 * length)
        assert max(spans.lengths) <= length
        assert spans.cu_seqlens.tolist() == [0, *torch.tensor(spans.lengths).cumsum(0).tolist()]
        assert torch.equal(batch["position_ids"], spans.position_ids)
        assert batch["labels"].shape == batch["group_ids"].shape == (1, 2 * length)
    shortest = ConversationCollator(0, GROUPS)(rows())["packed_row"].spans
    assert shortest.longest == 9, "without compiled layers, that of the longest document"


def test_a_leak_between_documents_is_detected():
    net = model()
    wanted = alone(net)
    enable_document_attention(net, "sdpa")
    mutant = AttentionSpans.from_documents([sum(map(sum, LENGTHS))])
    assert worst(by_document(net, mutant), wanted) > 1e-2


def test_a_sliding_window_is_kept_within_each_document():
    net = model(kind="mistral", sliding_window=4)
    wanted = alone(net)
    assert enable_document_attention(net, "sdpa")
    assert worst(by_document(net), wanted) < 1e-5
    whole = model(kind="mistral", sliding_window=None)
    assert worst(alone(whole), wanted) > 1e-2, "the window matters for these lengths"


UNSUPPORTED = {
    "keeps its own attention": {"kind": "bloom", "kernel": "eager"},
    "mixes neighbours by convolution": {"kind": "lfm2", "layer_types": ["conv", "full_attention"]},
    "caps its scores": {"kind": "gemma2", "kernel": "eager"},
}


@pytest.mark.parametrize("options", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_an_unsupported_model_stays_unchanged(options):
    net = model(**options)
    before, wanted = net.config._attn_implementation, alone(net)
    assert not enable_document_attention(net, "sdpa")
    assert net.config._attn_implementation == before
    assert worst(alone(net), wanted) == 0


def test_the_probe_detects_an_attention_that_ignores_the_spans(monkeypatch):
    net = model()
    enable_document_attention(net, "sdpa")
    assert isolates_documents(net)
    original = attention.sdpa_per_sequence

    def leaking(q, k, v, lengths, *rest):
        return original(q, k, v, [len(q)], *rest)

    monkeypatch.setattr(attention, "_untraced_sdpa", leaking)
    assert not isolates_documents(net)


def test_the_probe_does_not_change_the_model():
    net = model().train()
    random = torch.get_rng_state()
    enable_document_attention(net, "sdpa")
    assert net.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_generation_is_that_of_plain_sdpa():
    plain, ours = model(), model()
    enable_document_attention(ours, "sdpa")
    ids, mask = torch.randint(0, 97, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(*(net.generate(ids, attention_mask=mask, **options) for net in (plain, ours)))


def test_a_pairs_answers_share_their_prompt():
    spans = AttentionSpans.from_pairs([(3, 2, 4), (1, 1, 1)])
    assert spans.lengths == (5, 7, 2, 2)
    assert spans.cu_seqlens.tolist() == [0, 5, 12, 14, 16]
    assert spans.position_ids[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 1]
    assert spans.gather_indices.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 9, 11]
    assert spans.gather_indices[spans.restore_indices].tolist() == list(range(12)), "each token gets its own result"


def test_gradients_equal_those_of_a_dense_mask():
    torch.manual_seed(0)
    spans = AttentionSpans.from_pairs([(3, 2, 4), (2, 3, 1)])
    q, k, v = (torch.randn(1, heads, 15, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    # the mask by definition: rejected tokens attend to their prompt and their own answer
    seen = torch.zeros(15, 15, dtype=torch.bool)
    for start, prompt, chosen, rejected in ((0, 3, 2, 4), (9, 2, 3, 1)):
        asked, first, second = (range(start, start + prompt), range(start + prompt, start + prompt + chosen),
                                range(start + prompt + chosen, start + prompt + chosen + rejected))  # fmt: skip
        for run in ([*asked, *first], [*asked, *second]):
            for i, token in enumerate(run):
                seen[token, run[: i + 1]] = True
    wanted = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    weight = torch.randn_like(wanted)
    theirs = torch.autograd.grad((wanted * weight).sum(), (q, k, v))
    got, _ = attention._attention(None, q, k, v, None, flash=None, attention_spans=spans)
    ours = torch.autograd.grad((got * weight).sum(), (q, k, v))
    torch.testing.assert_close(got, wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_choice_and_description_of_kernels(monkeypatch):
    assert [choose_attention(name).kernel for name in ("auto", "sdpa", "eager")] == ["sdpa", "sdpa", "eager"]
    assert str(choose_attention("auto")) == "sdpa", "nothing to say on a CPU"
    with pytest.raises(RecipeError, match="there is no GPU"):
        choose_attention("flash")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert str(choose_attention("auto")) == "sdpa (this GPU is older than Ampere)"
    with pytest.raises(RecipeError, match="older than Ampere"):
        choose_attention("flash")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    problems = {"flash-attn": "is not installed", "flash": None}
    monkeypatch.setattr(attention, "flash_problem", lambda kernel, dtype, shape: problems[kernel])
    for setting in ("auto", "flash"):
        assert str(choose_attention(setting)) == "flash of torch (flash-attn is not installed)"
    assert choose_attention("auto", "float32").kernel == "sdpa"
    with pytest.raises(RecipeError, match="flash kernels do not compute in float32"):
        choose_attention("flash", "float32")
    problems["flash"] = "fails (no kernel image)"
    cause = "flash-attn is not installed; flash of torch fails (no kernel image)"
    assert str(choose_attention("auto")) == f"sdpa ({cause})"
    with pytest.raises(RecipeError, match=re.escape(f"flash cannot run: {cause}; set attention: auto")):
        choose_attention("flash")
    problems["flash-attn"] = None
    assert str(choose_attention("auto")) == "flash-attn"
    net = model()
    assert attention_description(net) == "sdpa, with masks"
    enable_document_attention(net, "flash")
    assert uses_document_attention(net)
    assert net.config._attn_implementation == DOCUMENT_ATTENTION["flash"]
    assert attention_description(net) == "flash of torch, by document"


def test_a_padded_batch_of_packed_rows():
    batch = ConversationCollator(9, GROUPS, by_document=False)(rows())
    assert batch["input_ids"].shape == (2, 17)
    assert batch["position_ids"].tolist()[1] == [*range(7), *range(4), *range(6)]
    assert batch["input_ids"][1, 11:].tolist() == [9] * 6
    assert batch["labels"][1, 11:].tolist() == [-100] * 6
    assert all(batch["labels"][0, start] == -100 for start in (0, 5, 14)), "predicted from another document"
    assert batch["group_ids"][1, :11].tolist() == [GROUPS.index("it", "b")] * 11
    assert int(batch["tokens"]) == 28


def test_a_padding_free_batch():
    batch = ConversationCollator(9, GROUPS)(rows())
    assert batch["input_ids"].shape == (1, 28)
    row = batch["packed_row"]
    assert row.spans.cu_seqlens.tolist() == [0, 5, 14, 17, 24, 28]
    assert row.spans.position_ids.tolist() == batch["position_ids"].tolist()
    assert torch.equal(batch["labels"][0, 1:][row.logits_to_keep], batch["input_ids"][0, 1:][row.logits_to_keep])
    assert not {4, 13, 16, 23} & set(row.logits_to_keep.tolist()), "the last token of a document predicts nothing"
    filled = ConversationCollator(9, GROUPS, length=20)(rows())
    assert filled["input_ids"].shape == (1, 40)
    assert filled["packed_row"].spans.lengths == (5, 9, 3, 7, 4, 12)
    assert torch.equal(filled["packed_row"].logits_to_keep, row.logits_to_keep)

"""Documents in a packed row do not see each other: their logits are those of the documents alone."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from nesso_tune.errors import RecipeError
from nesso_tune.model import attention
from nesso_tune.model.attention import (
    BY_DOCUMENT,
    Segments,
    attend_by_document,
    attends_by_document,
    choose_attention,
    isolates,
    kernel_in_words,
    through,
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
    """Logits of every document by itself."""
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
    """Logits of every document out of the batch for transformers' own masks."""
    batch = ConversationCollator(0, GROUPS, by_document=False)(rows())
    logits = net(**{name: batch[name] for name in ("input_ids", "position_ids")} | changes, use_cache=False).logits
    return [part for i, own in enumerate(LENGTHS) for part in logits[i, : sum(own)].split(own)]


@torch.no_grad()
def by_document(net, segments=None, length=None):
    """The same out of one row of all tokens."""
    row = ConversationCollator(0, GROUPS, length=length)(rows())["row"]
    hidden = through(net, row.ids, segments or row.segments)
    return list(net.get_output_embeddings()(hidden)[0, : sum(map(sum, LENGTHS))].split([*LENGTHS[0], *LENGTHS[1]]))


def worst(ours, theirs):
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_with_masks_logits_equal_those_of_documents_alone(kernel):
    net = model(kernel)
    assert worst(with_masks(net), alone(net)) < 1e-5


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("leak", ["positions run on", "an attention mask of ones"])
def test_a_leak_through_masks_would_be_seen(kernel, leak):
    """The mutants of the batch that are known to leak do differ, so that the test above can fail."""
    net = model(kernel)
    width = max(map(sum, LENGTHS))
    change = (
        {"position_ids": torch.arange(width).expand(2, -1)}
        if leak == "positions run on"
        else {"attention_mask": torch.ones(2, width, dtype=torch.long)}
    )
    assert worst(with_masks(net, **change), alone(net)) > 1e-2


ALIKE = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "olmo2", "smollm3", "phi3", "gpt2", "gpt_neox"]


@pytest.mark.parametrize("filled", [None, 20], ids=["not filled up", "filled up"])
@pytest.mark.parametrize("kind", ALIKE)
def test_by_document_logits_equal_those_of_documents_alone(kind, filled):
    net = model(kind=kind, bos_token_id=None, eos_token_id=None)
    wanted = alone(net)
    assert attend_by_document(net, "sdpa")
    assert worst(by_document(net, length=filled), wanted) < 1e-5 * max(float(x.abs().max()) for x in wanted)


def test_a_leak_between_documents_would_be_seen():
    net = model()
    wanted = alone(net)
    attend_by_document(net, "sdpa")
    mutant = Segments.of_documents([sum(map(sum, LENGTHS))])
    assert worst(by_document(net, mutant), wanted) > 1e-2


def test_a_sliding_window_is_kept_within_each_document():
    net = model(kind="mistral", sliding_window=4)
    wanted = alone(net)
    assert attend_by_document(net, "sdpa")
    assert worst(by_document(net), wanted) < 1e-5
    whole = model(kind="mistral", sliding_window=None)
    assert worst(alone(whole), wanted) > 1e-2, "the window matters for these lengths"


NOT_SO = {
    "keeps its own attention": {"kind": "bloom", "kernel": "eager"},
    "mixes neighbours by convolution": {"kind": "lfm2", "layer_types": ["conv", "full_attention"]},
    "caps its scores": {"kind": "gemma2", "kernel": "eager"},
}


@pytest.mark.parametrize("options", NOT_SO.values(), ids=NOT_SO)
def test_a_model_that_cannot_is_left_as_it_was(options):
    net = model(**options)
    before, wanted = net.config._attn_implementation, alone(net)
    assert not attend_by_document(net, "sdpa")
    assert net.config._attn_implementation == before
    assert worst(alone(net), wanted) == 0


def test_the_probe_finds_an_attention_that_ignores_the_segments(monkeypatch):
    net = model()
    attend_by_document(net, "sdpa")
    assert isolates(net)
    honest = attention._run_by_run

    def deaf(q, k, v, segments, *rest):
        return honest(q, k, v, Segments.of_documents([len(q)]), *rest)

    monkeypatch.setattr(attention, "_run_by_run", deaf)
    assert not isolates(net)


def test_the_probe_leaves_no_trace():
    net = model().train()
    random = torch.get_rng_state()
    attend_by_document(net, "sdpa")
    assert net.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_generation_is_that_of_plain_sdpa():
    plain, ours = model(), model()
    attend_by_document(ours, "sdpa")
    ids, mask = torch.randint(0, 97, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(*(net.generate(ids, attention_mask=mask, **options) for net in (plain, ours)))


def test_a_pairs_answers_share_their_prompt():
    segments = Segments.of_pairs([(3, 2, 4), (1, 1, 1)])
    assert segments.lengths == (5, 7, 2, 2)
    assert segments.bounds.tolist() == [0, 5, 12, 14, 16]
    assert segments.positions[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 1]
    assert segments.gather.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 9, 11]
    assert segments.gather[segments.back].tolist() == list(range(12)), "each token's own result comes back to it"


def test_gradients_by_document_are_those_of_a_dense_mask():
    torch.manual_seed(0)
    segments = Segments.of_pairs([(3, 2, 4), (2, 3, 1)])
    q, k, v = (torch.randn(1, heads, 15, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    # who sees whom, from the definition: rejected answers see their prompt and themselves
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
    got, _ = attention._attention(None, q, k, v, None, flash=False, segments=segments)
    ours = torch.autograd.grad((got * weight).sum(), (q, k, v))
    torch.testing.assert_close(got, wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_kernels_are_chosen_and_named(monkeypatch):
    assert [choose_attention(name) for name in ("auto", "sdpa", "eager")] == ["sdpa", "sdpa", "eager"]
    with pytest.raises(RecipeError, match="there is no GPU"):
        choose_attention("flash")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert choose_attention("auto") == "sdpa"
    with pytest.raises(RecipeError, match="older than Ampere"):
        choose_attention("flash")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert choose_attention("auto") == choose_attention("flash") == "flash"
    net = model()
    assert kernel_in_words(net, "bfloat16") == "sdpa, with masks"
    attend_by_document(net, "flash")
    assert attends_by_document(net)
    assert net.config._attn_implementation == BY_DOCUMENT["flash"]
    assert kernel_in_words(net, "bfloat16") == "flash of torch, by document"
    assert kernel_in_words(net, "float32") == "sdpa, by document", "flash kernels have no float32"


def test_what_a_batch_says_of_its_documents():
    batch = ConversationCollator(9, GROUPS, by_document=False)(rows())
    assert batch["input_ids"].shape == (2, 17)
    assert batch["position_ids"].tolist()[1] == [*range(7), *range(4), *range(6)]
    assert batch["input_ids"][1, 11:].tolist() == [9] * 6
    assert batch["labels"][1, 11:].tolist() == [-100] * 6
    assert all(batch["labels"][0, start] == -100 for start in (0, 5, 14)), "predicted from another document"
    assert batch["group_ids"][1, :11].tolist() == [GROUPS.index("it", "b")] * 11
    assert int(batch["tokens"]) == 28


def test_one_row_holds_all_tokens_and_no_padding():
    batch = ConversationCollator(9, GROUPS)(rows())
    assert batch["input_ids"].shape == (1, 28)
    row = batch["row"]
    assert row.segments.bounds.tolist() == [0, 5, 14, 17, 24, 28]
    assert row.segments.positions.tolist() == batch["position_ids"].tolist()
    assert torch.equal(batch["labels"][0, 1:][row.before], batch["input_ids"][0, 1:][row.before])
    assert not {4, 13, 16, 23} & set(row.before.tolist()), "the last token of a document predicts nothing"
    filled = ConversationCollator(9, GROUPS, length=20)(rows())
    assert filled["input_ids"].shape == (1, 40)
    assert filled["row"].segments.lengths == (5, 9, 3, 7, 4, 12)
    assert torch.equal(filled["row"].before, row.before)

"""Documents in a packed row do not see each other: their logits are those of the documents alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nesso_tune.training.collate import ConversationCollator

LENGTHS = [[5, 9, 3], [7, 4]]  # two rows of unequal length


def model(attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def rows():
    generator = torch.Generator().manual_seed(1)
    out = []
    for lengths in LENGTHS:
        ids = torch.randint(0, 97, (sum(lengths),), generator=generator).tolist()
        out.append({"input_ids": ids, "labels": ids, "seq_lengths": lengths, "languages": ["it"] * len(lengths)})
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
def packed(net, flat=False, **changes):
    """Logits of every document out of the packed batch."""
    batch = ConversationCollator(0, ("it",), flat)(rows())
    batch = {name: batch[name] for name in ("input_ids", "position_ids")} | changes
    logits = net(**batch, use_cache=False).logits
    widths = [batch["input_ids"].shape[1]] * 2
    out = []
    for i, lengths in enumerate(LENGTHS):
        line = logits[0] if flat else logits[i]
        start = sum(LENGTHS[0]) if flat and i else 0
        assert flat or widths[i] == max(map(sum, LENGTHS))
        for length in lengths:
            out.append(line[start : start + length])
            start += length
    return out


def worst(ours, theirs):
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("flat", [False, True], ids=["rows", "end to end"])
def test_packed_logits_equal_those_of_documents_alone(attention, flat):
    net = model(attention)
    assert worst(packed(net, flat), alone(net)) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("leak", ["positions run on", "an attention mask of ones"])
def test_a_leak_would_be_seen(attention, leak):
    """The mutants of the batch that are known to leak do differ, so that the test above can fail."""
    net = model(attention)
    width = max(map(sum, LENGTHS))
    change = (
        {"position_ids": torch.arange(width).expand(2, -1)}
        if leak == "positions run on"
        else {"attention_mask": torch.ones(2, width, dtype=torch.long)}
    )
    assert worst(packed(net, **change), alone(net)) > 1e-2


def test_what_a_batch_says_of_its_documents():
    batch = ConversationCollator(pad_id=9, languages=("en", "it"))(rows())
    assert batch["input_ids"].shape == (2, 17)
    assert batch["position_ids"].tolist()[1] == [*range(7), *range(4), *range(6)]
    assert batch["input_ids"][1, 11:].tolist() == [9] * 6
    assert batch["labels"][1, 11:].tolist() == [-100] * 6
    assert all(batch["labels"][0, start] == -100 for start in (0, 5, 14)), "predicted from another document"
    assert batch["language_ids"][1, :11].tolist() == [1] * 11
    assert int(batch["tokens"]) == 28


def test_end_to_end_batch_names_the_borders_for_flash_attention():
    batch = ConversationCollator(pad_id=9, languages=("it",), flat=True)(rows())
    assert batch["input_ids"].shape == (1, 28)
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 14, 17, 24, 28]
    assert batch["max_length_q"] == 9

"""The forward path of a model computes what its own forward computes for each document alone.

tests/benchmarks/architectures.py runs all architectures of transformers; results: docs/architectures.md.
"""

import json
import shutil
from itertools import chain

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.errors import ModelError, RecipeError
from nesso_tune.model import forward as module
from nesso_tune.model.forward import FUSED_HEAD_OUTPUTS, choose_forward_path, generate_greedily, small_copy
from nesso_tune.model.lm_head import attach_supervised_head, plain_logits
from nesso_tune.run import train
from nesso_tune.runs.checkpoint import read_json
from nesso_tune.training.dataset import ConversationCollator
from nesso_tune.training.grouped_metrics import Groups
from nesso_tune.training.trainer import BaseTrainer
from tests.benchmarks.architectures import QUESTIONS, _recipe, mean_loss, outcome
from tests.support.architectures import VOCABULARY, tiny
from tests.support.logs import logged
from tests.support.runs import metrics, recipe, thorough

GROUPS = Groups(("it",), ("",))
LENGTHS = (9, 4, 7, 12, 5)
# (head, padding-free, supports packing): architectures with wrong losses without the probe, and some common ones.
KINDS = {
    "llama": ("supervised", True, True), "gpt2": ("supervised", True, True), "gemma2": ("trl", False, True),
    "bert": ("own", False, False), "roberta": ("own", False, False), "modernbert-decoder": ("own", False, True),
    "recurrent_gemma": ("own", False, False), "xlstm": ("own", False, False), "llama4_text": ("own", False, True),
    "lfm2": ("supervised", False, False), "bloom": ("supervised", False, False),
    "qwen3_5_text": ("supervised", False, False), "mamba": ("supervised", False, False),
    "phimoe": ("supervised", False, True),
}  # fmt: skip


def config_class(name):
    return CONFIG_MAPPING[name]


def rows(together):
    """Conversations of a few tokens, some of them supervised: packed, or one per row."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for group in ((0, 1), (2, 3), (4,)) if together else ((i,) for i in range(len(LENGTHS))):
        ids = [torch.randint(3, VOCABULARY, (LENGTHS[i],), generator=generator).tolist() for i in group]
        labels = [[-100 if i % 4 == 1 else token for i, token in enumerate(own)] for own in ids]
        of = {"languages": ["it"] * len(group), "sources": [""] * len(group), "seq_lengths": list(map(len, ids))}
        out.append({"input_ids": [*chain(*ids)], "labels": [*chain(*labels)], **of})
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_of_a_batch_are_those_of_each_document_alone(kind):
    model = tiny(config_class(kind))
    path = choose_forward_path(model, "sdpa", kind)
    assert (path.head, path.padding_free, path.supports_packing) == KINDS[kind]
    some = rows(together=path.supports_packing)
    before = model.config._attn_implementation
    if path.padding_free:
        model.set_attn_implementation("sdpa")
    wanted = mean_loss(model, some)
    theirs = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    model.set_attn_implementation(before)

    if path.head == "trl":
        add_fused_lm_head(model, outputs=FUSED_HEAD_OUTPUTS)
    attach_supervised_head(model)
    collate = ConversationCollator(0, GROUPS, path.padding_free, packs=path.packs_by_position_ids)
    batch = {name: tensor for name, tensor in collate(some).items() if name not in ("group_ids", "tokens")}
    out = model(**batch, fused_lm_head=True)
    loss = -out.log_probs.sum() / out.label_mask.sum()
    ours = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    largest = max(float(g.norm()) for g in theirs if g is not None)
    for (name, _), our, their in zip(model.named_parameters(), ours, theirs, strict=True):
        if their is not None and their.any():
            assert float((our - their).norm()) <= 1e-3 * max(float(their.norm()), 1e-3 * largest), name


@pytest.mark.parametrize("kind", ["llama", "rwkv", "recurrent_gemma", "xlstm"])
def test_answers_do_not_depend_on_the_other_prompts_of_the_batch(kind):
    model = tiny(config_class(kind))
    path = choose_forward_path(model, "sdpa", kind)
    assert (path.generation == "batch") == (kind == "llama")
    prompts = [list(range(5, 5 + length)) for length in (5, 9, 14)]
    model.generation_config.eos_token_id = None
    written = generate_greedily(model, prompts, path.generation, 3, pad=0, end=None)
    for prompt, answer in zip(prompts, written, strict=True):
        for token in answer:
            assert int(plain_logits(model, {"input_ids": torch.tensor([prompt])})[0, -1].argmax()) == token
            prompt = [*prompt, token]


def test_losses_show_the_error_of_a_rejected_path():
    path = choose_forward_path(tiny(config_class("modernbert-decoder")), "sdpa", "base")
    tried, own = path.head_losses
    assert abs(tried - own) > 0.1
    path = choose_forward_path(tiny(config_class("bloom")), "sdpa", "base")
    packed, alone = path.packing_losses
    assert abs(packed - alone) > 0.01


def test_a_model_that_is_not_causal_is_refused_with_both_losses():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = config_class("bert")(vocab_size=97, **sizes)
    with pytest.raises(ModelError, match=r'loss of 6 tokens [\d.]+ with text after them, [\d.]+ without\).*"is_decode'):
        choose_forward_path(AutoModelForCausalLM.from_config(config), "sdpa", "model.base b")


def llama(**options):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes | options))


def test_the_copy_is_small_and_the_model_unchanged():
    model = llama(vocab_size=20_000, num_hidden_layers=9).train()
    state, random = {name: p.clone() for name, p in model.state_dict().items()}, torch.get_rng_state()
    small = small_copy(model)
    assert sum(p.numel() for p in small.parameters()) < 0.05 * sum(p.numel() for p in model.parameters())
    assert len(small.model.layers) == 2
    choose_forward_path(model, "eager", "base")
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert "forward" not in vars(model)


def test_the_copy_has_a_layer_of_every_kind():
    kinds = ["conv", "conv", "conv", "full_attention", "conv", "conv"]
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("lfm2", **sizes, num_hidden_layers=6, layer_types=kinds, intermediate_size=48)
    model = AutoModelForCausalLM.from_config(config)
    assert len(small_copy(model).model.layers) == 4
    assert not choose_forward_path(model, "sdpa", "base").supports_packing


def test_soft_capping_is_detected_even_if_the_logits_are_small(monkeypatch):
    model = llama(num_hidden_layers=1, initializer_range=1e-3)
    plain = type(model).forward

    def capped(self, **inputs):
        out = plain(self, **inputs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    monkeypatch.setattr(module, "_PATHS", {})
    monkeypatch.setattr(type(model), "forward", capped)
    assert choose_forward_path(model, "sdpa", "base").head == "own"


def test_a_base_that_does_not_support_packing_trains_unpacked_and_resumes(tmp_path):
    base = tiny(config_class("lfm2"))
    with logged() as said:
        found = outcome(base, tmp_path, packing=True)
    assert found.right, found
    (line,) = [text for text in said if text.startswith("data.packing")]
    assert "one conversation per row, 6 rows per epoch instead of 2" in line
    some, run = _recipe(base, tmp_path, packing=True), tmp_path / "run-True"
    assert read_json(run, "manifest.json")["unpacked"]
    assert not train(some).trained, "the same command finds it finished"
    (before,) = (line["eval_loss"] for line in metrics(run) if line.get("step") == 2 and "eval_loss" in line)
    for folder in ("final", "checkpoint-2"):
        shutil.rmtree(run / folder)
    assert train(some).trained
    (after,) = (line["eval_loss"] for line in metrics(run) if line.get("step") == 2 and "eval_loss" in line)
    assert after == before


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_end_token_is_trained_in_a_second_stage(tmp_path, monkeypatch, tied, method):
    """The padding token is the end token, and torch gives the embedding row of `padding_idx` no gradient."""
    base = tiny(config_class("llama"))
    if tied:
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.model.embed_tokens.weight
    some = _recipe(base, tmp_path, packing=True)
    end = chat_tokenizer(some.model, some.chat).eos_id
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"pad_token_id": end}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    if method == "dpo":
        answers = [{"prompt": q, "chosen": "Sì, certo.", "rejected": "No."} for q in QUESTIONS]
        (tmp_path / "pairs.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, answers))))
        some = recipe("dpo", tmp_path / "dpo", [tmp_path / "pairs.jsonl"], model=some.model.model_dump(),
                      train={"max_steps": 1}, evaluation=None)  # fmt: skip
    seen = {}
    clip = BaseTrainer._clip_grad_norm

    def watched(self, model):
        seen.setdefault("rows", model.model.embed_tokens.weight.grad[[end, 0]].clone())
        seen.setdefault("padding", model.model.embed_tokens.padding_idx)
        return clip(self, model)

    monkeypatch.setattr(BaseTrainer, "_clip_grad_norm", watched)
    train(some)
    assert seen["padding"] is None, "the embedding row has a gradient, tied or not"
    assert seen["rows"][0].any()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / some.output_dir / "final")
    assert again.config.pad_token_id == end


@thorough
@pytest.mark.parametrize("kind", ["modernbert-decoder", "bert", "roberta", "qwen3_5_text", "bloom", "falcon_h1"])
def test_whole_runs_of_difficult_architectures(tmp_path, kind):
    assert outcome(tiny(config_class(kind)), tmp_path, packing=True).right


def test_documents_beyond_the_learned_positions_are_refused_before_training(tmp_path):
    base = tiny(config_class("gpt2"))
    base.config.n_positions = 24
    base.transformer.wpe = torch.nn.Embedding(24, 64)
    with pytest.raises(RecipeError, match=r"sequence_len: a document has \d+ tokens, the model has 24 positions; "):
        outcome(base, tmp_path, packing=True, raises=True)
    assert not (tmp_path / "run-True" / "metrics.jsonl").exists()

"""Loading: weights, vocabulary, rows of new tokens, token ids, base hash, compilation."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, RobertaConfig, YoutuConfig, xLSTMConfig

from nesso_tune import RunEnvironmentError
from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.errors import ModelError, RecipeError
from nesso_tune.model import loading
from nesso_tune.model.attention import attention_description, uses_document_attention
from nesso_tune.model.lm_head import forward_path
from nesso_tune.model.loading import SharedWeights, base_hash, load_model
from nesso_tune.planning.hardware import find_gpu
from nesso_tune.planning.plan import DataVolume, World, describe
from nesso_tune.planning.planner import make_plan
from nesso_tune.planning.shapes import ModelShape
from nesso_tune.recipes.sections import ChatSection, ModelSection
from nesso_tune.run import train
from nesso_tune.training.sft import ConversationTrainer
from tests.support.architectures import tiny
from tests.support.runs import recipe, steps, thorough


@pytest.fixture
def trained(tmp_path, base):
    """Creates a folder with bfloat16 weights, as hub models have."""

    def make(tied=True, rows=None):
        folder = tmp_path / "trained"
        shutil.copytree(base, folder, dirs_exist_ok=True)
        config = LlamaConfig.from_pretrained(folder)
        config.tie_word_embeddings = tied
        config.vocab_size = rows or config.vocab_size
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        return folder

    return make


def load(folder, random_init=False, **chat):
    section = ModelSection(base=str(folder), random_init=random_init)
    tokenizer = chat_tokenizer(section, ChatSection(**chat))
    return load_model(section, tokenizer, seed=1), tokenizer


def test_a_base_without_weights_is_an_error_unless_random_init_is_set(base):
    with pytest.raises(ModelError, match="random_init"):
        load(base)
    model, _ = load(base, random_init=True)
    again, _ = load(base, random_init=True)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight), "the seed determines the weights"


def test_master_weights_are_float32(trained):
    model, _ = load(trained())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["reserved", "resize"])
def test_new_and_renamed_rows_start_from_the_mean_of_related_rows(trained, tied, how):
    folder = trained(tied)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, tokenizer = load(folder, new_tokens=how)
    rows = plain.config.vocab_size
    assert model.get_input_embeddings().weight.shape[0] == (rows if how == "reserved" else rows + 2)
    assert tokenizer.starts_from
    for token, related in tokenizer.starts_from.items():
        for get in ("get_input_embeddings", "get_output_embeddings"):
            wanted = getattr(plain, get)().weight[list(related)].mean(dim=0)
            torch.testing.assert_close(getattr(model, get)().weight[token], wanted)
    untouched = [i for i in range(rows) if i not in tokenizer.starts_from]
    assert torch.equal(model.get_input_embeddings().weight[untouched], plain.get_input_embeddings().weight[untouched])


def test_a_tokenizer_larger_than_the_model_is_an_error_with_both_sizes(trained):
    with pytest.raises(ModelError, match=r"1,823 tokens, the model 1,000 embedding rows"):
        load(trained(rows=1000))


def test_more_embedding_rows_than_tokens_are_allowed(trained):
    model, _ = load(trained(rows=2048))
    assert model.get_input_embeddings().weight.shape[0] == 2048


def test_missing_weights_are_named(trained):
    from safetensors.torch import load_file, save_file

    folder = trained()
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


@pytest.mark.parametrize("damage", ["truncated", "empty", "wrong shape"])
def test_damaged_weights_are_an_error(trained, damage):
    folder = trained()
    file = folder / "model.safetensors"
    if damage == "wrong shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 99}))
    else:
        file.write_bytes(file.read_bytes()[: 1000 if damage == "truncated" else 0])
    with pytest.raises(ModelError):
        load(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_rank_that_does_not_read_gets_the_model_of_the_one_that_does(trained, tied, monkeypatch):
    folder = trained(tied)
    whole, tokenizer = load(folder)
    tensors = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    (folder / "model.safetensors").write_bytes(b"not read")

    def receive(model):
        mine = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert list(mine) == list(tensors)
        for name, tensor in mine.items():
            tensor.detach().copy_(tensors[name])
        return True

    section = ModelSection(base=str(folder))
    received = load_model(section, tokenizer, 1, SharedWeights(False, receive))
    assert (received.lm_head.weight is received.get_input_embeddings().weight) is tied
    assert received.generation_config == whole.generation_config
    assert forward_path(received) == forward_path(whole)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(received(ids).logits, whole(ids).logits)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(section, tokenizer, 1, SharedWeights(False, lambda model: False))


def test_generation_stops_at_the_end_tokens_of_template_and_base(trained):
    model, tokenizer = load(trained())
    assert model.generation_config.eos_token_id[0] == tokenizer.eos_id
    assert 1 in model.generation_config.eos_token_id, "<|end_of_text|> of the base"
    assert model.generation_config.pad_token_id == tokenizer.pad_id == tokenizer.eos_id
    assert model.generation_config.max_length == model.config.max_position_embeddings
    assert model.generation_config.max_new_tokens is None, "servers and evaluations would use it as an upper limit"


@pytest.mark.parametrize("tied", [True, False])
def test_the_padding_tokens_row_has_a_gradient(trained, tied):
    """The padding token is the end token, and the base of a second stage names it in its config."""
    folder = trained(tied)
    first, tokenizer = load(folder)
    first.save_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().padding_idx == tokenizer.eos_id
    model, _ = load(folder)
    embedding, end = model.get_input_embeddings(), tokenizer.eos_id
    hidden = model.base_model(input_ids=torch.tensor([[5, end, 7]])).last_hidden_state
    (grad,) = torch.autograd.grad(hidden[0, -1].sum(), embedding.weight)  # of the embedding alone
    assert grad[end].norm() > 0.1 * grad[5].norm() > 0


def test_random_weights_have_no_row_of_zeros(base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": 9}))
    table = load(tmp_path, random_init=True)[0].get_input_embeddings().weight
    assert float(table[9].std()) == pytest.approx(float(table.std()), rel=0.3)
    assert table.abs().sum(dim=1).all()


def test_a_model_that_counts_positions_from_the_padding_id_keeps_it(base, tmp_path):
    tiny(RobertaConfig).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{base}/{name}", tmp_path / name)
    model, tokenizer = load(tmp_path)
    assert model.config.pad_token_id == 1 != tokenizer.pad_id
    assert model.generation_config.pad_token_id == tokenizer.pad_id


def test_an_architecture_whose_initialisation_reads_its_own_attributes_is_loaded(base, tmp_path):
    """That of xLSTM reads `embeddings`, which the model below the LM head has."""
    tiny(xLSTMConfig).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{base}/{name}", tmp_path / name)
    model, tokenizer = load(tmp_path)
    assert model.config.pad_token_id == tokenizer.pad_id


def test_a_model_with_a_padding_row_zeroed_on_loading_has_no_padding_id(base, tmp_path):
    """transformers zeroes it for youtu whatever the files contain; with us it is the row of the end token."""
    tiny(YoutuConfig).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{base}/{name}", tmp_path / "base" / name)
    model, tokenizer = load(tmp_path / "base")
    assert model.config.pad_token_id is None
    assert model.generation_config.pad_token_id == tokenizer.pad_id
    table = model.get_input_embeddings().weight
    assert table[tokenizer.pad_id].any()
    model.save_pretrained(tmp_path / "final")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "final").get_input_embeddings().weight, table)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_in_the_folder_is_an_error_that_names_it(trained, whole):
    folder = trained()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "else"}))
    if not whole:
        (folder / "model.safetensors").unlink()
    remedy = "remove adapter_config.json if the weights are complete" if whole else "merge it into its base"
    with pytest.raises(ModelError, match=rf"contains an adapter \(adapter_config.json\); {remedy}"):
        load(folder)


@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_a_hybrid_model_without_experts_needs_no_router(base, tmp_path, scaling):
    sizes = {"vocab_size": 1823, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
             "shared_intermediate_size": 96, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}  # fmt: skip
    config = AutoConfig.for_model(
        "granitemoehybrid", **sizes, num_hidden_layers=2, layer_types=["mamba", "attention"], num_local_experts=0,
        num_experts_per_tok=0, output_router_logits=True, logits_scaling=scaling,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{base}/{name}", tmp_path / name)
    model, _ = load(tmp_path, random_init=True)
    answer = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, eos_token_id=None)
    assert answer.shape == (1, 5), "its own forward would need a router"
    assert not forward_path(model).supports_packing


def test_flash_without_a_gpu_is_an_error(base):
    section = ModelSection(base=base, random_init=True, attention="flash")
    with pytest.raises(RecipeError, match="attention: auto"):
        load_model(section, chat_tokenizer(section, ChatSection()), 0)


def test_base_hash_follows_the_content(trained):
    folder = trained()
    section = ModelSection(base=str(folder))
    before = base_hash(section)
    assert base_hash(section) == before
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert base_hash(section) != before


def test_auto_is_eager_if_a_model_supports_nothing_else(base, tmp_path):
    from nesso_tune.smoke import build_tiny_model, tiny_config

    folder = tmp_path / "base"
    folder.mkdir()
    gptj = {"model_type": "gptj", "n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "n_positions": 128}
    assert build_tiny_model(folder, tiny_config(gptj, 1900)) == "gptj"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{base}/{name}", folder / name)
    section = ModelSection(base=str(folder))
    model = load_model(section, chat_tokenizer(section, ChatSection()), 1)
    assert model.config._attn_implementation == "eager"
    wanted = section.model_copy(update={"attention": "sdpa"})
    chat = chat_tokenizer(wanted, ChatSection())
    with pytest.raises(RecipeError, match="does not support sdpa attention; set attention: auto or eager"):
        load_model(wanted, chat, 1)


def test_a_base_that_scales_its_logits_trains_with_padding(base, tmp_path):
    """It uses TRL's head and transformers' attention."""
    assert uses_document_attention(load(base, random_init=True)[0])
    folder = tmp_path / "granite"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "granite", "logits_scaling": 8.0}
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load(folder, random_init=True)
    assert not uses_document_attention(model)
    assert attention_description(model) == "sdpa, with masks"


def test_a_damaged_file_in_the_hubs_cache_is_named(tmp_path, whole_base):
    """The cache names large files by their SHA-256."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    shutil.copytree(whole_base, snapshot)
    blobs.mkdir()
    weights = (snapshot / "model.safetensors").read_bytes()
    blob = blobs / hashlib.sha256(weights).hexdigest()
    blob.write_bytes(weights)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blob)
    section = ModelSection(base=str(snapshot))
    assert base_hash(section) == base_hash(ModelSection(base=whole_base))
    blob.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged in the hub's cache; remove .*/blobs/"):
        base_hash(section)


ZAGREUS = ModelShape(128_256, 960, 2560, 32, 15, 5, 64, tied=True, context=4096)


@thorough  # the compiled layers of a step: tests/model/test_compiled_layers.py
def test_compilation_does_not_change_losses_and_a_resume_is_exact(tmp_path, talks, monkeypatch):
    lengths = set()
    compute = ConversationTrainer.compute_loss

    def watched(self, model, inputs, *arguments, **options):
        if self.model.training:
            lengths.add(inputs["labels"].shape[1])
        return compute(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(ConversationTrainer, "compute_loss", watched)
    for name, compiled in (("plain", False), ("compiled", True)):
        train(recipe("sft", tmp_path / name, [talks], train={"torch_compile": compiled}))
        if not compiled:
            lengths.clear()
    assert lengths == {2 * 128}, "all rows have one length"
    assert steps(tmp_path / "compiled") == pytest.approx(steps(tmp_path / "plain"), rel=1e-5)
    whole = steps(tmp_path / "compiled", "eval_loss")
    assert whole == pytest.approx(steps(tmp_path / "plain", "eval_loss"), rel=1e-5)

    before = load_file(tmp_path / "compiled" / "final" / "model.safetensors")
    shutil.rmtree(tmp_path / "compiled" / "final")
    shutil.rmtree(tmp_path / "compiled" / "checkpoint-4")
    train(recipe("sft", tmp_path / "compiled", [talks], train={"torch_compile": True}))
    after = load_file(tmp_path / "compiled" / "final" / "model.safetensors")
    assert all((after[name] == tensor).all() for name, tensor in before.items())
    assert json.loads((tmp_path / "compiled" / "manifest.json").read_text())["torch_compile"] is True


def test_a_missing_compiler_is_an_error(monkeypatch):
    monkeypatch.setattr(loading.shutil, "which", lambda _: None)
    with pytest.raises(RunEnvironmentError, match=r"no C\+\+ compiler is installed"):
        loading.compile_layers(None)


def test_auto_compiles_long_runs_on_a_cpu(tmp_path):
    def compiled(volume=None, shape=ZAGREUS, **train):
        some = recipe("sft", tmp_path, ["a"], train={"max_steps": None, "num_epochs": 1.0, **train},
                      data={"sequence_len": 1024})  # fmt: skip
        return make_plan(some, volume=volume, shape=shape).torch_compile

    much, little = DataVolume(1000, 10**6, 5 * 10**5), DataVolume(20, 20_000, 10_000)
    assert compiled(much)
    assert not compiled(little)
    assert compiled(little, torch_compile=True)
    assert not compiled(much, torch_compile=False)
    assert not compiled(None)
    assert not make_plan(recipe("dpo", tmp_path, ["a"]), volume=much, shape=ZAGREUS).torch_compile


def test_auto_compiles_runs_of_minutes_on_a_gpu(tmp_path):
    def plan(steps, gpu="h200", **sections):
        train = {"max_steps": steps, "micro_batch_size": 8}
        some = recipe("sft", tmp_path, ["a"], train=train, data={"sequence_len": 4096}, **sections)
        return make_plan(some, World(1, find_gpu(gpu)), shape=ZAGREUS), some

    long, some = plan(2000)
    assert long.torch_compile
    assert long.compile_seconds == 60
    assert any(line.startswith("compilation    about 60 s before the first step") for line in describe(long, some))
    assert long.step_seconds == plan(100)[0].step_seconds, "compilation is no part of a step"
    short, some = plan(100)
    assert not short.torch_compile
    assert short.compile_seconds == 0
    assert not any("compilation" in line for line in describe(short, some))
    assert not plan(20_000, gpu="v100-32gb")[0].torch_compile
    assert not plan(2000, model={"random_init": False, "adapter": {"type": "qlora"}})[0].torch_compile


def test_the_warm_up_changes_neither_weights_nor_random_numbers(tmp_path, talks, monkeypatch):
    seen, warm_up = [], ConversationTrainer.warm_up

    def watched(self):
        def state():
            return [torch.get_rng_state(), *(p.detach().clone() for p in self.model.parameters())]

        before = state()
        warm_up(self)
        seen.append(all(map(torch.equal, before, state())))
        assert all(p.grad is None for p in self.model.parameters())
        assert counters["stats"]["unique_graphs"] > 0
        seen.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(ConversationTrainer, "warm_up", watched)
    counters.clear()
    torch._dynamo.reset()
    train(recipe("sft", tmp_path / "run", [talks], train={"torch_compile": True, "max_steps": 2}, evaluation=None))
    assert seen == [True, counters["stats"]["unique_graphs"]], "steps compile nothing more"

"""LoRA, DoRA and QLoRA: trained and frozen weights, merging, unsupported models."""

import copy
import json
import shutil
import sys
from dataclasses import asdict

import bitsandbytes
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.errors import ModelError, RecipeError, RunEnvironmentError
from nesso_tune.export.final_folder import gather_final_model
from nesso_tune.model.adapters import adapt, check_adapter, fake_quantise, lora_config, quantise
from nesso_tune.model.loading import load_model
from nesso_tune.planning.memory import adapter_parameters
from nesso_tune.planning.shapes import shape_of
from nesso_tune.recipes.sections import ChatSection, LoraSection, ModelSection
from nesso_tune.run import train
from nesso_tune.runs.provenance import RunFacts
from nesso_tune.training.state_dict import get_weights, set_weights
from tests.support.adapters import KINDS, ROWS, adapted, apart, base_in, learn, logits, of, switch_off
from tests.support.runs import main_here, thorough, write_recipe


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_trained_and_frozen_weights(tmp_path, kind, tied):
    plain, held, model, chat = adapted(base_in(tmp_path, tied), kind)
    assert chat.new_ids == [2, 3]
    width, tables = plain.config.hidden_size, 1 if tied else 2
    trained = sum(p.numel() for p in held.parameters() if p.requires_grad)
    counted = adapter_parameters(model.adapter, shape_of(plain.config.to_dict()))
    assert trained == counted + tables * len(chat.new_ids) * width
    before = {name: p.detach().clone() for name, p in held.named_parameters() if not p.requires_grad}
    learn(held)
    after = dict(held.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items()), "the base is frozen"
    assert all(p.dtype == torch.float32 for p in held.parameters() if p.requires_grad), "masters are float32"
    final, state = gather_final_model(held, held, model, chat, seed=1)
    for table in ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]:
        changed = (state[table] != plain.state_dict()[table]).any(dim=1).nonzero().flatten().tolist()
        assert changed == chat.new_ids, "only the rows of new tokens"
    assert set(state) == {name for name, _ in plain.named_parameters()}, "a plain model, without peft"
    assert not hasattr(final.config, "quantization_config")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_the_one_that_was_trained(tmp_path, kind, dtype):
    """Up to rounding: of the summation order in float32, of the computation itself in bfloat16."""
    plain, held, model, chat = adapted(base_in(tmp_path), kind, dtype)
    start = logits(held, dtype)
    learn(held, dtype)
    trained = logits(held, dtype)
    assert apart(trained, start) > 0.1
    final, _ = gather_final_model(held, held, model, chat, seed=1)
    exact, within = logits(final), 1e-5 if dtype == "float32" else 0.03
    assert apart(exact, trained) < within
    assert apart(logits(final.to(getattr(torch, dtype))), trained) < within
    if kind == "qlora":  # merging into the unquantised base gives another model
        adapt(plain, model.model_copy(update={"adapter": LoraSection(r=4)}), chat.new_ids, seed=1, frozen="float32")
        plain.load_state_dict(get_weights(held), strict=False)
        assert apart(logits(plain), trained) > max(0.04, 2 * apart(exact, trained))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_adapter_the_model_is_its_base_before_and_after_training(tmp_path, kind, tied):
    plain, held, *_ = adapted(base_in(tmp_path, tied), kind)
    if kind == "qlora":
        fake_quantise(plain, torch.float32)
    base = logits(plain)
    torch.testing.assert_close(logits(held), base, rtol=0, atol=1e-5)
    learn(held.train())
    assert apart(logits(held), base) > 0.1
    switch_off(held)
    torch.testing.assert_close(logits(held), base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_refused(tmp_path, talks, capsys, kind):
    base = base_in(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    path = write_recipe(tmp_path / "r.yaml", of(base, kind, "sft", tmp_path / "run", talks))
    for verb in ("check", "train"):
        code, _, err = main_here(capsys, verb, path)
        assert code == ModelError.exit_code
        assert "is quantized; use the original model" in err


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 64}  # fmt: skip
REFUSED = {
    "a layer that is not there": ("llama", "lora", ["q_proj", "attn"], "no layer `attn`; use all-linear, or some of"),
    "a block that is not there": ("llama", "lora", ["layers.9.self_attn.q_proj"], "no layer `layers.9"),
    "half a name": ("llama", "dora", "proj", "no layer `proj`"),
    "the head": ("llama", "lora", ["q_proj", "lm_head"], "the head's own weights"),
    "a layer that peft does not support": ("mamba", "dora", "all-linear", "peft cannot adapt MambaForCausalLM"),
    "nothing to quantise": ("gpt2", "qlora", "all-linear", "finds no linear layers in GPT2LMHeadModel"),
}


@pytest.mark.parametrize(("architecture", "kind", "targets", "says"), REFUSED.values(), ids=REFUSED)
def test_unsupported_target_modules_are_refused(architecture, kind, targets, says):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2} if architecture == "gpt2" else TINY
    some = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, vocab_size=64, **sizes))
    section = ModelSection(base="b", adapter=LoraSection(type=kind, target_modules=targets))
    with pytest.raises(RecipeError, match=says):
        adapt(some, section, [3], seed=0)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_conv1d_layers_have_adapters_too(kind):
    """GPT-2 stores its weight matrices transposed."""
    some = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    section = ModelSection(base="b", dtype="float32", adapter=LoraSection(type=kind))
    view = adapt(some, section, [2, 3], seed=0)
    rows = ROWS.clamp(max=63)
    before = some(rows).logits
    optimizer = torch.optim.SGD([p for p in some.parameters() if p.requires_grad], lr=1.0)
    some(rows, labels=rows).loss.backward()
    optimizer.step()
    trained = some.eval()(rows).logits
    assert apart(trained, before) > 1e-3
    torch.testing.assert_close(view.merge_and_unload()(rows).logits, trained, rtol=0, atol=1e-4)


def test_4_bit_layers_compute_the_same_in_training_and_evaluation(tmp_path):
    """On CPUs with AVX512-BF16, bitsandbytes evaluates with other weights, and then trains without gradients."""
    _, held, *_ = adapted(base_in(tmp_path), "qlora")
    learn(held)
    gradients = []
    for _ in range(2):
        held.train().zero_grad()
        loss = held(ROWS, labels=ROWS).loss
        loss.backward()
        gradients.append([p.grad.clone() for p in held.parameters() if p.requires_grad])
        with torch.no_grad():
            assert held.eval()(ROWS, labels=ROWS).loss == loss
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert all(gradient.any() for gradient in gradients[1])


def test_quantisation_is_deterministic(tmp_path):
    _, one, *_ = adapted(base_in(tmp_path), "qlora")
    _, other, *_ = adapted(base_in(tmp_path), "qlora")
    packed = [p for p in one.parameters() if p.dtype == torch.uint8]
    assert len(packed) == 7 * one.config.num_hidden_layers, "every linear layer except the head"
    for mine, others in zip(packed, (p for p in other.parameters() if p.dtype == torch.uint8), strict=True):
        assert torch.equal(mine, others)
        assert mine.quant_state.nested, "with double quantisation"
        assert mine.quant_state.quant_type == "nf4"


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 64}  # fmt: skip


def test_4_bit_layers_keep_their_biases():
    config = AutoConfig.for_model("qwen2", vocab_size=64, **SIZES)
    some = AutoModelForCausalLM.from_config(config)
    for name, parameter in some.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    plain = copy.deepcopy(some)
    fake_quantise(plain, torch.float32)
    quantise(some, torch.float32)
    rows = ROWS.clamp(max=63)
    torch.testing.assert_close(some.eval()(rows).logits, plain.eval()(rows).logits, rtol=0, atol=1e-5)


def test_missing_bitsandbytes_is_an_error_with_an_install_command(tmp_path, talks, monkeypatch, capsys):
    some = of(base_in(tmp_path), "qlora", "sft", tmp_path / "run", talks)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, out, err = main_here(capsys, "train", write_recipe(tmp_path / "r.yaml", some))
    assert (code, out) == (RunEnvironmentError.exit_code, "")
    assert "model.adapter.type: qlora needs bitsandbytes, which is not installed; pip install 'bitsandbytes>=" in err
    check_adapter(LoraSection(type="dora"))
    check_adapter(None)


def test_an_unsupported_device_is_named(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Configured CUDA binary not found at libbitsandbytes_cuda999.so")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    with pytest.raises(RunEnvironmentError, match=r"cannot quantise on cpu .*cuda999.* or use type: lora"):
        check_adapter(LoraSection(type="qlora"))


def learned_with(folder, kind, frozen, ids):
    """A bfloat16 model after five steps of its adapter, with the frozen weights in `frozen`."""
    section = ModelSection(base=str(folder), dtype="bfloat16", adapter=LoraSection(type=kind, r=4))
    chat = chat_tokenizer(section, ChatSection())
    model = load_model(section, chat, seed=1)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()  # as most bases are saved
    adapt(model, section, chat.new_ids if ids else [], seed=1, frozen=frozen)
    learn(model, "bfloat16")
    return model


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=thorough)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_bfloat16_trains_as_one_in_float32_that_is_rounded_by_autocast(tmp_path, kind, tied):
    """To the bit, but for the rows of new tokens, which are then rounded in the forward pass."""
    folder = base_in(tmp_path, tied)
    exact, held = (learned_with(folder, kind, frozen, ids=False) for frozen in ("float32", "bfloat16"))
    for name, weight in exact.named_parameters():
        assert not weight.requires_grad or torch.equal(weight, held.get_parameter(name)), name
    assert torch.equal(logits(held, "bfloat16"), logits(exact, "bfloat16"))
    frozen = [weight for weight in held.parameters() if not weight.requires_grad and weight.is_floating_point()]
    assert {weight.dtype for weight in frozen if weight.dim() > 1} == {torch.bfloat16}
    assert {weight.dtype for weight in frozen if weight.dim() == 1} == {torch.float32}, "norms"
    held = learned_with(folder, kind, "bfloat16", ids=True)
    assert {weight.dtype for weight in held.parameters() if weight.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_recipe_holds_its_base_in_float32(tmp_path, kind):
    _, held, *_ = adapted(base_in(tmp_path), kind)
    assert {weight.dtype for weight in held.parameters()} <= {torch.float32, torch.uint8}


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=thorough), "dora"])
def test_an_adapter_is_merged_in_float32_and_rounded_once(tmp_path, talks, kind):
    """`final/` is what peft alone merges into the base in float32."""
    some = of(base_in(tmp_path), kind, "sft", tmp_path / "run", talks)
    some = some.model_copy(update={"model": some.model.model_copy(update={"dtype": "bfloat16"})})
    final = load_file(train(some).model_dir / "model.safetensors")
    chat = chat_tokenizer(some.model, ChatSection())
    plain = load_model(some.model, chat, some.seed)
    merged = get_peft_model(plain, lora_config(some.model.adapter, plain, chat.new_ids))
    set_weights(plain, load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors"))
    state = merged.merge_and_unload().state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(final[name], state[name].bfloat16()) for name in final)


@pytest.mark.parametrize(("recorded", "kept"), [pytest.param(True, "bfloat16", marks=thorough), (False, "float32")])
def test_a_run_goes_on_with_its_base_in_the_precision_that_it_began_with(tmp_path, talks, monkeypatch, recorded, kept):
    """Runs that did not record one began in float32."""
    some = of(base_in(tmp_path), "lora", "sft", tmp_path / "run", talks)
    some = some.model_copy(update={"model": some.model.model_copy(update={"dtype": "bfloat16"})})
    with monkeypatch.context() as patch:
        if not recorded:
            old = ("frozen_weights",)
            patch.setattr(RunFacts, "to_dict", lambda facts: {k: v for k, v in asdict(facts).items() if k not in old})
        shutil.rmtree(train(some).model_dir)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    train(some)
    manifest = json.loads((tmp_path / "run" / "checkpoint-4" / "manifest.json").read_text())
    assert manifest["frozen_weights"] == kept

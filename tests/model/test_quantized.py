"""A base in 4 bits: the same at every start, whether it trains or evaluates; what it needs, and where it cannot run."""

import copy
import sys

import bitsandbytes
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nesso_tune.errors import RecipeError, RunEnvironmentError
from nesso_tune.model.adapters import check_adapter
from nesso_tune.model.quantized import quantise, round_weights
from nesso_tune.recipes.sections import LoraSection
from tests.support.adapters import ROWS, adapted, base_in, learn, of
from tests.support.runs import command, main_here, write_recipe


def test_four_bits_compute_alike_whether_they_train_or_evaluate(tmp_path):
    """On CPUs with AVX512-BF16 bitsandbytes would evaluate with other weights, and train on without gradients."""
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


def test_four_bits_are_the_same_at_every_start(tmp_path):
    _, one, *_ = adapted(base_in(tmp_path), "qlora")
    _, other, *_ = adapted(base_in(tmp_path), "qlora")
    packed = [p for p in one.parameters() if p.dtype == torch.uint8]
    assert len(packed) == 7 * one.config.num_hidden_layers, "every linear layer but the head"
    for mine, others in zip(packed, (p for p in other.parameters() if p.dtype == torch.uint8), strict=True):
        assert torch.equal(mine, others)
        assert mine.quant_state.nested, "with double quantisation"
        assert mine.quant_state.quant_type == "nf4"


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 64}  # fmt: skip


def test_biases_are_kept_in_four_bits():
    config = AutoConfig.for_model("qwen2", vocab_size=64, **SIZES)
    some = AutoModelForCausalLM.from_config(config)
    for name, parameter in some.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    plain = copy.deepcopy(some)
    round_weights(plain, torch.float32)
    quantise(some, torch.float32)
    rows = ROWS.clamp(max=63)
    torch.testing.assert_close(some.eval()(rows).logits, plain.eval()(rows).logits, rtol=0, atol=1e-5)


def test_without_bitsandbytes_it_says_what_to_install(tmp_path, talks, monkeypatch, capsys):
    some = of(base_in(tmp_path), "qlora", "sft", tmp_path / "run", talks)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, out, err = main_here(capsys, "train", write_recipe(tmp_path / "r.yaml", some))
    assert (code, out) == (RunEnvironmentError.exit_code, "")
    assert "model.adapter.type: qlora needs bitsandbytes, which is not installed; pip install 'bitsandbytes>=" in err
    check_adapter(LoraSection(type="dora"))
    check_adapter(None)


def test_a_device_that_it_cannot_use_is_named(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Configured CUDA binary not found at libbitsandbytes_cuda999.so")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    with pytest.raises(RunEnvironmentError, match=r"cannot quantise on cpu .*cuda999.* or use type: lora"):
        check_adapter(LoraSection(type="qlora"))


def test_four_bits_on_several_processes_are_refused_at_once(tmp_path, talks, capsys):
    for sharing in ("none", "auto"):
        some = of(base_in(tmp_path), "qlora", "sft", tmp_path / "run", talks, distributed={"fsdp": sharing})
        path = write_recipe(tmp_path / "r.yaml", some)
        code, _, err = main_here(capsys, "check", path, "--gpus-per-node", "2")
        assert code == RecipeError.exit_code
        assert "qlora runs in one process, here are 2; start one (nesso-tune train), or use type: lora" in err
    done = command("train", path, RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    assert done.returncode == RecipeError.exit_code
    assert "qlora runs in one process" in done.stderr
    assert not (tmp_path / "run").exists(), "before anything was begun"

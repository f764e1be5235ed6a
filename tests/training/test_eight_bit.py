"""AdamW with 8-bit moments: it learns as AdamW does, and is saved and resumed to the bit."""

import copy
import shutil
import sys

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nesso_tune.errors import RecipeError, RunEnvironmentError
from nesso_tune.planning.memory import MOMENT_BYTES
from nesso_tune.run import train
from nesso_tune.training.eight_bit import check_optimizer, get_state, set_state
from tests.support.runs import main_here, metrics, recipe, steps, write_recipe

EIGHT = {"optimizer": "adamw_8bit"}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_it_learns_as_adamw_and_resumes_with_the_same_bits(tmp_path, request, method):
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    some = recipe(method, tmp_path / "run", [source], train=EIGHT)
    final = train(some).model_dir
    whole, run = (final / "model.safetensors").read_bytes(), tmp_path / "run"
    moments = load_file(run / "checkpoint-4" / "optimizer.safetensors")
    shutil.rmtree(final)
    shutil.rmtree(run / "checkpoint-4")
    assert train(some).trained
    assert "resumed" in {line.get("event") for line in metrics(run)}
    assert (final / "model.safetensors").read_bytes() == whole
    again = load_file(run / "checkpoint-4" / "optimizer.safetensors")
    assert all(torch.equal(again[name], value) for name, value in moments.items())
    assert {value.dtype for name, value in moments.items() if name.endswith("state1")} == {torch.uint8, torch.float32}
    large = [name.removesuffix("|absmax1") for name in moments if name.endswith("|absmax1")]
    weights = load_file(run / "checkpoint-4" / "model.safetensors")
    held = sum(t.nbytes for n, t in moments.items() if n.rpartition("|")[0] in large and not n.endswith("|step"))
    counted = MOMENT_BYTES["adamw_8bit"] * sum(weights[name].numel() for name in large)
    assert held == pytest.approx(counted, rel=1e-3), "as planned"
    train(recipe(method, tmp_path / "plain", [source]))
    assert steps(run)[1] == steps(tmp_path / "plain")[1]
    assert steps(run)[4] == pytest.approx(steps(tmp_path / "plain")[4], rel=0.02)
    assert steps(run)[4] < 0.99 * steps(run)[1]


def test_state_is_saved_and_set_with_every_bit():
    torch.manual_seed(0)
    weights = {"large": nn.Parameter(torch.randn(300, 30)), "small": nn.Parameter(torch.randn(30))}
    copies = {name: nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}
    one, other = (bitsandbytes.optim.AdamW(list(some.values()), optim_bits=8) for some in (weights, copies))

    def step(some, optimizer, seed):
        torch.manual_seed(seed)
        for weight in some.values():
            weight.grad = torch.randn_like(weight)
        optimizer.step()

    step(weights, one, 1)
    set_state(copies, other, copy.deepcopy(get_state(weights, one)))
    for name, weight in weights.items():
        copies[name].data.copy_(weight.data)
    for seed in (2, 3):
        step(weights, one, seed)
        step(copies, other, seed)
    assert all(torch.equal(weight, copies[name]) for name, weight in weights.items())
    assert get_state(weights, one).keys() == weights.keys()


def test_the_optimizer_may_not_change_on_resume(tmp_path, talks):
    shutil.rmtree(train(recipe("sft", tmp_path / "run", [talks])).model_dir)
    with pytest.raises(RecipeError, match=r'its run has train.optimizer: "adamw_torch_fused"'):
        train(recipe("sft", tmp_path / "run", [talks], train=EIGHT))


def test_missing_bitsandbytes_is_an_error_before_anything_is_written(tmp_path, talks, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks], train=EIGHT))
    code, out, err = main_here(capsys, "train", path)
    assert (code, out) == (RunEnvironmentError.exit_code, "")
    assert "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed; pip install 'bitsandbytes>=" in err
    assert not (tmp_path / "run").exists()


def test_an_unsupported_device_is_named(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Configured CUDA binary not found at libbitsandbytes_cuda999.so")

    monkeypatch.setattr(bitsandbytes.optim.AdamW, "step", broken)
    with pytest.raises(RunEnvironmentError, match=r"adamw_8bit does not work on cpu .*cuda999.* or use optimizer"):
        check_optimizer(recipe("sft", tmp_path, ["x"], train=EIGHT))
    check_optimizer(recipe("sft", tmp_path, ["x"]))

"""Compiled layers: the same numbers, rows of one length, and a run that resumes to the bit."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from nesso_tune import RunEnvironmentError
from nesso_tune.model import compiling
from nesso_tune.recipes.plan import DataVolume
from nesso_tune.recipes.planning import make_plan
from nesso_tune.recipes.shape import ModelShape
from nesso_tune.run import train
from nesso_tune.training.sft import ConversationTrainer
from tests.support.runs import recipe, steps

ZAGREUS = ModelShape(128_256, 960, 2560, 32, 15, 5, 64, tied=True, context=4096)


def test_losses_are_those_of_a_run_that_is_not_compiled_and_a_resume_is_exact(tmp_path, talks, monkeypatch):
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
    assert lengths == {2 * 128}, "rows are filled up to one length"
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


def test_without_a_compiler_it_is_said(monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    assert not compiling.can_compile()
    with pytest.raises(RunEnvironmentError, match=r"no C\+\+ compiler is installed"):
        compiling.compile_layers(None)


def test_auto_compiles_where_a_cpu_has_much_to_do(tmp_path):
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

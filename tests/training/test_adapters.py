"""Whole runs that train an adapter: continued, killed, and from a base to an assistant."""

import json
import shutil

import bitsandbytes
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nesso_tune.run import train
from nesso_tune.training import reference as reference_module
from tests.support.adapters import KINDS, base_in, of, switch_off
from tests.support.runs import BASE, ROOT, metrics, recipe, steps, thorough, write_recipe
from tests.test_kill import kill_at, start

DATA = ROOT / "recipes" / "quickstart" / "data"


@pytest.mark.parametrize("kind", ["dora", "qlora"])
@pytest.mark.parametrize("method", ["sft", pytest.param("dpo", marks=thorough)])
def test_a_run_that_is_continued_ends_with_the_same_bits(tmp_path, request, method, kind):
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    some = of(base_in(tmp_path), kind, method, tmp_path / "run", source)
    final = train(some).model_dir
    whole, run = (final / "model.safetensors").read_bytes(), tmp_path / "run"
    kept = load_file(run / "checkpoint-4" / "model.safetensors")
    assert all("lora" in name or "trainable_tokens" in name for name in kept), "of the base it holds nothing"
    assert json.loads((run / "checkpoint-4" / "manifest.json").read_text())["versions"].get("bitsandbytes") == (
        bitsandbytes.__version__ if kind == "qlora" else None
    )
    shutil.rmtree(final)
    shutil.rmtree(run / "checkpoint-4")
    assert train(some).trained
    assert "resumed" in {line.get("event") for line in metrics(run)}
    assert (final / "model.safetensors").read_bytes() == whole
    AutoModelForCausalLM.from_pretrained(final)


@thorough
@pytest.mark.parametrize("kind", ["dora", "qlora"])
def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path, talks, kind):
    long = {"train": {"max_steps": 40}, "checkpoint": {"every_steps": 10}, "evaluation": None}
    one, other = (of(base_in(tmp_path), kind, "sft", tmp_path / name, talks, **long) for name in ("one", "other"))
    train(one)
    kill_at(start(write_recipe(tmp_path / "r.yaml", other)), tmp_path / "other", 14)
    assert not (tmp_path / "other" / "final").exists()
    train(other)
    assert steps(tmp_path / "other") == steps(tmp_path / "one")
    whole, again = (tmp_path / name / "final" / "model.safetensors" for name in ("one", "other"))
    assert whole.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=thorough), "qlora"])
def test_the_reference_of_dpo_is_the_base_with_the_adapter_off(tmp_path, pairs, kind, monkeypatch):
    """What is scored before the first step equals what the trained model scores without its adapter."""
    original, seen = reference_module.compute_reference, []

    def noted(*arguments):
        seen.append((arguments, original(*arguments)))
        return seen[-1][1]

    monkeypatch.setattr(reference_module, "compute_reference", noted)
    train(of(base_in(tmp_path), kind, "dpo", tmp_path / "run", pairs, train={"learning_rate": 1e-2}))
    ((arguments, reference),) = seen
    policy = original(*arguments)
    switch_off(arguments[0].model)
    without = original(*arguments)
    assert max(abs(a - b) for pair in reference for a, b in zip(reference[pair], policy[pair], strict=True)) > 1
    for pair, sums in reference.items():
        assert without[pair] == pytest.approx(sums, abs=1e-3)


SCHEDULE = {"warmup_ratio": 0.05, "constant_ratio": 0.8, "min_ratio": 0.3, "warmup_steps": None}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base that speaks a little, in another template: the quickstart's model after two and a half epochs."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("NESSO_TUNE_CACHE", str(folder / "cache"))
        raw = {"model": {}, "chat": {"template": "llama3"}, "data": {"sources": [], "validation_sources": []}}
        made = train(taught("sft", folder / "before", epochs=2.5, rate=1e-3, **raw)).model_dir
        shutil.copytree(BASE, folder / "base")  # its tokenizer: no template, no chat tokens
        for name in ("config.json", "model.safetensors"):
            shutil.copy(made / name, folder / "base")
        return folder


def taught(method, run, epochs, rate, model, **sections):
    """A recipe on the quickstart's data."""
    names = ("conversations", "heldout") if method == "sft" else ("pairs", "pairs_heldout")
    source, held = ({"path": str(DATA / f"{name}.jsonl")} for name in names)
    data = {"sequence_len": 256, "validation_size": 0.01, "sources": [source], "validation_sources": [held]}
    batch = {"max_steps": None, "num_epochs": epochs, "micro_batch_size": 2 if method == "sft" else 8}
    sections |= {"dpo": {"loss": {"sigmoid": 1.0, "sft": 0.3}}} if method == "dpo" else {}
    return recipe(
        method, run, [], **{**sections, "data": data}, model=model, checkpoint={"every_steps": 1000},
        train={**batch, "learning_rate": rate, "adam_beta2": 0.95, "schedule": SCHEDULE},
        evaluation={"every_steps": 1000, "samples": 36, "max_new_tokens": 48}, logging={"every_steps": 50},
    )  # fmt: skip


def last(run):
    return [line for line in metrics(run) if "eval_loss" in line][-1]


@thorough
@pytest.mark.parametrize("kind", KINDS)
def test_an_assistant_by_adapters_alone(home, kind):
    """SFT, then DPO: new chat tokens are learned, every answer ends, and the chosen style is taken up."""
    sft = {"base": str(home / "base"), "random_init": False, "adapter": {"type": kind, "r": 16}}
    made = train(taught("sft", home / kind / "sft", epochs=3, rate=5e-3, model=sft)).model_dir
    before, after = last(home / "before"), last(home / kind / "sft")
    assert before["exact_match"] < 0.6
    assert after["exact_match"] > max(0.7, before["exact_match"])
    assert after["stop_rate"] == 1.0
    assert {after[f"stop_rate/{code}"] for code in ("it", "en")} == {1.0}
    dpo = {**sft, "base": str(made)}
    train(taught("dpo", home / kind / "dpo", epochs=4, rate=5e-3, model=dpo))
    line = last(home / kind / "dpo")
    assert line["eval_rewards/accuracies"] >= 0.9
    assert line["closer_to_chosen"] >= 0.8
    assert line["stop_rate"] == 1.0

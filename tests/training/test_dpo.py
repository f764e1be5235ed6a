"""The DPO step: TRL's numbers, the reference that the run starts from, and figures by language."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from nesso_tune import NumericalError, RecipeError, RunEnvironmentError
from nesso_tune.run import train
from nesso_tune.training import dpo
from nesso_tune.training import reference as reference_module
from nesso_tune.training.losses import answer_log_probs
from nesso_tune.training.numerical_checks import SpikeGuard
from nesso_tune.training.reference import load_reference
from tests.support.logs import logged
from tests.support.runs import metrics, recipe, steps

TINY = LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def test_first_loss_is_ln_2_and_every_log_ratio_is_zero(tmp_path, pairs):
    train(recipe("dpo", tmp_path / "run", [pairs], dpo={"loss": {"sigmoid": 1.0}}))
    first = next(line for line in metrics(tmp_path / "run") if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_a_run_on_rows_has_the_numbers_of_a_run_on_padded_pairs(tmp_path, pairs):
    """`attention: eager` takes TRL's own way: both answers padded, each with its prompt."""
    for kernel in ("auto", "eager"):
        rates = {"learning_rate": 1e-2, "max_steps": 3, "micro_batch_size": 4}
        train(recipe("dpo", tmp_path / kernel, [pairs], model={"attention": kernel}, train=rates,
                     dpo={"loss": {"sigmoid": 1.0, "sft": 0.2}}))  # fmt: skip
    ours, padded = ([line for line in metrics(tmp_path / name) if "event" not in line] for name in ("auto", "eager"))
    figures = ("loss", "loss/it", "loss_sft/it", "eval_loss", *dpo.PAIR_METRICS, "logps/chosen_shift", "token_accuracy")
    for mine, theirs in zip(ours, padded, strict=True):
        for name in (*figures, "grad_norm"):
            assert (name in mine) == (name in theirs), name
            assert mine.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-4, abs=1e-4), name
    assert json.loads((tmp_path / "auto" / "manifest.json").read_text())["attention"] == "sdpa, by document"
    assert json.loads((tmp_path / "eager" / "manifest.json").read_text())["attention"] == "eager, with masks"


def test_answer_log_probs_count_the_answer_only_and_discount_what_lies_beyond():
    log_probs = -torch.ones(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
    masked = log_probs * mask[:, 1:]
    assert answer_log_probs(masked, mask, None).tolist() == [-4, -2]
    assert answer_log_probs(masked, mask, 0.5).tolist() == [-3, -2]


def test_figures_by_language(tmp_path, pairs):
    train(recipe("dpo", tmp_path / "run", [pairs], data={"validation_size": 6}))
    line = next(line for line in metrics(tmp_path / "run") if "eval_loss" in line)
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
        assert line[name] == pytest.approx((line[f"{name}/it"] + line[f"{name}/en"]) / 2), "three pairs of each"


@pytest.fixture
def optimised(monkeypatch):
    """The losses of all optimizer steps of a test, each as the sum of what was derived."""
    seen = []
    original = SpikeGuard.allows_update

    def watched(self, trainer, norm):
        seen.append(sum(map(float, self._losses)))
        return original(self, trainer, norm)

    monkeypatch.setattr(SpikeGuard, "allows_update", watched)
    return seen


def test_accumulation_changes_nothing_and_the_loss_reported_is_the_one_optimised(tmp_path, pairs, optimised):
    """A line over several steps is their mean; the held-out loss is that of all pairs as one step."""
    for micro, accumulation, every in ((4, 1, 1), (1, 4, 3)):
        batch = {"max_steps": 3, "micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        some = recipe("dpo", tmp_path / f"{micro}", [pairs], dpo={"loss": {"sigmoid": 1.0, "sft": 0.5}},
                      train={**batch, "learning_rate": 1e-2}, data={"validation_size": 6},
                      evaluation={"every_steps": 3, "samples": 0}, logging={"every_steps": every})  # fmt: skip
        train(some)
    whole, split = tmp_path / "4", tmp_path / "1"
    assert optimised[:3] == pytest.approx(optimised[3:], rel=1e-5)
    assert [*steps(whole).values()] == pytest.approx(optimised[:3], rel=1e-6)
    assert steps(split) == pytest.approx({1: optimised[3], 3: sum(optimised[4:]) / 2}, rel=1e-6)
    lines = [next(line for line in metrics(run) if "eval_loss" in line) for run in (whole, split)]
    figures = ("eval_loss", "eval_loss_preference", "eval_loss_sft", "eval_loss/it", "eval_loss_sft/en")
    for name in figures:
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4), name
        if "sft" not in name and "preference" not in name:
            part = name.removeprefix("eval_loss")
            terms = [lines[0][f"eval_loss_{term}{part}"] for term in ("preference", "sft")]
            assert lines[0][name] == pytest.approx(terms[0] + 0.5 * terms[1], rel=1e-9), name


def test_a_loss_that_sorts_the_pairs_of_a_step_is_reported_as_a_whole(tmp_path, pairs, optimised):
    def of_best(name, metric):
        batch = {"micro_batch_size": 6, "learning_rate": 1e-2, "best_metric": metric}
        return recipe("dpo", tmp_path / name, [pairs], dpo={"loss": {"aot": 1.0, "sft": 0.5}}, train=batch,
                      evaluation={"samples": 0})  # fmt: skip

    train(of_best("run", "eval_loss"))
    assert [*steps(tmp_path / "run").values()] == pytest.approx(optimised, rel=1e-6)
    names = {name for line in metrics(tmp_path / "run") for name in line if "loss" in name}
    whole = {"loss", "loss_preference", "eval_loss", "eval_loss_preference"}
    assert names == whole | {f"{kind}loss_sft{part}" for kind in ("", "eval_") for part in ("", "/it", "/en")}
    with pytest.raises(RecipeError, match="`eval_loss/it` is not measured by this run; did you mean `eval_loss`"):
        train(of_best("it", "eval_loss/it"))


def test_training_prefers_the_chosen(tmp_path, pairs):
    rates = {"max_steps": 30, "micro_batch_size": 8, "learning_rate": 3e-3}
    train(recipe("dpo", tmp_path / "run", [pairs], train=rates, data={"validation_size": 0}, evaluation=None))
    margins = steps(tmp_path / "run", "rewards/margins")
    assert margins[30] > 1.0


def test_the_reference_is_the_start_also_after_a_resume(tmp_path, pairs):
    """And the figures of a line that began before it are those of a run that was never stopped."""
    some = recipe("dpo", tmp_path / "run", [pairs], train={"learning_rate": 1e-2}, logging={"every_steps": 3},
                  dpo={"loss": {"sigmoid": 1.0, "sft": 0.2}})  # fmt: skip
    train(some)
    run = tmp_path / "run"
    before, weights = steps(run), (run / "final" / "model.safetensors").read_bytes()
    for folder in ("final", "checkpoint-4"):
        shutil.rmtree(run / folder)
    train(some)
    assert any(line.get("event") == "resumed" for line in metrics(run))
    assert steps(run) == before
    assert sorted(before) == [1, 3, 4]
    assert (run / "final" / "model.safetensors").read_bytes() == weights
    fingerprint = json.loads((run / "manifest.json").read_text())["start"]
    before = load_reference(run, fingerprint)
    assert len(before) == 20
    with pytest.raises(RunEnvironmentError, match="other data"):
        load_reference(run, "another")
    (run / "reference.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunEnvironmentError, match="damaged"):
        load_reference(run, fingerprint)
    (run / "reference.safetensors").unlink()
    with pytest.raises(RunEnvironmentError, match="missing"):
        load_reference(run, fingerprint)


def scored(run):
    """Whether the run found its reference in the cache."""
    return next(line["cached"] for line in metrics(run) if line.get("event") == "reference")


def test_a_second_run_scores_nothing(tmp_path, pairs, monkeypatch):
    train(recipe("dpo", tmp_path / "a", [pairs]))
    assert not scored(tmp_path / "a")

    def never(*_):
        raise AssertionError("scored again")

    monkeypatch.setattr(reference_module, "compute_reference", never)
    other = {"learning_rate": 5e-4, "max_steps": 20, "micro_batch_size": 4, "schedule": {"warmup_steps": 1}}
    train(recipe("dpo", tmp_path / "b", [pairs], train=other, dpo={"beta": 0.3, "loss": {"ipo": 1.0}}))
    assert scored(tmp_path / "b")
    references = [(tmp_path / name / "reference.safetensors").read_bytes() for name in "ab"]
    tensors = [load(one) for one in references]
    assert torch.equal(tensors[0]["log_probs"], tensors[1]["log_probs"])
    assert steps(tmp_path / "b")[20] < steps(tmp_path / "b")[1], "two epochs and more, with one pass over the reference"


CHANGES = {
    "a pair": lambda rows, sections: rows[3].update(chosen="Tutt'altra cosa."),
    "the order of the answers": lambda rows, sections: rows[3].update(
        chosen=rows[3]["rejected"], rejected=rows[3]["chosen"]
    ),
    "the length": lambda rows, sections: sections["data"].update(sequence_len=120),
    "the template": lambda rows, sections: sections.update(chat={"template": "llama3"}),
    "the weights": lambda rows, sections: sections.update(seed=7),
    "the discount": lambda rows, sections: sections.update(dpo={"ld_alpha": 0.5}),
    "the precision": lambda rows, sections: sections["model"].update(dtype="bfloat16"),
    "the kernel": lambda rows, sections: sections["model"].update(attention="eager"),
}


def test_what_changes_the_reference_is_scored_anew(tmp_path, pairs, write_rows):
    lines = Path(pairs).read_text(encoding="utf-8").splitlines()
    few = {"train": {"max_steps": 1}, "evaluation": None}
    train(recipe("dpo", tmp_path / "first", [pairs], **few))
    for name, change in CHANGES.items():
        rows, sections = [json.loads(line) for line in lines], {"data": {}, "model": {}}
        change(rows, sections)
        train(recipe("dpo", tmp_path / name, [write_rows(rows, f"{name}.jsonl")], **few, **sections))
        assert not scored(tmp_path / name), name


def test_a_changed_base_is_scored_anew_and_a_damaged_cache_is_not_trusted(tmp_path, pairs):
    few = {"train": {"max_steps": 1}, "evaluation": None}
    train(recipe("dpo", tmp_path / "base", [pairs], **few))
    model = {"base": str(tmp_path / "base" / "final"), "random_init": False}
    for name, seen in (("a", False), ("b", True)):
        train(recipe("dpo", tmp_path / name, [pairs], model=model, **few))
        assert scored(tmp_path / name) is seen
    weights = tmp_path / "base" / "final" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, weights, metadata={"format": "pt"})
    train(recipe("dpo", tmp_path / "c", [pairs], model=model, **few))
    assert not scored(tmp_path / "c")
    for file in (Path(os.environ["NESSO_TUNE_CACHE"]) / "reference").glob("*/reference.safetensors"):
        file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
    with logged() as messages:
        train(recipe("dpo", tmp_path / "d", [pairs], model=model, **few))
    assert not scored(tmp_path / "d")
    assert any("is damaged (reference.safetensors): building it again" in message for message in messages)


def test_a_reference_of_another_model_is_refused(tmp_path, pairs, monkeypatch):
    original = reference_module.compute_reference

    def another(trainer, *rest):
        reference = original(trainer, *rest)
        return {pair: (better - 1.0, worse) for pair, (better, worse) in reference.items()}

    monkeypatch.setattr(reference_module, "compute_reference", another)
    with pytest.raises(NumericalError, match="differs from the reference"):
        train(recipe("dpo", tmp_path / "run", [pairs]))


def test_what_rounding_explains_falls_with_the_length_of_an_answer():
    tokens = torch.tensor([1, 4, 36, 400])
    assert dpo.rounding_limit(tokens, bf16=True).tolist() == pytest.approx([0.12, 0.06, 0.02, 0.02])
    assert dpo.rounding_limit(tokens, bf16=False).tolist() == pytest.approx([1e-4] * 4)
    noise = 0.012 * torch.randn(2000, 400, generator=torch.Generator().manual_seed(0))  # nats, of each token
    for n in tokens.tolist():
        means = noise[:, :n].mean(dim=1).abs()
        assert (means <= dpo.rounding_limit(torch.full((2000,), n), bf16=True)).all()


def test_the_reference_uses_larger_batches_where_a_gpu_has_memory(monkeypatch):
    assert reference_module.tokens_without_gradient(AutoModelForCausalLM.from_config(TINY)) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16 * 2**30, 80 * 2**30))
    tokens = reference_module.tokens_without_gradient(AutoModelForCausalLM.from_config(TINY))
    assert tokens == 2**30 // (8 * TINY.hidden_size + 3 * TINY.intermediate_size)
    sizes = [50, 400, 30, 300, 20]
    assert reference_module.length_sorted_batches(sizes, 1) == [[1], [3, 0, 2, 4]]
    assert reference_module.length_sorted_batches(sizes, 1, 750) == [[1, 3, 0], [2, 4]]
    assert reference_module.length_sorted_batches(sizes, 1, 10**6) == [[1, 3, 0, 2, 4]]


def test_validation_pairs_from_a_file_of_their_own_have_their_own_reference(tmp_path, pairs, write_rows):
    rows = [{"prompt": f"Domanda {i}?", "chosen": "Sì, certo.", "rejected": "No.", "lang": "it"} for i in range(5)]
    held = write_rows(rows, "held.jsonl")
    data = {"validation_sources": [{"path": held}], "validation_size": 0.01}
    train(recipe("dpo", tmp_path / "run", [pairs], data=data, train={"learning_rate": 1e-9}))
    evaluations = [line for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert evaluations[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-4), "the policy has hardly moved"
    assert evaluations[0]["eval_logps/chosen"] < 0


def test_lora_starts_from_its_base(tmp_path, pairs):
    train(recipe("dpo", tmp_path / "base", [pairs], train={"max_steps": 1}, evaluation=None))
    model = {"base": str(tmp_path / "base" / "final"), "random_init": False, "adapter": {"type": "lora", "r": 4}}
    some = recipe(
        "dpo", tmp_path / "run", [pairs], model=model, dpo={"loss": {"sigmoid": 1.0}}, train={"learning_rate": 1e-2}
    )
    train(some)
    losses = steps(tmp_path / "run")
    assert losses[1] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[4] != pytest.approx(math.log(2), abs=1e-4)
    before, after = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("base", "run"))
    assert set(before) == set(after)
    save_file(after, tmp_path / "whole.safetensors")  # plain tensors, no adapter left

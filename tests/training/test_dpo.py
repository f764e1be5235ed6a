"""The DPO step: TRL's numbers, the reference that the run starts from, and figures by language."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from nesso_tune import NumericalError, RunEnvironmentError
from nesso_tune.run import train
from nesso_tune.training import dpo, fit
from nesso_tune.training.dpo import PairTrainer, answer_log_probs
from nesso_tune.training.reference import load_reference
from tests.support.runs import metrics, recipe, steps


@pytest.fixture
def batches(monkeypatch):
    """(trainer, outputs, inputs, TRL's loss) of every micro batch of a test's runs."""
    seen = []
    original = PairTrainer._compute_loss

    def watched(self, model, inputs, return_outputs):
        kept = {}

        def keeping(*arguments):
            kept["arguments"] = arguments

        add = dpo.add_pair_losses
        monkeypatch.setattr(dpo, "add_pair_losses", lambda *a: (keeping(*a), add(*a)))
        loss = original(self, model, inputs, return_outputs)
        monkeypatch.setattr(dpo, "add_pair_losses", add)
        trainer, _, outputs, sub_inputs, languages = kept["arguments"]
        seen.append((trainer, outputs, sub_inputs, languages, loss.detach()))
        return loss

    monkeypatch.setattr(PairTrainer, "_compute_loss", watched)
    return seen


def test_first_loss_is_ln_2_and_every_log_ratio_is_zero(tmp_path, pairs):
    train(recipe("dpo", tmp_path / "run", [pairs], dpo={"loss": {"sigmoid": 1.0}}))
    first = next(line for line in metrics(tmp_path / "run") if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    "section",
    [
        {"loss": {"sigmoid": 1.0}},
        {"loss": {"sigmoid": 1.0, "sft": 0.2}},
        {"loss": {"ipo": 1.0}},
        {"loss": {"hinge": 1.0}},
        {"loss": {"robust": 1.0}, "label_smoothing": 0.1},
        {"loss": {"sigmoid_norm": 1.0}, "beta": 5.0},
        {"loss": {"apo_zero": 1.0}},
        {"loss": {"sigmoid": 1.0}, "ld_alpha": 0.5},
    ],
    ids=lambda s: "+".join(s["loss"]) + ("+ld" if "ld_alpha" in s else ""),
)
def test_figures_of_all_pairs_are_trls(tmp_path, pairs, batches, section):
    """Our way to a language's loss, taken over all pairs of a batch, is TRL's loss of the batch."""
    rates = {"learning_rate": 1e-2, "max_steps": 3, "micro_batch_size": 4}
    train(recipe("dpo", tmp_path / "run", [pairs], dpo=section, train=rates, evaluation=None))
    assert len(batches) == 3
    for trainer, outputs, inputs, languages, loss in batches:
        rows = torch.arange(len(languages))
        values = dpo.pair_metrics(trainer, outputs, inputs, rows, torch.cat([rows, rows + len(rows)]))
        assert float(values["loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert float(batches[2][-1]) != pytest.approx(float(batches[0][-1]), rel=1e-4), "the policy has moved"


def test_sigmoid_loss_equals_its_closed_form_in_float64(tmp_path, pairs, batches):
    """-log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)), Rafailov et al. 2023, eq. 7."""
    section = {"loss": {"sigmoid": 1.0}, "beta": 0.3}
    rates = {"learning_rate": 1e-2, "max_steps": 3, "micro_batch_size": 4}
    train(recipe("dpo", tmp_path / "run", [pairs], dpo=section, train=rates, evaluation=None))
    for _, outputs, inputs, _, loss in batches:
        sums = (outputs.log_probs.double() * inputs["completion_mask"][:, 1:]).sum(dim=1)
        chosen, rejected = sums.chunk(2)
        gap = (chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"])
        wanted = -functional.logsigmoid(0.3 * gap.detach()).mean()
        assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


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


def test_accumulation_changes_nothing(tmp_path, pairs):
    losses = []
    for micro, accumulation in ((4, 1), (2, 2), (1, 4)):
        out = tmp_path / f"{micro}"
        batch = {"max_steps": 3, "micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        train(recipe("dpo", out, [pairs], train=batch, evaluation=None))
        losses.append(steps(out))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-5)


def test_training_prefers_the_chosen(tmp_path, pairs):
    rates = {"max_steps": 30, "micro_batch_size": 8, "learning_rate": 3e-3}
    train(recipe("dpo", tmp_path / "run", [pairs], train=rates, data={"validation_size": 0}, evaluation=None))
    margins = steps(tmp_path / "run", "rewards/margins")
    assert margins[30] > 1.0


def test_the_reference_is_the_start_also_after_a_resume(tmp_path, pairs):
    some = recipe("dpo", tmp_path / "run", [pairs], train={"learning_rate": 1e-2})
    train(some)
    run = tmp_path / "run"
    fingerprint = __import__("json").loads((run / "manifest.json").read_text())["start"]
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


def test_a_reference_of_another_model_is_refused(tmp_path, pairs, monkeypatch):
    original = fit.compute_reference

    def another(trainer, *rest):
        reference = original(trainer, *rest)
        return {pair: (better - 1.0, worse) for pair, (better, worse) in reference.items()}

    monkeypatch.setattr(fit, "compute_reference", another)
    with pytest.raises(NumericalError, match="differs from its reference"):
        train(recipe("dpo", tmp_path / "run", [pairs]))


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

"""NaN, infinity and spikes are detected before the update, on all processes, and the rows at fault are named."""

import json
import logging
import math
from collections import deque

import pytest
import torch
from safetensors.torch import load_file, save_file

from nesso_tune import ModelError, NumericalError
from nesso_tune.run import train
from nesso_tune.runs.checkpoint import checkpoints, read_manifest
from nesso_tune.training.callbacks import IntervalCallback
from nesso_tune.training.dpo import PairTrainer
from nesso_tune.training.evaluator import Evaluator
from nesso_tune.training.numerical_checks import DEVIATIONS, MIN_STEPS, WINDOW, SpikeGuard, check_final
from nesso_tune.training.sft import ConversationTrainer
from tests.support.logs import logged
from tests.support.runs import main_here, metrics, recipe, several, steps, thorough, write_recipe

TRAINERS = {"sft": ConversationTrainer, "dpo": PairTrainer}


@pytest.fixture
def poison(monkeypatch):
    """Multiplies the loss of one micro batch of an optimizer step by a factor."""

    def give(method, step, factor, micro_batch=0):
        kind, seen = TRAINERS[method], []
        original = kind.compute_loss

        def wrong(self, *arguments, **options):
            loss = original(self, *arguments, **options)
            if self.state.global_step + 1 == step:
                seen.append(step)
                if len(seen) == micro_batch + 1:
                    return loss * factor
            return loss

        monkeypatch.setattr(kind, "compute_loss", wrong)

    return give


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(tmp_path, request, poison, capsys, method, factor):
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    data = {"packing": False} if method == "sft" else {}
    some = recipe(method, tmp_path / "run", [source], data=data, train={"gradient_accumulation_steps": 2})
    poison(method, 4, factor, micro_batch=1)
    code, _, said = main_here(capsys, "train", write_recipe(tmp_path / "r.yaml", some))
    assert code == 6
    assert "step 4: the loss is " in said
    assert "update not applied" in said
    assert "checkpoint-2 is intact" in said
    assert "Traceback" not in said
    assert checkpoints(tmp_path / "run")[0].name == "checkpoint-2"
    read_manifest(tmp_path / "run" / "checkpoint-2")
    (event,) = [line for line in metrics(tmp_path / "run") if line.get("event") == "not_finite"]
    assert event["step"] == 4
    assert event["values"]["loss"] in ("nan", "inf", "-inf")
    assert len(event["rows"]) == 2, "those of one micro batch of two rows, not of the step"
    assert all(row.startswith(f"{source}:") for row in event["rows"])
    assert not (tmp_path / "run" / "final").exists()
    assert all(math.isfinite(loss) and loss > 0 for loss in steps(tmp_path / "run").values())


def test_the_rows_that_are_named_are_those_that_were_trained(tmp_path, poison, write_rows):
    """One row in another language among many: its loss is the one that goes wrong."""
    rows = [{"prompt": f"Quanto fa {i}?", "response": f"Fa {i}.", "lang": "it"} for i in range(30)]
    rows[17] = {"prompt": "What is it?", "response": "Seventeen.", "lang": "en"}
    source = write_rows([{"prompt": "", "response": "", "lang": "it"}, *rows])  # the first one is dropped
    some = recipe("sft", tmp_path / "run", [source], data={"packing": False, "validation_size": 0},
                  train={"max_steps": None, "num_epochs": 1.0}, evaluation=None)  # fmt: skip
    original, seen = ConversationTrainer.compute_loss, []

    def wrong(self, model, inputs, *arguments, **options):
        english = self.run_state.metrics.groups.languages.index("en")
        bad = bool((inputs["group_ids"][:, :5] == english).any(dim=1).any())
        loss = original(self, model, inputs, *arguments, **options)
        seen.append(bad)
        return loss * math.nan if bad else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConversationTrainer, "compute_loss", wrong)
        with pytest.raises(NumericalError):
            train(some)
    (event,) = [line for line in metrics(tmp_path / "run") if line.get("event") == "not_finite"]
    assert f"{source}:19" in event["rows"], "the 18th row, after one that was dropped"
    assert event["step"] == len(seen)


def test_a_gradient_that_is_not_finite_names_all_rows_of_its_step(tmp_path, talks, monkeypatch):
    original = ConversationTrainer.training_step

    def wrong(self, model, *arguments, **options):
        loss = original(self, model, *arguments, **options)
        if self.state.global_step == 2:
            next(iter(model.parameters())).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(ConversationTrainer, "training_step", wrong)
    some = recipe("sft", tmp_path / "run", [talks], data={"packing": False}, train={"gradient_accumulation_steps": 3})
    with pytest.raises(NumericalError, match=r"step 3: the gradient norm is nan.*talks\.jsonl:\d+.* and 3 more"):
        train(some)
    (event,) = [line for line in metrics(tmp_path / "run") if line.get("event") == "not_finite"]
    assert len(event["rows"]) == 6


def test_after_a_nan_the_run_goes_on_to_the_bit(tmp_path, talks, poison):
    whole, broken = (recipe("sft", tmp_path / name, [talks], train={"max_steps": 6}) for name in ("whole", "broken"))
    train(whole)
    with pytest.MonkeyPatch.context():
        poison("sft", 4, math.nan)
        with pytest.raises(NumericalError):
            train(broken)
    poison("sft", 0, 1.0)
    a, b = (load_file(train(some).model_dir / "model.safetensors") for some in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert steps(tmp_path / "broken") == steps(tmp_path / "whole")


def test_one_of_two_processes_finds_it_and_both_stop(tmp_path, talks):
    rank = 1
    some = recipe("sft", tmp_path / "run", [talks], data={"packing": False}, train={"micro_batch_size": 1})
    done = several("train", write_recipe(tmp_path / "r.yaml", some), module="tests.support.poisoned",
                   NAN_AT_STEP="3", NAN_AT_RANK=str(rank))  # fmt: skip
    assert done.stderr.count("step 3: the loss is nan") == 1, done.stderr
    assert "checkpoint-2 is intact" in done.stderr
    (event,) = [line for line in metrics(tmp_path / "run") if line.get("event") == "not_finite"]
    assert len(event["rows"]) == 1
    position = 2 * 2 + rank
    assert event["rows"] == named(some, position)


def named(some, position):
    from nesso_tune.data.prepare import prepare_data

    stream = prepare_data(some).stream
    epoch, row = stream.locate(position)
    return list(map(stream.documents.location, stream.epoch(epoch).members(row)))


LONG = {"max_steps": MIN_STEPS + 8, "learning_rate": 1e-4}
QUIET = {"evaluation": None, "checkpoint": {"every_steps": MIN_STEPS + 2}}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_spike_is_said_and_the_run_goes_on(tmp_path, request, poison, method):
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    poison(method, MIN_STEPS + 5, 20.0 if method == "sft" else 500.0)
    with logged(logging.WARNING) as warnings:
        assert train(recipe(method, tmp_path / "run", [source], train=LONG, **QUIET)).trained
    (event,) = [line for line in metrics(tmp_path / "run") if line.get("event") == "spike"]
    assert (event["step"], event["action"]) == (MIN_STEPS + 5, "warn")
    assert event["values"]["loss"] > event["limits"]["loss"]
    assert event["rows"][0].startswith(source)
    assert any(f"step {MIN_STEPS + 5}: loss " in warning for warning in warnings)


def test_a_skipped_spike_changes_no_weight_and_survives_a_resume(tmp_path, talks, poison):
    """The run that is continued knows what was usual before it stopped: it skips the same step."""
    at = MIN_STEPS + 5
    sections = {"train": {**LONG, "on_spike": "skip"}, **QUIET, "checkpoint": {"every_steps": 1, "keep": 60}}
    poison("sft", at, 20.0)
    run = tmp_path / "run"
    train(recipe("sft", run, [talks], **sections))
    before, after, last = (load_file(run / f"checkpoint-{n}" / "model.safetensors") for n in (at - 1, at, at + 1))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], last[name]) for name in after)
    first = load_file(run / "final" / "model.safetensors")
    poison("sft", 0, 1.0)
    poison("sft", at, 20.0)
    train(recipe("sft", run, [talks], **sections), resume="auto")  # finished: nothing happens
    for folder in (run / "final").iterdir():
        folder.unlink()
    train(recipe("sft", run, [talks], **sections), resume=str(run / f"checkpoint-{at - 2}"))
    again = load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    (event,) = [line for line in metrics(run) if line.get("event") == "spike"]
    assert (event["step"], event["action"]) == (at, "skip")


def test_a_spike_that_should_stop_the_run_stops_it(tmp_path, talks, poison):
    poison("sft", MIN_STEPS + 5, 20.0)
    some = recipe("sft", tmp_path / "run", [talks], train={**LONG, "on_spike": "stop"}, **QUIET)
    message = rf"step {MIN_STEPS + 5}: loss .* spike over .*checkpoint-{MIN_STEPS + 2} is intact"
    with pytest.raises(NumericalError, match=message):
        train(some)


def spikes(values):
    """Steps at which a guard finds a spike of the loss, the norm being constant."""
    guard = SpikeGuard("warn", None, None)
    return [i for i, value in enumerate(values) if "loss" in guard._find_spikes({"loss": value, "grad_norm": 1.0})]


def test_noise_and_a_falling_loss_are_no_spikes():
    noise = torch.Generator().manual_seed(0)
    falling = [5 * math.exp(-i / 400) + float(torch.randn(1, generator=noise)) * 0.2 for i in range(5000)]
    assert spikes(falling) == []
    assert spikes([0.001] * 200 + [0.04]) == [], "a model that knows its data by heart"


def test_a_level_that_stays_becomes_the_usual():
    found = spikes([1.0] * 200 + [3.0] * 200)
    assert found[0] == 200
    assert len(found) <= 4


def test_the_limit_is_mean_and_deviations_of_the_window():
    values = [1.0 + 0.3 * (i % 2) for i in range(WINDOW + 20)]
    last = deque(values, maxlen=WINDOW)
    mean = sum(last) / WINDOW
    deviation = math.sqrt(sum((v - mean) ** 2 for v in last) / WINDOW)
    limit = mean + DEVIATIONS * deviation
    assert spikes([*values, limit - 1e-6]) == []
    assert spikes([*values, limit + 1e-6]) == [WINDOW + 20]


def test_a_base_that_holds_nan_is_refused(tmp_path, talks, whole_base):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(whole_base, base)
    weights = load_file(base / "model.safetensors")
    name = sorted(weights)[-1]
    weights[name].view(-1)[7] = math.inf
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    some = recipe("sft", tmp_path / "run", [talks], model={"base": str(base), "random_init": False})
    with pytest.raises(ModelError, match=f"{name} contains NaN or infinity"):
        train(some)


def test_nothing_is_written_as_a_number_that_is_none(tmp_path):
    from nesso_tune.runs.metrics_log import MetricsLog

    log = MetricsLog(tmp_path / "m.jsonl", True)
    log.write({"step": 1, "loss": math.nan, "limits": [math.inf]})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": "nan", "limits": ["inf"]}


@pytest.fixture
def poison_file(monkeypatch):
    """Puts a value into the last row of the first trained weight, or of a moment of it, after a step."""
    original, at = IntervalCallback.on_step_end, {}

    def poisoned(self, args, state, control, model=None, optimizer=None, **more):
        if state.global_step == at.get("step"):
            weight = next(weight for weight in model.parameters() if weight.requires_grad)
            found = weight.data if at["moment"] is None else optimizer.optimizer.state[weight][at["moment"]]
            found[-1] = at["value"]
        return original(self, args, state, control, model=model, optimizer=optimizer, **more)

    monkeypatch.setattr(IntervalCallback, "on_step_end", poisoned)
    return lambda step, value=0.0, moment=None: at.update(step=step, value=value, moment=moment)


@pytest.mark.parametrize("evaluation", [None, {"every_steps": 1, "samples": 2}], ids=["", "evaluated"])
def test_after_the_last_update(tmp_path, talks, capsys, evaluation):
    """A decay beyond float32: loss and gradient of the only step are fine, and no loss comes after it."""
    some = recipe("sft", tmp_path / "run", [talks], evaluation=evaluation,
                  train={"max_steps": 1, "learning_rate": 1.0, "weight_decay": 1e39})  # fmt: skip
    code, _, said = main_here(capsys, "train", write_recipe(tmp_path / "r.yaml", some))
    assert code == 6, said
    assert "step 1: " in said
    assert "values are not finite (first in model.embed_tokens.weight) after the update" in said
    assert "no checkpoint was saved yet" in said
    (event,) = [line for line in metrics(tmp_path / "run") if line.get("event") == "not_finite"]
    assert event["values"]["model.embed_tokens.weight"] > 1000
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize(
    ("value", "moment", "adapter"),
    [
        (math.nan, None, None),
        pytest.param(math.inf, None, {"type": "lora", "r": 4}, marks=thorough),
        (-math.inf, "exp_avg_sq", {"type": "lora", "r": 4}),
    ],
    ids=["weights", "adapter", "moments of an adapter"],
)
def test_a_checkpoint_is_never_poisoned(tmp_path, talks, whole_base, capsys, poison_file, value, moment, adapter):
    """Undone, the run continues from the checkpoint before."""
    model = {"base": whole_base, "random_init": False, "adapter": adapter}
    some = recipe("sft", tmp_path / "run", [talks], model=model, evaluation=None, checkpoint={"every_steps": 1})
    path = write_recipe(tmp_path / "r.yaml", some)
    poison_file(3, value, moment)
    code, _, said = main_here(capsys, "train", path)
    assert code == 6, said
    assert "step 3: " in said
    assert f"192 values are not finite (first in {'' if moment is None else f'{moment} of '}" in said
    assert "checkpoint-2 is intact, the same command continues from it" in said
    assert [saved.name for saved in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-1"]
    read_manifest(tmp_path / "run" / "checkpoint-2")
    assert not (tmp_path / "run" / "final").exists()
    poison_file(None)
    assert main_here(capsys, "train", path)[0] == 0


def test_an_evaluation_that_is_not_finite(tmp_path, talks, capsys, monkeypatch):
    """Of finite weights: it is named with its step, and no best weights are taken from it."""
    original = Evaluator.__call__

    def wrong(self, trainer):
        found = original(self, trainer)
        return found | ({"eval_loss": math.inf} if trainer.state.global_step == 4 else {})

    monkeypatch.setattr(Evaluator, "__call__", wrong)
    some = recipe("sft", tmp_path / "run", [talks], train={"best_metric": "eval_loss"})
    code, _, said = main_here(capsys, "train", write_recipe(tmp_path / "r.yaml", some))
    assert code == 6, said
    assert "step 4: eval_loss is inf, but the weights are finite; inspect the validation rows" in said
    assert "checkpoint-2 is intact" in said
    assert metrics(tmp_path / "run")[-1]["eval_loss"] == "inf"
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (math.nan, "float32", r"step 7: 2 values are not finite \(first in b\); final/ is not written"),
        (
            3.4e38,
            "bfloat16",
            r"2 values are not finite \(first in b\) in bfloat16 because .*; set model.dtype: float32",
        ),
        (3.4e38, "float32", None),
        (3.3e38, "bfloat16", None),
    ],
)
def test_final_in_the_precision_that_is_saved(value, dtype, said):
    weights = {"a": torch.zeros(3), "b": torch.tensor([1.0, value, value, value - value if said is None else 0.0])}
    if said is None:
        check_final(weights, dtype, 7)
    else:
        with pytest.raises(NumericalError, match=said):
            check_final(weights, dtype, 7)


def test_nothing_is_published_that_is_not_finite(tmp_path, talks, monkeypatch):
    """Weights that the checkpoint's check has passed, and that their merge, or what comes after it, has spoiled."""
    monkeypatch.setattr(
        "nesso_tune.run.gather_final_model", lambda trained, model, *_: (model, {"w": torch.tensor(math.nan)})
    )
    with pytest.raises(NumericalError, match=r"step 4: 1 values are not finite \(first in w\); final/ is not written"):
        train(recipe("sft", tmp_path / "run", [talks], evaluation=None))
    assert checkpoints(tmp_path / "run")[0].name == "checkpoint-4"
    assert not (tmp_path / "run" / "final").exists()


@thorough
@pytest.mark.parametrize("fsdp", ["none", "full_shard"])
def test_on_two_processes_both_stop(tmp_path, talks, fsdp):
    some = recipe("sft", tmp_path / "run", [talks], evaluation=None, distributed={"fsdp": fsdp},
                  checkpoint={"every_steps": 1}, train={"micro_batch_size": 1})  # fmt: skip
    done = several("train", write_recipe(tmp_path / "r.yaml", some), module="tests.support.poisoned",
                   NAN_AT_STEP="3", NAN_AT_RANK="1", NAN_IN="weights")  # fmt: skip
    assert done.stderr.count("step 3: 192 values are not finite (first in model.embed_tokens.weight)") == 1, done.stderr
    assert "checkpoint-2 is intact" in done.stderr
    assert checkpoints(tmp_path / "run")[0].name == "checkpoint-2"

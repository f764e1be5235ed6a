"""Weights, moments and evaluations that are not finite end a run with 6, before they are saved or published."""

import math

import pytest
import torch

from nesso_tune import NumericalError
from nesso_tune.run import train
from nesso_tune.training.checkpoint import checkpoints, read_manifest
from nesso_tune.training.evaluation import Evaluator
from nesso_tune.training.finite import check_final
from nesso_tune.training.pace import Pace
from tests.support.runs import main_here, metrics, recipe, several, thorough, write_recipe


@pytest.fixture
def poison(monkeypatch):
    """Puts a value into the last row of the first trained weight, or of a moment of it, after a step."""
    original, at = Pace.on_step_end, {}

    def poisoned(self, args, state, control, model=None, optimizer=None, **more):
        if state.global_step == at.get("step"):
            weight = next(weight for weight in model.parameters() if weight.requires_grad)
            found = weight.data if at["moment"] is None else optimizer.optimizer.state[weight][at["moment"]]
            found[-1] = at["value"]
        return original(self, args, state, control, model=model, optimizer=optimizer, **more)

    monkeypatch.setattr(Pace, "on_step_end", poisoned)
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
    assert "nothing had been saved yet" in said
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
def test_a_checkpoint_is_never_poisoned(tmp_path, talks, whole_base, capsys, poison, value, moment, adapter):
    """Undone, the run continues from the checkpoint before."""
    model = {"base": whole_base, "random_init": False, "adapter": adapter}
    some = recipe("sft", tmp_path / "run", [talks], model=model, evaluation=None, checkpoint={"every_steps": 1})
    path = write_recipe(tmp_path / "r.yaml", some)
    poison(3, value, moment)
    code, _, said = main_here(capsys, "train", path)
    assert code == 6, said
    assert "step 3: " in said
    assert f"192 values are not finite (first in {'' if moment is None else f'{moment} of '}" in said
    assert "checkpoint-2 is intact, the same command continues from it" in said
    assert [saved.name for saved in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-1"]
    read_manifest(tmp_path / "run" / "checkpoint-2")
    assert not (tmp_path / "run" / "final").exists()
    poison(None)
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
    assert "step 4: eval_loss is inf, of finite weights; look at the validation rows" in said
    assert "checkpoint-2 is intact" in said
    assert metrics(tmp_path / "run")[-1]["eval_loss"] == "inf"
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (math.nan, "float32", r"step 7: 2 values are not finite \(first in b\); final/ is not written"),
        (3.4e38, "bfloat16", r"2 values are not finite \(first in b\) in bfloat16, which .*; set model.dtype: float32"),
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
    monkeypatch.setattr("nesso_tune.run.whole_model", lambda trained, model, *_: (model, {"w": torch.tensor(math.nan)}))
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

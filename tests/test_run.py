"""Steps and epochs in card, report, metrics and plan are those that were trained."""

import os
import re
import shutil
import signal

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from nesso_tune import Preempted, RecipeError, run
from nesso_tune.data.prepare import prepare_data
from nesso_tune.planning.planner import make_plan
from nesso_tune.run import train
from nesso_tune.runs.checkpoint import checkpoints
from tests.support.logs import logged
from tests.support.runs import metrics, recipe, steps, sums, thorough

TEN = {"packing": False, "validation_size": 2}  # rows to train on


@pytest.fixture
def rows(tmp_path):
    return sums(tmp_path)


def said_of(run):
    """What the card says of steps, rows and epochs, in a line, and the whole report."""
    card = (run / "final" / "README.md").read_text()
    rows = dict(re.findall(r"^\| (Optimizer steps|Rows per step|Epochs) \| (.*?) \|$", card, re.MULTILINE))
    line = f"- {rows['Optimizer steps']} steps of {rows['Rows per step']} rows, {rows['Epochs']} epochs"
    return line, (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("plan", "batch", "made", "epochs"),
    [
        ({"num_epochs": 1.0}, 32, 1, "3.2"),
        pytest.param({"num_epochs": 1.5}, 8, 2, "1.6", marks=thorough),
        pytest.param({"max_steps": 3}, 4, 3, "1.2", marks=thorough),
    ],
)
def test_epochs_are_steps_times_batch_by_rows(tmp_path, rows, plan, batch, made, epochs):
    some = recipe("sft", tmp_path / "run", [rows], data=TEN, evaluation=None,
                  train={"max_steps": None, "global_batch_size": batch, **plan})  # fmt: skip
    with logged() as said:
        train(some)
    assert make_plan(some, volume=prepare_data(some).volume).epochs == pytest.approx(float(epochs))
    assert steps(tmp_path / "run", "epoch")[made] == pytest.approx(float(epochs))
    card, report = said_of(tmp_path / "run")
    assert card == f"- {made} steps of {batch} rows, {epochs} epochs"
    assert f"{made} steps of {batch} rows, {epochs} epochs" in report
    told = [text for text in said if "whole step(s)" in text]
    assert told == (
        ["1 epoch(s) of 10 rows are rounded up to 3.2 by 1 whole step(s) of 32 rows: lower train.global_batch_size"]
        if batch == 32
        else []
    )


def test_a_run_that_stopped_early(tmp_path, rows):
    """Each evaluation is worse than the one before: it ends at the third of eight."""
    plan = {"max_steps": 8, "learning_rate": 1.0, "best_metric": "eval_loss", "early_stopping_patience": 2}
    some = recipe("sft", tmp_path / "run", [rows], data=TEN, train=plan, checkpoint={"every_steps": 8},
                  evaluation={"every_steps": 1, "samples": 0})  # fmt: skip
    train(some)
    last = max(steps(tmp_path / "run"))
    assert last < 8
    (stopped,) = [line for line in metrics(tmp_path / "run") if line.get("event") == "early_stopped"]
    assert stopped["step"] == last
    card, report = said_of(tmp_path / "run")
    assert card == f"- {last} steps of 2 rows, {last * 2 / 10:.3g} epochs"
    assert card.removeprefix("- ") in report


@pytest.mark.parametrize(("key", "whole", "short", "exact"), [("max_steps", 6, 3, 4), ("num_epochs", 1.2, 0.6, 0.8)])
def test_an_end_before_the_checkpoint_is_refused(tmp_path, rows, key, whole, short, exact):
    """An end exactly at the checkpoint is accepted."""

    def ending(end):
        return recipe("sft", tmp_path / "run", [rows], data=TEN, evaluation=None,
                      train={"max_steps": None, key: end})  # fmt: skip

    run, allowed = tmp_path / "run", (f"train.{key}",)
    train(ending(whole))
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-6")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(
        RecipeError, match=rf"train\.{key}: the run ends at step 3 now, but checkpoint-4 is later; raise it, or name"
    ):
        train(ending(short), allow_changes=allowed)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert not (run / "final").exists()
    assert train(ending(exact), allow_changes=allowed).trained
    assert said_of(run)[0] == "- 4 steps of 2 rows, 0.8 epochs"
    shutil.rmtree(run / "final")
    assert train(ending(short), allow_changes=allowed, resume=str(run / "checkpoint-2")).trained
    assert said_of(run)[0] == "- 3 steps of 2 rows, 0.6 epochs"
    assert [saved.name for saved in checkpoints(run)] == ["checkpoint-3", "checkpoint-2"]


class AtStep(TrainerCallback):
    """Sets a flag of the trainer, or does something else, at a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.act(control)


def test_a_callback_ends_the_run_and_without_checkpoints_none_is_saved(tmp_path, rows):
    """The step at which it ends is logged and evaluated as the last one is."""
    some = recipe("sft", tmp_path / "run", [rows], data=TEN, checkpoint=None,
                  evaluation={"every_steps": 4, "samples": 0}, logging={"every_steps": 4})  # fmt: skip
    with logged() as said:
        result = train(some, callbacks=[AtStep(3, lambda control: setattr(control, "should_training_stop", True))])
    assert "stopped early at step 3 of 4: by a callback" in said
    assert list(result.history["eval_loss"].dropna().index) == [3]
    assert checkpoints(tmp_path / "run") == []
    assert result.model_dir.is_dir()
    assert said_of(tmp_path / "run")[0].startswith("- 3 steps of 2 rows")
    assert train(some).trained is False


def test_without_checkpoints_a_stop_request_still_saves_one(tmp_path, rows):
    some = recipe("sft", tmp_path / "run", [rows], data=TEN, checkpoint=None, evaluation=None)
    with pytest.raises(Preempted):
        train(some, callbacks=[AtStep(1, lambda _: os.kill(os.getpid(), signal.SIGTERM))])
    assert [saved.name for saved in checkpoints(tmp_path / "run")] in (["checkpoint-1"], ["checkpoint-2"])
    assert train(some).metrics["step"] == 4


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (AtStep(1, lambda control: setattr(control, "should_evaluate", True)), "evaluation: is null, but a callback"),
        (
            EarlyStoppingCallback,
            "callbacks: EarlyStoppingCallback needs arguments that are not used here; set train.be",
        ),
    ],
)
def test_a_callback_that_cannot_work(tmp_path, rows, callback, message):
    with pytest.raises(RecipeError, match=message):
        train(recipe("sft", tmp_path / "run", [rows], data=TEN, evaluation=None), callbacks=[callback])


def test_metrics_without_answers_are_refused(tmp_path, rows):
    with pytest.raises(RecipeError, match="metrics: need answers, and this recipe generates none"):
        train(recipe("sft", tmp_path / "run", [rows], evaluation=None), metrics={"letters": len})


def test_processes_that_were_given_different_objects_are_refused(tmp_path, rows, monkeypatch):
    some, other = (recipe("sft", tmp_path / "run", [path]) for path in (rows, "/elsewhere/rows.jsonl"))
    monkeypatch.setattr(run, "gather_object", lambda own: own * 2)
    run._check_same_on_ranks(some)
    monkeypatch.setattr(run, "gather_object", lambda own: [other.model_dump_json(), *own])
    with pytest.raises(RecipeError, match="train: process 0 was given another recipe, model or data set") as caught:
        run._check_same_on_ranks(some)
    assert caught.value.on_all_ranks

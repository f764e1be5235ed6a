"""Which evaluation is the best, what is kept for it, and what a recipe may not ask for."""

import json
import math

import pytest

from nesso_tune import RunEnvironmentError
from nesso_tune.recipes.metric_names import better, whole_metric
from nesso_tune.recipes.plan import World
from nesso_tune.recipes.planning import make_plan
from nesso_tune.smoke import smoke_recipe
from nesso_tune.training.best import Best
from nesso_tune.training.checkpoint import MANIFEST, checkpoints, prune
from nesso_tune.training.space import Room
from nesso_tune.training.trainer import own_share
from tests.recipes.texts import SFT, problem
from tests.support.runs import recipe


def some_recipe(folder, rows, **train):
    """Twelve steps, six evaluations."""
    plan = {"max_steps": 12, "best_metric": "eval_loss", **train}
    return recipe("sft", folder, [rows], train=plan, checkpoint={"every_steps": 5, "keep": 1})


@pytest.mark.parametrize(
    ("metric", "values", "taken", "waited"),
    [
        ("eval_loss", [3.0, 2.0, 2.5, 1.0, 4.0], 4, 1),
        ("eval_loss", [2.0, 2.0, 2.0], 1, 2),
        ("eval_loss/it", [math.nan, 5.0, math.nan], 2, 1),
        ("eval_loss", [math.nan, math.nan], None, 2),
        ("stop_rate", [0.5, 0.75, 0.75, 0.25], 2, 2),
        ("eval_rewards/accuracies/en", [0.5, 0.25, 1.0], 3, 0),
        ("repetition_rate", [0.5, 0.25, 1.0], 2, 1),
        ("train_exact_match", [0.0, 0.0], 1, 1),
    ],
)
def test_which_one_is_the_best(metric, values, taken, waited):
    """Only a better one counts; the first of equals is taken. What goes through a file comes back."""
    best = Best(metric)
    for step, value in enumerate(values, start=1):
        again = Best(metric)
        again.restore(json.loads(json.dumps(best.state())))
        best = again
        assert best.note(step, {metric: value, "answers": 1}) == (best.step == step)
    assert (best.step, best.waited) == (taken, waited)


def test_patience_and_another_metric():
    best = Best("eval_loss", patience=2)
    for step, loss in enumerate([1.0, 2.0], start=1):
        best.note(step, {"eval_loss": loss})
        assert not best.out_of_patience
    best.note(3, {"eval_loss": 3.0})
    assert best.out_of_patience
    other = Best("stop_rate", patience=2)
    other.restore(best.state())
    assert (other.step, other.value, other.waited) == (None, None, 0)


def test_on_another_number_of_processes_it_is_the_same(tmp_path):
    found = Best("eval_loss", 3, 20, 1.5, 1).state()
    for rank in (0, 1):
        counts = {"tokens": 5, "supervised_tokens": 2, "seconds": 1.0, "tally": [[[1.0, 2.0]]], "best": found}
        (tmp_path / f"counters-{rank}.json").write_text(json.dumps(counts))
    for rank, processes in ((0, 2), (1, 2), (0, 1), (3, 4)):
        assert own_share(tmp_path, rank, processes)["best"] == found


@pytest.mark.parametrize(
    ("name", "whole_name", "way"),
    [
        ("eval_loss/it", "eval_loss", "lower"), ("eval_loss/source/a/b.jsonl", "eval_loss", "lower"),
        ("train_stop_rate/it", "train_stop_rate", "higher"), ("language_fidelity", "language_fidelity", "higher"),
        ("eval_rewards/margins/en", "eval_rewards/margins", "higher"), ("train_eval_loss", None, None),
        ("loss", None, None), ("eval_losses", None, None), ("eval_logps/chosen", None, None),
    ],
)  # fmt: skip
def test_which_way_is_better(name, whole_name, way):
    assert (whole_metric(name), better(name)) == (whole_name, way)


def test_pruning_spares_the_best_that_a_kept_checkpoint_knows(tmp_path):
    """Whichever is continued from, the one before a damaged one too, its best weights are there."""
    for step, best in ((2, 2), (4, 2), (6, 6), (8, 6), (10, 6)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / MANIFEST).write_text(json.dumps({"step": step, "best": {"step": best}}))
    for keep, left in ((4, [10, 8, 6, 4, 2]), (2, [10, 8, 6]), (1, [10, 6])):
        prune(tmp_path, keep, tmp_path / "checkpoint-10")
        assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left], keep


def test_room_is_asked_for_what_the_best_takes(tmp_path, talks):
    """One more is kept, and every evaluation may save."""
    plan = make_plan(some_recipe(tmp_path / "run", talks))
    room = Room(tmp_path, checkpoint=1 << 50, final=0)
    with pytest.raises(RunEnvironmentError, match=r"2 more checkpoint\(s\)"):
        room.check_run(plan, 0, 1)
    with pytest.raises(RunEnvironmentError, match=r"3 more checkpoint\(s\)"):
        room.check_run(plan, 0, 1, best=True)
    with pytest.raises(RunEnvironmentError, match=r"1 more checkpoint\(s\)"):
        room.check_run(plan, 10, 1, best=False)


def test_advice_on_patience_that_never_ends(tmp_path, talks):
    def advice(patience):
        some = some_recipe(tmp_path / "run", talks, early_stopping_patience=patience)
        return " / ".join(make_plan(some, World()).advice)

    assert "early_stopping_patience" not in advice(4)
    assert "early_stopping_patience: 5 cannot end a run of 6 evaluation(s)" in advice(5)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("metric_for_best_model: eval_loss", "it is called `train.best_metric` here"),
        ("load_best_model_at_end: true", "it is called `train.best_metric` here"),
        ("early_stopping: 3", "it is called `train.early_stopping_patience` here"),
        ("early_stopping_patience: 3", "it belongs to `train.early_stopping_patience`"),
        ("greater_is_better: true", "the name of train.best_metric says which way is better"),
    ],
)
def test_what_other_tools_call_it(key, says):
    assert says in problem(f"{SFT}{key}\n")


def test_a_smoke_run_looks_for_the_best_over_all_languages(tmp_path, talks):
    some = some_recipe(tmp_path / "run", talks, best_metric="eval_loss/fr", early_stopping_patience=3)
    small = smoke_recipe(some, {}, lambda _: None)
    assert (small.train.best_metric, small.train.early_stopping_patience) == ("eval_loss", 3)

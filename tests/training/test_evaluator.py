"""Which evaluation is the best, what is kept for it, and what a recipe may not ask for."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from nesso_tune import NumericalError, RecipeError, RunEnvironmentError, run
from nesso_tune.data.packing import Rows
from nesso_tune.metric_registry import better_direction, overall_metric
from nesso_tune.model.adapters import adapt
from nesso_tune.planning.plan import World
from nesso_tune.planning.planner import make_plan
from nesso_tune.run import train
from nesso_tune.runs.checkpoint import MANIFEST, WEIGHTS, checkpoints, prune
from nesso_tune.runs.disk_space import DiskSpace
from nesso_tune.smoke import smoke_recipe
from nesso_tune.training.checkpoint import read_run_state
from nesso_tune.training.evaluator import BestCheckpoint, best_checkpoint_for
from nesso_tune.training.grouped_metrics import MetricSpec
from nesso_tune.training.sft import ConversationTrainer
from nesso_tune.training.state_dict import get_weights, load_shards, set_weights
from tests.support.logs import logged, without_steps
from tests.support.recipe_texts import SFT, problem
from tests.support.runs import (
    loaded,
    main_here,
    metrics,
    recipe,
    several,
    steps,
    sums,
    thorough,
    write_recipe,
)
from tests.test_kill import kill_at, start


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
    best = BestCheckpoint(metric)
    for step, value in enumerate(values, start=1):
        again = BestCheckpoint(metric)
        again.load_state_dict(json.loads(json.dumps(best.state_dict())))
        best = again
        assert best.update(step, {metric: value, "answers": 1}) == (best.step == step)
    assert (best.step, best.waited) == (taken, waited)


def test_patience_and_another_metric():
    best = BestCheckpoint("eval_loss", patience=2)
    for step, loss in enumerate([1.0, 2.0], start=1):
        best.update(step, {"eval_loss": loss})
        assert not best.out_of_patience
    best.update(3, {"eval_loss": 3.0})
    assert best.out_of_patience
    other = BestCheckpoint("stop_rate", patience=2)
    other.load_state_dict(best.state_dict())
    assert (other.step, other.value, other.waited) == (None, None, 0)


def test_on_another_number_of_processes_it_is_the_same(tmp_path):
    found = BestCheckpoint("eval_loss", 3, 20, 1.5, 1).state_dict()
    for rank in (0, 1):
        counts = {"tokens": 5, "supervised_tokens": 2, "seconds": 1.0, "tally": [[[1.0, 2.0]]], "best": found}
        (tmp_path / f"counters-{rank}.json").write_text(json.dumps(counts))
    for rank, processes in ((0, 2), (1, 2), (0, 1), (3, 4)):
        assert read_run_state(tmp_path, rank, processes)["best"] == found


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
    assert (overall_metric(name), better_direction(name)) == (whole_name, way)


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
    room = DiskSpace(tmp_path, checkpoint=1 << 50, final=0)
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
        ("greater_is_better: true", "train.best_metric determines the direction"),
    ],
)
def test_what_other_tools_call_it(key, says):
    assert says in problem(f"{SFT}{key}\n")


def test_a_smoke_run_looks_for_the_best_over_all_languages(tmp_path, talks):
    some = some_recipe(tmp_path / "run", talks, best_metric="eval_loss/fr", early_stopping_patience=3)
    small = smoke_recipe(some, {})
    assert (small.train.best_metric, small.train.early_stopping_patience) == ("eval_loss", 3)


# Eight rows learned by heart at a high rate: the loss on the four that are held out falls, then rises.
TRAIN = {"max_steps": 12, "learning_rate": 0.01, "schedule": {"type": "constant", "warmup_steps": 0},
         "best_metric": "eval_loss"}  # fmt: skip
SECTIONS = {"data": {"validation_size": 4}, "evaluation": {"every_steps": 2, "samples": 2},
            "checkpoint": {"every_steps": 5, "keep": 1}}  # fmt: skip


def overfitting(output_dir, rows, method="sft", train=None, **more):
    sections = {name: {**section, **more.pop(name, {})} for name, section in SECTIONS.items()}
    return recipe(method, output_dir, [rows], train={**TRAIN, **(train or {})}, **sections, **more)


def weights(folder):
    return load_file(folder / WEIGHTS)


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def events(folder, *names):
    return [line for line in metrics(folder) if line.get("event") in names]


def evaluations(folder):
    return [line for line in metrics(folder) if "eval_loss" in line]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return sums(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, rows):
    """A run to its end, and one that stops early; tests only read them: (folder, what was said, result)."""
    folder = tmp_path_factory.mktemp("whole")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NESSO_TUNE_CACHE", str(folder / "cache"))
        for name, patience in (("to its end", None), ("early", 2)):
            some = overfitting(folder / name, rows, train={"early_stopping_patience": patience})
            with logged() as said:
                result = train(some)
            made[name] = (folder / name, said, result)
    return made


class Stopped(Exception):
    """Stands for a run that ends in the middle."""


@pytest.fixture
def each_step(monkeypatch):
    """Calls a function with the number of every optimizer step that begins."""
    original, calls = ConversationTrainer.training_step, []

    def step(self, *arguments, **options):
        for call in calls:
            call(self.state.global_step + 1)
        return original(self, *arguments, **options)

    monkeypatch.setattr(ConversationTrainer, "training_step", step)
    return calls.append


def test_a_later_evaluation_is_worse_and_final_is_not_of_it(whole):
    folder, said, result = whole["to its end"]
    losses = steps(folder, "eval_loss")
    lowest = min(losses, key=losses.get)
    assert lowest in (2, 4, 6), losses
    assert losses[12] > losses[lowest] + 0.1, "the run is made so"
    assert same(weights(folder / "final"), weights(folder / f"checkpoint-{lowest}"))
    assert not same(weights(folder / "final"), weights(folder / "checkpoint-12"))
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-12", f"checkpoint-{lowest}"], "keep: 1, and it"
    best = {"step": 12, "event": "best", "metric": "eval_loss", "value": losses[lowest], "taken": lowest}
    assert events(folder, "best", "early_stopped") == [best]
    noted = json.loads((folder / MANIFEST).read_text())["best"]
    assert (noted["metric"], noted["step"], noted["value"]) == ("eval_loss", lowest, losses[lowest])
    text = f"final/ holds the weights of step {lowest}: eval_loss {losses[lowest]:.4g} is the lowest"
    assert without_steps(said) == [text]
    card = (folder / "final" / "README.md").read_text()
    assert f"- {text}" in card
    assert f"| eval_loss | {losses[lowest]:.4g} |" in card, "its figures are those of these weights"
    assert result.metrics["eval_loss"] == losses[lowest]


def test_without_patience_for_more_it_ends_early(whole):
    folder, said, _ = whole["early"]
    losses = steps(folder, "eval_loss")
    lowest = min(losses, key=losses.get)
    stopped = lowest + 4
    assert max(losses) == stopped < 12, "two evaluations without improvement"
    longer = steps(whole["to its end"][0], "eval_loss")
    assert losses == {step: loss for step, loss in longer.items() if step <= stopped}
    found = {"step": stopped, "metric": "eval_loss", "value": losses[lowest]}
    assert events(folder, "early_stopped", "best") == [
        {**found, "event": "early_stopped", "best_step": lowest},
        {**found, "event": "best", "taken": lowest},
    ]
    assert f"stopped early at step {stopped} of 12: no better eval_loss in 2 evaluation(s)" in without_steps(said)[0]
    assert same(weights(folder / "final"), weights(whole["to its end"][0] / "final"))
    assert checkpoints(folder)[0].name == f"checkpoint-{stopped}", "where it ended is saved"


def test_from_the_command_line_an_early_end_is_an_end(tmp_path, rows, capsys):
    some = overfitting(tmp_path / "run", rows, train={"early_stopping_patience": 1})
    path = write_recipe(tmp_path / "r.yaml", some)
    code, _, said = main_here(capsys, "train", path)
    assert code == 0
    assert "stopped early at step" in said
    code, _, said = main_here(capsys, "train", path)
    assert code == 0
    assert "this run is finished" in said
    taken = events(tmp_path / "run", "best")[0]
    assert train(some).metrics["eval_loss"] == taken["value"], "a finished run tells the same"


@pytest.mark.parametrize("step", [pytest.param(4, marks=thorough), 8, pytest.param(11, marks=thorough)])
def test_interrupted_it_comes_to_the_same_end(tmp_path, rows, whole, each_step, step):
    """Before the best evaluation, after it, and after the last improvement has been pruned around."""
    some, limit = overfitting(tmp_path / "run", rows), [step]

    def stop(number):
        if number == limit[0]:
            raise Stopped

    each_step(stop)
    with pytest.raises(Stopped):
        train(some)
    limit[0] = 0
    train(some)
    reference = whole["to its end"][0]
    assert same(weights(tmp_path / "run" / "final"), weights(reference / "final"))
    assert evaluations(tmp_path / "run") == evaluations(reference)
    assert events(tmp_path / "run", "best") == events(reference, "best")
    assert [path.name for path in checkpoints(tmp_path / "run")] == [path.name for path in checkpoints(reference)]


@thorough
def test_killed_while_it_waits_for_better_ones(tmp_path, rows):
    """SIGKILL between the best evaluation and the early end, in a process of its own."""
    slow = {"max_steps": 400, "early_stopping_patience": 15}
    for name in ("killed", "undisturbed"):
        some = overfitting(tmp_path / name, rows, train=slow, evaluation={"every_steps": 4, "samples": 0})
        if name == "killed":
            kill_at(start(write_recipe(tmp_path / "r.yaml", some)), tmp_path / name, 13)
            assert checkpoints(tmp_path / name)
            assert not (tmp_path / name / "final").exists()
        train(some)
    one, other = tmp_path / "killed", tmp_path / "undisturbed"
    assert same(weights(one / "final"), weights(other / "final"))
    assert events(one, "best", "early_stopped") == events(other, "best", "early_stopped")
    assert events(one, "early_stopped"), "the run is made so"


def test_stopped_early_but_not_written_it_does_not_train_again(tmp_path, rows, whole, each_step, monkeypatch):
    """It ends between the last evaluation and `final/`, and again while that is written."""
    some = overfitting(tmp_path / "run", rows, train={"early_stopping_patience": 2})
    with monkeypatch.context() as patch:
        patch.setattr(run, "save_final", lambda *_: (_ for _ in ()).throw(Stopped()))
        for _ in range(2):
            with pytest.raises(Stopped):
                train(some)
    trained = []
    each_step(trained.append)
    train(some)
    assert trained == []
    assert same(weights(tmp_path / "run" / "final"), weights(whole["early"][0] / "final"))
    assert events(tmp_path / "run", "best", "early_stopped") == events(whole["early"][0], "best", "early_stopped")


def test_asked_to_stop_at_the_step_at_which_it_ends_early(tmp_path, rows, whole, each_step):
    (early,) = events(whole["early"][0], "early_stopped")
    each_step(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == early["step"] else None)
    result = train(overfitting(tmp_path / "run", rows, train={"early_stopping_patience": 2}))
    assert result.asked_to_stop, "a chain does not go on"
    assert same(weights(tmp_path / "run" / "final"), weights(whole["early"][0] / "final"))
    assert not events(tmp_path / "run", "preempted")


def test_the_best_checkpoint_damaged_is_said_with_a_way_on(tmp_path, rows, monkeypatch):
    some = overfitting(tmp_path / "run", rows)
    with monkeypatch.context() as patch:
        patch.setattr("nesso_tune.training.fit.load_best_weights", lambda *_: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            train(some)
    newest, best = checkpoints(tmp_path / "run")
    shutil.copytree(best, tmp_path / "copy")
    (best / WEIGHTS).write_bytes((best / WEIGHTS).read_bytes()[:-5])
    with pytest.raises(RunEnvironmentError, match=rf"{best.name}: has the best eval_loss .* damaged; restore it, or"):
        train(some)
    last = overfitting(tmp_path / "run", rows, train={"best_metric": None})
    assert train(last, allow_changes=("train.best_metric",)).trained, "what the message says"
    assert same(weights(tmp_path / "run" / "final"), weights(newest))


@pytest.mark.parametrize("method", ["sft", pytest.param("dpo", marks=thorough)])
def test_an_adapter_is_merged_as_it_was_at_its_best(tmp_path, rows, pairs, whole_base, method):
    model = {"base": whole_base, "random_init": False, "adapter": {"type": "lora", "r": 4}}
    rate, metric = (0.1, "eval_loss") if method == "sft" else (0.05, "eval_loss/it")
    plan = {"learning_rate": rate, "best_metric": metric, "early_stopping_patience": 1}
    some = overfitting(tmp_path / "run", rows if method == "sft" else pairs, method, model=model, train=plan)
    train(some)
    losses = steps(tmp_path / "run", metric)
    (line,) = events(tmp_path / "run", "best")
    assert line["taken"] == min(losses, key=losses.get) == line["step"] - 2, losses
    data, fresh = loaded(some)
    adapted = adapt(fresh, some.model, data.chat.new_ids, some.seed, merging=True)
    set_weights(fresh, weights(tmp_path / "run" / f"checkpoint-{line['taken']}"))
    merged = get_weights(adapted.merge_and_unload().requires_grad_(True))
    assert same(weights(tmp_path / "run" / "final"), merged)


@thorough
@pytest.mark.parametrize("adapter", [None, {"type": "lora", "r": 4}])
def test_two_processes_in_shards_decide_alike(tmp_path, rows, whole_base, adapter):
    """The early end, too, is that of all; the trace is the first one's."""
    batch = {"micro_batch_size": 1, "early_stopping_patience": 2, "profile": True}
    batch |= {"learning_rate": 0.1} if adapter else {}
    model = {"base": whole_base, "random_init": False, "adapter": adapter} if adapter else {}
    some = overfitting(tmp_path / "run", rows, train=batch, model=model,
                       distributed={"fsdp": "full_shard", "state_dict": "sharded"})  # fmt: skip
    done = several("train", write_recipe(tmp_path / "r.yaml", some))
    assert done.returncode == 0, done.stderr[-3000:]
    losses = steps(tmp_path / "run", "eval_loss")
    lowest = min(losses, key=losses.get)
    (stopped, best) = events(tmp_path / "run", "early_stopped", "best")
    assert (stopped["step"], best["taken"]) == (lowest + 4, lowest)
    assert done.stderr.count("stopped early at step") == done.stderr.count("final/ holds the weights of step") == 1
    assert len(list((tmp_path / "run" / "profile").iterdir())) == done.stderr.count("profile of step") == 1
    if adapter is None:
        _, model = loaded(some)
        load_shards(tmp_path / "run" / f"checkpoint-{lowest}", model)
        assert same(weights(tmp_path / "run" / "final"), get_weights(model))
    for line in metrics(tmp_path / "run"):
        if "tokens_per_second" in line:
            assert 0 <= line["data_wait_share"] <= 1
            assert line["peak_memory_gb"] > 0.1


def test_a_metric_that_is_not_measured_ends_the_run_before_its_first_step(tmp_path, rows, each_step):
    trained = []
    each_step(trained.append)
    some = overfitting(tmp_path / "run", rows, train={"best_metric": "eval_loss/fr"})
    said = r"`eval_loss/fr` is not measured by this run; did you mean `eval_loss`\? There are eval_loss, eval_loss/it, "
    with pytest.raises(RecipeError, match=rf"train.best_metric: {said}"):
        train(some)
    assert trained == []
    data, _ = loaded(some)
    none = Rows(data.validation.documents, data.validation.records[:0], data.validation.bounds[:1])
    with pytest.raises(RecipeError, match=r"not measured: there are no validation rows; raise data\.validation_size"):
        best_checkpoint_for(some, MetricSpec(("loss",)), none)
    both = {"sources": [{"path": str(rows), "alias": name} for name in "ab"]}
    of_source = overfitting(tmp_path / "run", rows, train={"best_metric": "eval_loss/source/a"}, data=both)
    best = best_checkpoint_for(of_source, MetricSpec(("loss",)), data.validation)
    assert best.metric == "eval_loss/source/a", "is seen when it is measured"


def test_a_metric_of_answers_that_is_not_measured_ends_it_at_the_first_evaluation(tmp_path, rows, each_step):
    trained = []
    each_step(trained.append)
    some = overfitting(tmp_path / "run", rows, train={"best_metric": "stop_rate/fr"})
    with pytest.raises(RecipeError, match=r"`stop_rate/fr` is not measured; did you mean `stop_rate`\? There are"):
        train(some)
    assert trained == [1, 2]


def test_never_a_number(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(BestCheckpoint, "update", lambda *_: False)
    with pytest.raises(NumericalError, match="eval_loss was not finite at any evaluation"):
        train(overfitting(tmp_path / "run", rows, train={"max_steps": 2}))

"""`nesso-tune sweep`: the grid, runs that are killed and continued, shared results, and the rule that stops runs."""

import json
import math
import shlex
import signal
import subprocess

import pytest
import yaml
from transformers import TrainerControl, TrainerState

from nesso_tune.cli.sweep import Curve, Point, _best, _log_results, make_points, parse_grid
from nesso_tune.errors import RecipeError
from nesso_tune.training.callbacks import StopWhenWorse
from nesso_tune.training.sft import ConversationTrainer
from tests.support.processes import Forked
from tests.support.run_directories import write_run
from tests.support.runs import main_here, metrics, recipe, steps, thorough, write_recipe
from tests.test_kill import kill_at, when_at

SHORT = {"train": {"max_steps": 4}, "checkpoint": {"every_steps": 1}, "evaluation": None}
GRID = ("--grid", "train.learning_rate=1e-3,1e-4", "train.weight_decay=0.0,0.5")
NAMES = [f"learning_rate={rate},weight_decay={decay}" for rate in ("0.001", "0.0001") for decay in ("0.0", "0.5")]


@pytest.fixture
def some(tmp_path, talks):
    return recipe("sft", tmp_path / "sweep", [talks], **SHORT)


def refused(*texts):
    with pytest.raises(RecipeError) as error:
        parse_grid(texts)
    return str(error.value)


def test_mistakes_in_a_grid():
    assert "--grid: is missing" in refused()
    assert "`train.seed` has no values" in refused("train.seed")
    assert "`seed=` has no values" in refused("seed=")
    assert "--grid seed: is given twice" in refused("seed=1", "seed=2")
    assert "--grid seed: has the same value twice" in refused("seed=1,2,1")
    assert "--grid output_dir: cannot vary in a sweep; remove it" in refused("output_dir=a,b")
    assert "every --set takes one key: --set output_dir=a" in refused("output_dir=a")
    assert "--grid seed:1: a bracket or quote that opens here is not closed" in refused("seed=[1")


def test_points_are_the_combinations_and_are_named_after_keys_and_values(some, tmp_path):
    points = make_points(some, parse_grid(["train.learning_rate=1e-3,1e-4", "train.weight_decay=0.0,0.5"]))
    assert [point.name for point in points] == NAMES
    assert [point.run for point in points] == [tmp_path / "sweep" / name for name in NAMES]
    values = [(point.recipe.train.learning_rate, point.recipe.train.weight_decay) for point in points]
    assert values == [(1e-3, 0.0), (1e-3, 0.5), (1e-4, 0.0), (1e-4, 0.5)]


def test_values_that_cannot_be_in_a_folder_name_have_a_hash_and_equal_keys_their_path(some):
    (point, other) = make_points(some, parse_grid(["chat.default_system=Ciao / a,Ciao. a"]))
    assert point.name.startswith("default_system=Ciao-a-")
    assert point.name != other.name
    assert "/" not in point.name
    long = make_points(some, parse_grid(["chat.default_system=" + "a" * 300]))
    assert len(long[0].name) < 80
    axes = parse_grid(["evaluation.every_steps=1,2", "checkpoint.every_steps=1"])
    assert make_points(some, axes)[0].name == "evaluation.every_steps=1,checkpoint.every_steps=1"


def test_all_points_are_validated_before_the_first_starts(some, tmp_path, capsys):
    path = write_recipe(tmp_path / "r.yaml", some)
    code, _, err = main_here(
        capsys, "sweep", path, "--grid", "train.learning_rate=1e-3,-1", "train.micro_batch_size=2,x"
    )
    assert code == 2
    assert "learning_rate" in err
    assert "micro_batch_size" in err
    assert not (tmp_path / "sweep").exists()
    code, _, err = main_here(capsys, "sweep", path, "--grid", "seed=1,2", "--metric", "los")
    assert (code, "does not say which run is better" in err) == (2, True)
    code, _, err = main_here(capsys, "sweep", path, "--grid", "seed=1,2", "--stop-worse-by", "0.1")
    assert (code, "needs evaluations" in err) == (2, True)
    assert not (tmp_path / "sweep").exists()


def test_values_of_a_private_source_are_refused(tmp_path, talks):
    source = {"path": talks, "private": True}
    private = recipe("sft", tmp_path / "sweep", [talks]).replace({"data.sources": [source]})
    with pytest.raises(RecipeError, match="name a private source"):
        make_points(private, parse_grid([f"data.sources.0.path={talks}"]))


@thorough  # one interrupted point: test_a_worse_point_stops_early_also_if_it_was_interrupted_then
def test_a_sweep_killed_twice_ends_like_one_that_was_not(some, tmp_path, capsys):
    path = write_recipe(tmp_path / "r.yaml", some)
    whole, killed = tmp_path / "whole", tmp_path / "sweep"
    arguments = ("sweep", path, *GRID, "--verify", "none")
    code, _, err = main_here(capsys, *arguments, "--set", f"output_dir={whole}")
    assert code == 0, err
    process = Forked(*arguments)
    when_at(process, killed / NAMES[1], 2, signal.SIGTERM)
    assert process.wait(60) == 75
    assert not (killed / NAMES[1] / "final").exists()
    kill_at(Forked(*arguments), killed / NAMES[2], 2)
    assert not (killed / NAMES[2] / "final").exists()
    code, _, err = main_here(capsys, *arguments)
    assert code == 0, err
    assert err.count("this run is finished") == 2
    assert f"{NAMES[2]}: resuming an unfinished run" in err
    for name in NAMES:
        models = [(folder / name / "final" / "model.safetensors").read_bytes() for folder in (whole, killed)]
        assert models[0] == models[1], name
    page = (killed / "comparison.html").read_text(encoding="utf-8")
    assert all(name in page for name in NAMES)
    assert len(list((tmp_path / "cache" / "documents").glob("*/"))) == 1, "the data is prepared once"


def test_points_of_dpo_share_the_reference(tmp_path, pairs, whole_base, capsys):
    model = {"base": whole_base, "random_init": False}
    path = write_recipe(tmp_path / "r.yaml", recipe("dpo", tmp_path / "sweep", [pairs], model=model, **SHORT))
    code, _, err = main_here(capsys, "sweep", path, "--grid", "dpo.beta=0.1,0.5", "--verify", "none")
    assert code == 0, err
    events = [metrics(tmp_path / "sweep" / f"beta={beta}") for beta in (0.1, 0.5)]
    assert [next(line["cached"] for line in lines if line.get("event") == "reference") for lines in events] == [
        False,
        True,
    ]


def test_a_point_that_diverges_does_not_end_the_sweep(some, tmp_path, capsys, monkeypatch):
    compute = ConversationTrainer.compute_loss

    def diverges(self, *arguments, **options):
        return compute(self, *arguments, **options) * (math.nan if self.args.learning_rate == 0.5 else 1.0)

    monkeypatch.setattr(ConversationTrainer, "compute_loss", diverges)
    path = write_recipe(tmp_path / "r.yaml", some)
    arguments = ("--grid", "train.learning_rate=0.5,1e-3", "--verify", "none")
    code, _, err = main_here(capsys, "sweep", path, *arguments)
    assert code == 6, err
    assert "learning_rate=0.5: failed" in err
    assert not (tmp_path / "sweep" / "learning_rate=0.5" / "final").exists()
    assert (tmp_path / "sweep" / "learning_rate=0.001" / "final").is_dir()


# The job array


def test_an_array_has_a_task_for_each_point(some, tmp_path, capsys):
    path, file = write_recipe(tmp_path / "r.yaml", some), tmp_path / "jobs" / "r.sbatch"
    arguments = ("sweep", path, *GRID, "--set", "seed=7", "--verify", "none", "--slurm", file, "--parallel", "2")
    code, out, err = main_here(capsys, *arguments)
    assert code == 0, err
    assert f"{file}: 4 tasks, each on 1 nodes x 1 GPUs = 1 processes\nnext: sbatch {file}\n" in out
    text = file.read_text()
    assert "#SBATCH --array=0-3%2\n#SBATCH --output=r-%A-%a.log\n" in text
    assert "#SBATCH --requeue\n" in text
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    command = shlex.split(line.removesuffix(" || code=$?"))[-1].replace("exec python", "echo")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True,
                          env={"SLURM_ARRAY_TASK_ID": "2", "PATH": "/usr/bin:/bin"})  # fmt: skip
    words = done.stdout.split()
    words = words[words.index("sweep") :]
    assert words[:4] == ["sweep", "--point", "2", str(path)]
    code, _, err = main_here(capsys, *words)
    assert code == 0, err
    assert [folder.name for folder in (tmp_path / "sweep").iterdir() if folder.is_dir()] == [NAMES[2]]
    assert f"best eval_loss of 1 finished runs: {NAMES[2]}" not in err, "without evaluations there is no best run"
    assert f"{NAMES[2]}: eval_loss not measured" in err
    assert yaml.safe_load((tmp_path / "sweep" / NAMES[2] / "recipe.yaml").read_text())["seed"] == 7
    code, _, err = main_here(capsys, *words[:2], 0, *words[3:])
    assert code == 0, err
    page = (tmp_path / "sweep" / "comparison.html").read_text(encoding="utf-8")
    assert [name in page for name in NAMES] == [True, False, True, False], "the runs of all tasks so far"


def test_the_data_of_an_array_is_prepared_before(some, tmp_path, capsys):
    path, file = write_recipe(tmp_path / "r.yaml", some), tmp_path / "r.sbatch"
    code, out, err = main_here(capsys, "sweep", path, *GRID, "--slurm", file, "--prepare")
    assert code == 0, err
    assert sorted(tmp_path.glob("*.sbatch")) == [tmp_path / "r-1-prepare.sbatch", tmp_path / "r-2-r.sbatch"]
    assert (
        f"job=$(sbatch --parsable --dependency=afterok:$job --kill-on-invalid-dep=yes {tmp_path}/r-2-r.sbatch)" in out
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--grid", "seed=1,2", "--point", "2"], "--point: the grid has the combinations 0 to 1, not 2"),
        (["--grid", "seed=1,2", "--point", "0", "--slurm", "x"], "--point: has no effect with --slurm"),
        (["--grid", "cluster.nodes=1,2", "--slurm", "x"], "--grid cluster.nodes: cannot vary in a job array"),
        (
            ["--grid", "seed=1,2", "--stop-worse-by", "1", "--slurm", "x"],
            "--stop-worse-by: compares a run",
        ),
        (["--grid", "seed=1,2", "--parallel", "2"], "--parallel: has no effect without --slurm"),
        (["--grid", "seed=1,2", "--submit"], "--submit: has no effect without --slurm"),
        (["--grid", "train.global_batch_size=4,3", "--slurm", "x", "--set", "cluster.gpus_per_node=2"], "multiple"),
    ],
)
def test_mistakes_in_the_options_of_an_array(arguments, says, some, tmp_path, capsys):
    path = write_recipe(tmp_path / "r.yaml", some.replace({"evaluation": {}, "train.micro_batch_size": 1}))
    code, _, err = main_here(capsys, "sweep", path, *arguments)
    assert (code, says in err) == (2, True), err


# The rule that stops runs


def decides(callback, step, metrics=None):
    state, control = TrainerState(global_step=step, max_steps=10, is_world_process_zero=True), TrainerControl()
    if metrics is None:
        callback.on_train_begin(None, state, control)
    else:
        callback.on_evaluate(None, state, control, metrics=metrics)
    return control.should_training_stop


@pytest.mark.parametrize(("metric", "sign"), [("eval_loss", 1), ("eval_rewards/accuracies", -1)])
def test_a_run_stops_where_it_is_worse_by_more_than_the_margin(tmp_path, metric, sign):
    rule = StopWhenWorse(metric, 0.25, {2: 1.0, 10: 1.0}, "other", tmp_path)
    assert decides(rule, 2, {metric: 1.0 + sign * 0.5})
    assert not decides(rule, 2, {metric: 1.0 + sign * 0.25})
    assert not decides(rule, 2, {metric: 1.0 - sign * 0.5})
    assert not decides(rule, 3, {metric: 1.0 + sign * 0.5}), "the other run was not evaluated there"
    assert not decides(rule, 10, {metric: 1.0 + sign * 0.5}), "the run ends anyway"
    assert not decides(rule, 2, {"other_metric": 9.0})
    lines = [{"step": 2, metric: 1.0 + sign * 0.5}, {"step": 3, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert decides(rule, 2), "at the begin of a session that resumes there"
    assert not decides(rule, 3)


def test_the_best_run_is_one_that_was_not_stopped():
    curves = [Curve("a", {1: 3.0, 2: 2.0}, 2.0), Curve("b", {1: 1.0}, 1.0, True), Curve("c", {1: 9.0, 2: 1.5}, 1.5)]
    assert _best(curves, "eval_loss").name == "c"
    assert _best(curves, "eval_rewards/accuracies").name == "a"
    assert _best(curves[1:2], "eval_loss") is None


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (
            ["train.learning_rate=1e-3,1e-4", "seed=1,2"],
            "better than learning_rate=0.0001 by 1 ± 0.071 (standard error",
        ),
        (["train.learning_rate=1e-3,1e-4"], "with one seed each the spread between seeds is not known"),
    ],
)
def test_the_last_lines_say_what_the_seeds_say(some, caplog, grid, says):
    points = make_points(some, parse_grid(grid))
    for i, point in enumerate(points):
        known = {"train": {"learning_rate": point.recipe.train.learning_rate}, "seed": point.recipe.seed}
        write_run(point.run, [{"step": 1, "eval_loss": (1.0, 1.1, 2.0, 2.1)[i]}], recipe=known)
    with caplog.at_level("INFO"):
        _log_results(points, points, "eval_loss", set())
    assert caplog.messages[-2].startswith("eval_loss: learning_rate=0.001 is better than learning_rate=0.0001")
    assert says in caplog.messages[-2]
    assert caplog.messages[-1] == f"comparison in {points[0].run.parent / 'comparison.html'}"


@pytest.mark.parametrize(
    ("event", "final", "stopped"),
    [
        (None, 2.5, False),
        ({"event": "best", "taken": 2}, 1.0, False),
        ({"event": "early_stopped", "metric": "eval_loss"}, 2.5, False),
        ({"event": "early_stopped", "by": "callback"}, 2.5, True),
    ],
)
def test_a_run_counts_with_the_weights_of_its_final(some, tmp_path, event, final, stopped):
    lines = [{"step": step, "eval_loss": loss} for step, loss in ((1, 3.0), (2, 1.0), (3, 2.5))]
    lines += [{"step": 3, **event}] if event else []
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = Curve.read(Point("a", some), "eval_loss")
    assert curve == Curve("a", {1: 3.0, 2: 1.0, 3: 2.5}, final, stopped)


def test_a_worse_point_stops_early_also_if_it_was_interrupted_then(tmp_path, talks, capsys, monkeypatch):
    sections = {**SHORT, "evaluation": {"every_steps": 2, "samples": 0}}
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "sweep", [talks], **sections))
    worse = tmp_path / "sweep" / "learning_rate=1e-09"
    arguments = (
        "sweep",
        path,
        "--grid",
        "train.learning_rate=1e-2,1e-9",
        "--stop-worse-by",
        "0.01",
        "--verify",
        "none",
    )
    with monkeypatch.context() as patch:
        patch.setattr("nesso_tune.run._export", interrupted_at(2))
        code, _, err = main_here(capsys, *arguments)
    assert code == 75, err
    assert (worse / "checkpoint-2").is_dir()
    code, _, err = main_here(capsys, *arguments)
    assert code == 0, err
    assert sorted(steps(worse)) == [1, 2]
    assert (worse / "final").is_dir()
    assert "learning_rate=1e-09: eval_loss" in err
    assert "(stopped early at step 2)" in err
    assert "best eval_loss: learning_rate=0.01" in err


def interrupted_at(step):
    """`_export` that is interrupted if the run ended at this step."""
    from nesso_tune.run import _export

    def export(trainer, *rest):
        if trainer.state.global_step == step:
            raise KeyboardInterrupt
        return _export(trainer, *rest)

    return export

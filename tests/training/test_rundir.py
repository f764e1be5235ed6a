"""The run directory: foreign folders stay untouched, two runs exclude each other, a finished run says so."""

import json
import shutil

import pytest

from nesso_tune import RecipeError, RunEnvironmentError
from nesso_tune.recipes.load import load_recipe
from nesso_tune.run import train
from nesso_tune.training.rundir import differences, open_run, write_end, write_start
from tests.support.runs import recipe


@pytest.fixture
def some(tmp_path, talks):
    return recipe("sft", tmp_path / "run", [talks])


def test_a_foreign_folder_is_never_written_into(tmp_path, some):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(RunEnvironmentError, match="holds no run"):
            open_run(some, overwrite=overwrite)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way(tmp_path, some):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunEnvironmentError, match="is a file"):
        open_run(some)


def test_a_foreign_manifest_is_foreign(tmp_path, some):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"name": "an extension"}')
    with pytest.raises(RunEnvironmentError, match="holds no run"):
        open_run(some, overwrite=True)


def test_two_runs_exclude_each_other(some):
    run = open_run(some)
    with pytest.raises(RunEnvironmentError, match="another nesso-tune"):
        open_run(some)
    run.close()
    open_run(some).close()


def test_finished_unfinished_and_other_recipes(tmp_path, some, talks):
    run = open_run(some)
    write_start(run, some, {"nesso_tune": "0"})
    run.close()
    assert load_recipe(run.path / "recipe.yaml") == some, "the resolved recipe loads again as it is"
    again = open_run(some)
    assert (again.checkpoint, again.finished) == (None, False)
    assert "starts from the beginning" in again.notes[0]
    again.close()
    with pytest.raises(RunEnvironmentError, match="unfinished"):
        open_run(some, resume="never")
    run.final.mkdir()
    (run.final / "model.safetensors").write_text("weights")
    write_end(run)
    done = open_run(some)
    assert done.finished
    done.close()
    (run.final / "model.safetensors").write_text("weigh")
    damaged = open_run(some)
    assert not damaged.finished, "a final/ that was cut short is made again"
    damaged.close()
    other = recipe("sft", tmp_path / "run", [talks], seed=7)
    with pytest.raises(RecipeError, match="seed: 42, the recipe now says 7"):
        open_run(other)


def test_overwrite_removes_the_run_and_nothing_else(some):
    run = open_run(some)
    write_start(run, some, {"nesso_tune": "0"})
    (run.path / "notes.md").write_text("mine")
    (run.path / "checkpoint-2").mkdir()
    run.metrics.write_text("{}\n")
    run.close()
    open_run(some, overwrite=True).close()
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "notes.md"]


def test_leftovers_of_interrupted_saves_are_removed(some):
    run = open_run(some)
    write_start(run, some, {"nesso_tune": "0"})
    (run.path / ".checkpoint-3.partial").mkdir()
    (run.path / ".checkpoint-3.partial" / "model.safetensors").write_text("half")
    run.close()
    open_run(some).close()
    assert not list(run.path.glob(".*.partial"))


@pytest.mark.parametrize("path", ["nowhere", "checkpoint-9"])
def test_a_checkpoint_that_is_not_there_cannot_be_resumed_from(some, path):
    run = open_run(some)
    write_start(run, some, {"nesso_tune": "0"})
    run.close()
    with pytest.raises(RunEnvironmentError, match="is no checkpoint of a run in"):
        open_run(some, resume=str(run.path / path))


def test_a_damaged_manifest_is_named(some):
    run = open_run(some)
    (run.path / "manifest.json").write_text('{"nesso')
    run.close()
    with pytest.raises(RunEnvironmentError, match=r"manifest\.json: is damaged"):
        open_run(some)


def test_differences_name_dotted_keys_and_leave_free_ones_out():
    old = {"seed": 1, "train": {"learning_rate": 1e-3, "schedule": {"type": "cosine"}}, "logging": {"every_steps": 1}}
    new = {"seed": 1, "train": {"learning_rate": 2e-3, "schedule": {"type": "linear"}}, "logging": {"every_steps": 9}}
    assert differences(old, new) == {
        "train.learning_rate": (1e-3, 2e-3),
        "train.schedule.type": ("cosine", "linear"),
    }


def test_manifest_of_a_run_says_what_it_is_made_of(tmp_path, some):
    train(some)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    for key in ("nesso_tune", "versions", "base", "tokenizer", "data", "world_size", "threads", "device", "command"):
        assert manifest[key], key
    assert manifest["finished"]
    assert train(some).trained is False, "a finished run of the same recipe is done"


def test_an_accepted_change_of_a_finished_run_would_do_nothing(some):
    train(some)
    changed = some.model_copy(update={"train": some.train.model_copy(update={"max_steps": 9})})
    with pytest.raises(
        RecipeError, match=r"its run is finished: a change of train.max_steps would do nothing; train it"
    ):
        train(changed, allow_changes=("train.max_steps",))


def test_what_decides_the_data_is_not_offered_to_be_accepted(some):
    train(some)
    with pytest.raises(RecipeError) as error:
        train(some.model_copy(update={"seed": 7}))
    assert "its run has seed: 42, the recipe now says 7" in str(error.value)
    assert "--allow-changes" not in str(error.value)


def test_a_run_killed_while_it_wrote_its_first_files_can_start_again(some):
    """The manifest comes first; until it is there, the folder holds nothing but a lock and a staged file."""
    run = open_run(some)
    (run.path / ".manifest.json.partial").write_text("{")
    run.close()
    assert open_run(some).checkpoint is None


def test_a_base_inside_the_run_directory_is_refused(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks], model={"base": str(tmp_path / "run" / "final")})
    (tmp_path / "run" / "final").mkdir(parents=True)
    with pytest.raises(RecipeError, match="lies in output_dir"):
        open_run(some, overwrite=True)
    assert (tmp_path / "run" / "final").is_dir()


def test_a_named_checkpoint_is_used_or_refused_never_passed_over(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks], evaluation=None)
    with pytest.raises(RunEnvironmentError, match="is no checkpoint of a run in"):
        open_run(some, resume=str(tmp_path / "run" / "checkpoint-2"))
    train(some)
    named = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(RecipeError, match=r"would remove .*checkpoint-2, which --resume names"):
        open_run(some, resume=named, overwrite=True)
    with pytest.raises(RunEnvironmentError, match="its run is finished"):
        open_run(some, resume=named)
    shutil.rmtree(tmp_path / "run" / "final")
    open_run(some, resume=named).close()
    with pytest.raises(RunEnvironmentError, match="later-checkpoint-4: is no checkpoint of a run"):
        open_run(some, resume=str(tmp_path / "run" / "later-checkpoint-4"))

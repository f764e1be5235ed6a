"""The run directory: foreign folders stay untouched, two runs exclude each other, finished runs are left alone."""

import errno
import json
import re
import shutil

import pytest

from nesso_tune import RecipeError, RunEnvironmentError
from nesso_tune.recipes.builtin import shipped_folder
from nesso_tune.recipes.load import load_recipe
from nesso_tune.run import train
from nesso_tune.runs import checkpoint
from nesso_tune.runs.metrics_log import MetricsLog, last_metrics, read_metrics
from nesso_tune.runs.run_directory import open_run, write_end, write_start
from tests.runs.test_resume import FACTS
from tests.support.logs import logged
from tests.support.runs import recipe, steps


@pytest.fixture
def some(tmp_path, talks):
    return recipe("sft", tmp_path / "run", [talks])


def test_a_foreign_folder_is_never_written_into(tmp_path, some):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(RunEnvironmentError, match="contains no run"):
            open_run(some, overwrite=overwrite)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_output_dir_is_a_file(tmp_path, some):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunEnvironmentError, match="is a file"):
        open_run(some)


def test_a_foreign_manifest_is_foreign(tmp_path, some):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"name": "an extension"}')
    with pytest.raises(RunEnvironmentError, match="contains no run"):
        open_run(some, overwrite=True)


def test_two_runs_exclude_each_other(some):
    run = open_run(some)
    with pytest.raises(RunEnvironmentError, match="another nesso-tune process"):
        open_run(some)
    run.close()
    open_run(some).close()


def test_finished_unfinished_and_other_recipes(tmp_path, some, talks):
    run = open_run(some)
    write_start(run, some, FACTS)
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
    assert not damaged.finished, "a truncated final/ is created again"
    damaged.close()
    other = recipe("sft", tmp_path / "run", [talks], seed=7)
    with pytest.raises(RecipeError, match="seed: 42, the recipe now has 7"):
        open_run(other)


def test_leftovers_of_interrupted_saves_are_removed(some):
    run = open_run(some)
    write_start(run, some, FACTS)
    (run.path / ".checkpoint-3.partial").mkdir()
    (run.path / ".checkpoint-3.partial" / "model.safetensors").write_text("half")
    run.close()
    open_run(some).close()
    assert not list(run.path.glob(".*.partial"))


@pytest.mark.parametrize("path", ["nowhere", "checkpoint-9"])
def test_a_checkpoint_that_is_not_there_cannot_be_resumed_from(some, path):
    run = open_run(some)
    write_start(run, some, FACTS)
    run.close()
    with pytest.raises(RunEnvironmentError, match="is no checkpoint of a run in"):
        open_run(some, resume=str(run.path / path))


def test_a_damaged_manifest_is_named(some):
    run = open_run(some)
    (run.path / "manifest.json").write_text('{"nesso')
    run.close()
    with pytest.raises(RunEnvironmentError, match=r"manifest\.json: is damaged"):
        open_run(some)


def test_the_manifest_records_the_provenance(tmp_path, some):
    train(some)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    for key in ("nesso_tune", "versions", "base", "tokenizer", "data", "world_size", "threads", "device", "command"):
        assert manifest[key], key
    assert manifest["finished"]
    assert train(some).trained is False, "a finished run of the same recipe is done"


def test_an_accepted_change_of_a_finished_run_is_refused(some):
    train(some)
    changed = some.model_copy(update={"train": some.train.model_copy(update={"max_steps": 9})})
    with pytest.raises(
        RecipeError, match=r"its run is finished: changing train.max_steps would have no effect; train it"
    ):
        train(changed, allow_changes=("train.max_steps",))


def test_allow_changes_is_not_suggested_for_keys_that_decide_the_data(some):
    train(some)
    with pytest.raises(RecipeError) as error:
        train(some.model_copy(update={"seed": 7}))
    assert "its run has seed: 42, the recipe now has 7" in str(error.value)
    assert "--allow-changes" not in str(error.value)


def test_a_run_killed_while_it_wrote_its_first_files_can_start_again(some):
    """The manifest is written first; before, the folder contains only a lock and a staging file."""
    run = open_run(some)
    (run.path / ".manifest.json.partial").write_text("{")
    run.close()
    assert open_run(some).checkpoint is None


def test_a_base_inside_the_run_directory_is_refused(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks], model={"base": str(tmp_path / "run" / "final")})
    (tmp_path / "run" / "final").mkdir(parents=True)
    with pytest.raises(RecipeError, match="is inside output_dir"):
        open_run(some, overwrite=True)
    assert (tmp_path / "run" / "final").is_dir()


def test_a_named_checkpoint_is_used_or_refused_never_ignored(tmp_path, talks):
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


def stopped(tmp_path, talks):
    """A run of four steps whose `final/` and last checkpoint are gone."""
    some = recipe("sft", tmp_path / "run", [talks], evaluation=None)
    train(some)
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    return some, tmp_path / "run"


def test_no_usable_checkpoint_is_refused_each_time_and_nothing_is_changed(tmp_path, talks):
    some, run = stopped(tmp_path, talks)
    (run / "checkpoint-2" / "rng-0.json").write_text("x")
    before = (run / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(
            RunEnvironmentError, match=r"no checkpoint is usable \(checkpoint-2: rng-0\.json is damaged"
        ):
            train(some)
    assert (run / "checkpoint-2").is_dir()
    assert (run / "metrics.jsonl").read_bytes() == before
    (run / "checkpoint-2").rename(run / "damaged-checkpoint-2")
    with pytest.raises(RunEnvironmentError, match="no checkpoint is usable"):
        train(some)


def test_a_temporary_read_error_is_not_damage(tmp_path, talks, monkeypatch):
    some, run = stopped(tmp_path, talks)

    def unreadable(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint, "sha256", unreadable)
    with pytest.raises(RunEnvironmentError, match="Input/output error"):
        train(some)
    monkeypatch.undo()
    monkeypatch.setenv("NESSO_TUNE_CACHE", str(tmp_path / "cache"))
    assert (run / "checkpoint-2").is_dir()
    assert train(some).trained


def test_a_finished_model_with_files_added_and_an_edited_card_is_left_alone(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks], evaluation=None)
    final = train(some).model_dir
    (final / "README.md").write_text("ours")
    (final / "model-q4.gguf").write_text("weights")
    assert train(some).trained is False
    assert ((final / "README.md").read_text(), (final / "model-q4.gguf").read_text()) == ("ours", "weights")


def test_a_damaged_final_is_set_aside_and_created_again_with_a_note(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks], evaluation=None)
    final = train(some).model_dir
    (final / "config.json").unlink()
    with logged() as said:
        assert train(some).trained
    assert "the existing one is kept as damaged-final" in said[0]
    assert (tmp_path / "run" / "damaged-final" / "model.safetensors").is_file()
    (final / "config.json").unlink()
    for saved in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(saved)
    with logged() as said:
        assert train(some).trained
    assert "created again" in said[0]
    assert "starts from the beginning" in said[1]
    assert len(said) == len(set(said)), "once each"


@pytest.mark.parametrize("name", ["final", "checkpoint-2"])
def test_a_folder_that_was_being_replaced_gets_its_name_back(tmp_path, talks, name):
    some = recipe("sft", tmp_path / "run", [talks], evaluation=None)
    train(some)
    run = tmp_path / "run"
    (run / name).rename(run / f".{name}.before.partial")
    (run / f".{name}.partial").mkdir()
    assert train(some).trained is False
    assert (run / name).is_dir()
    assert not list(run.glob(".*.partial"))


def test_circular_and_dangling_links(tmp_path, talks):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "absent")
    for name in ("a/run", "c"):
        with pytest.raises(RunEnvironmentError, match="is a link"):
            open_run(recipe("sft", tmp_path / name, [talks]))


def test_invalid_lines_in_the_metrics_are_skipped_and_unicode_line_breaks_kept(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", True)
    log.write({"step": 1, "event": "answer", "answer": "a\u2028b\u2029c\u0085d"})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'5\n[1]\n{"step": "x"}\n\xff\xfe\n{"step": 2')
    log.truncate_after(1)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "event": "answer", "answer": "a\u2028b\u2029c\u0085d"}
    ]


def test_the_last_metrics_are_those_of_one_evaluation(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", True)
    log.write({"step": 1, "loss": 3.0, "grad_norm": 1.0})
    log.write({"step": 1, "eval_loss": 4.0, "language_fidelity": 0.0})
    log.write({"step": 2, "eval_loss": 3.0})
    log.write({"step": 3, "loss": 1.0})
    assert last_metrics(tmp_path / "metrics.jsonl") == {"step": 3, "loss": 1.0, "grad_norm": 1.0, "eval_loss": 3.0}


def test_only_whole_numbers_name_checkpoints(tmp_path):
    for name in ("checkpoint-²", "checkpoint-x", "checkpoint-", "checkpoint-10"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-10"]


def one_gone(run):
    """Deletes `final/` and the last checkpoint, as if the run had stopped before its last save."""
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-4")


def test_moved_base_and_data_are_accepted_and_changed_ones_refused(tmp_path, talks, whole_base):
    """A stopped run is moved with its base and data; then the content of one of them changes."""
    (tmp_path / "old").mkdir()
    data = shutil.copy(talks, tmp_path / "old" / "talks.jsonl")
    base = shutil.copytree(whole_base, tmp_path / "old" / "base")
    template = shutil.copy(shipped_folder("data_templates") / "chat" / "chatml.yaml", tmp_path / "old" / "mine.yaml")

    def made(folder, source="talks.jsonl", model="base", **data):
        there = {"path": f"{folder}/{source}"}
        return recipe(
            "sft", folder / "run", [], model={"base": f"{folder}/{model}", "random_init": False}, evaluation=None,
            chat={"template": f"{folder}/{template.name}"}, data={"sources": [there], **data},
        )  # fmt: skip

    train(made(tmp_path / "old"))
    losses = steps(tmp_path / "old" / "run")
    one_gone(tmp_path / "old" / "run")
    new = (tmp_path / "old").rename(tmp_path / "new")
    (new / data.name).rename(new / "renamed.jsonl")
    (new / "linked").symlink_to(new / base.name)
    with logged() as said:
        assert train(made(new, "renamed.jsonl", "linked")).trained
    assert steps(new / "run") == losses
    assert "resuming an unfinished run from checkpoint-2" in said
    assert "the base was moved or renamed (model.base); its content is the same" in said
    assert "the data was moved or renamed (data.sources.0.path); its content is the same" in said
    assert "the template was moved or renamed (chat.template); its content is the same" in said
    assert train(made(new, "../new/renamed.jsonl")).trained is False, "the finished run is the same one too"
    one_gone(new / "run")
    (new / "other.jsonl").write_text((new / "renamed.jsonl").read_text().replace("Roma", "Toma"))
    with pytest.raises(RecipeError) as refused:
        train(made(new, "other.jsonl"))
    values = r'data.sources.0.path: ".*/renamed.jsonl" -> ".*/other.jsonl"'
    remedy = "restore the content or the value of data.sources.0.path, or start again"
    assert re.search(rf"the data changed \(\w+ -> \w+; {values}\); {remedy}", str(refused.value))
    other = shutil.copytree(base if base.exists() else new / "base", new / "other")
    flipped = bytearray((other / "model.safetensors").read_bytes())
    flipped[-2] ^= 1
    (other / "model.safetensors").write_bytes(flipped)
    with pytest.raises(
        RecipeError, match=r'the base model\'s weights changed \(.*; model.base: ".*linked" -> ".*other"'
    ):
        train(made(new, "renamed.jsonl", "other"))
    for saved in (new / "run").glob("checkpoint-*"):
        shutil.rmtree(saved)  # nothing to go on from: it is other data all the same
    with pytest.raises(RecipeError, match="the data changed"):
        train(made(new, "other.jsonl"))
    assert json.loads((new / "run" / "manifest.json").read_text())["recipe"]["data"]["sources"][0]["path"].endswith(
        "renamed.jsonl"
    ), "a refusal writes nothing"


def test_an_output_dir_with_its_data_is_refused_before_anything_is_written(tmp_path, talks):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(talks, folder / "a.jsonl")
    with pytest.raises(
        RecipeError, match=r"output_dir: .*run is inside data.sources.0.path .*: the run would read its own"
    ):
        train(recipe("sft", folder / "run", [folder]))
    assert [path.name for path in folder.iterdir()] == ["a.jsonl"]

"""`--overwrite`: until the new run has a checkpoint, the earlier one can be restored bit for bit."""

import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest

from nesso_tune import DataError, NumericalError, RecipeError, RunEnvironmentError
from nesso_tune.data.prepare import prepare_data
from nesso_tune.run import train
from nesso_tune.runs import checkpoint
from nesso_tune.runs.checkpoint import checkpoints
from nesso_tune.runs.disk_space import DiskSpace
from nesso_tune.runs.layout import FAILED_METRICS, OVERWRITTEN, has_overwritten
from nesso_tune.runs.run_directory import open_run
from nesso_tune.training.sft import ConversationTrainer
from tests.support.logs import logged
from tests.support.runs import main_here, recipe, several, sums, thorough, write_recipe

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
MINE = "notes.md"  # the user's own file beside a run
BEYOND = 10_000  # a write that no run comes to


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run with other files in its folder: the folder and the data."""
    folder = tmp_path_factory.mktemp("made")
    rows = sums(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NESSO_TUNE_CACHE", str(folder / "cache"))
        train(recipe("sft", folder / "run", [rows], evaluation=None))
    run = folder / "run"
    shutil.copytree(run / "checkpoint-2", run / "damaged-checkpoint-2")
    (run / "later-checkpoint-3").mkdir()
    (run / "checkpoint-9").symlink_to(folder / "nowhere")
    (run / "checkpoint-mine").mkdir()
    (run / MINE).write_text("mine")
    return run, rows


@pytest.fixture
def earlier(made, tmp_path):
    """A copy of that run, its recipe, another recipe with the same output_dir, and its content."""
    run = copied(made, tmp_path)
    old, new = (recipe("sft", run, [made[1]], evaluation=None, **more) for more in ({}, {"seed": 7}))
    return run, old, new, content(run)


def copied(made, folder):
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(made[0], run, symlinks=True)
    return run


def content(run):
    """{name: hash of the content} of a run directory, except for the lock and the metrics of a failed run."""
    found = {}
    for path in run.rglob("*"):
        if path.name not in (".lock", FAILED_METRICS):
            of = os.readlink(path) if path.is_symlink() else ""
            whole = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(run))] = of or whole
    return found


def killed(run, write, do):
    """Runs `do` in a child process that kills itself at a write to the run directory; returns whether it did."""
    if (child := os.fork()) == 0:
        try:
            kill_at(run, write)
            do()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), "it failed"
    return status != 0


def kill_at(run, write):
    """This process kills itself before a write; tensor files count twice, the second time when half written."""
    seen, save = itertools.count(1), checkpoint.save_tensors

    def count():
        if next(seen) == write:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event not in EVENTS or (event == "open" and not set(str(arguments[1])) & set("wax+")):
            return
        relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # as rmtree removes
        if relative or str(arguments[0]).startswith(f"{run}/"):
            count()

    def torn(tensors, file):
        count()
        save(tensors, file)
        os.truncate(file, Path(file).stat().st_size // 2)
        count()
        save(tensors, file)

    checkpoint.save_tensors = torn
    sys.addaudithook(hook)


def test_killed_at_every_rename(earlier):
    """Killed while the run is moved aside, and killed again while it is restored: it is always restored."""
    run, old, new, before = earlier
    again = 0
    for write in itertools.count(1):
        ended = not killed(run, write, lambda: open_run(new, overwrite=True))
        for later in itertools.count(1) if ended or write % 7 == 0 else ():
            if not killed(run, later, lambda: open_run(old)):
                break
            again += 1
        pending = has_overwritten(run)
        with logged() as said:
            opened = open_run(old)
        assert opened.finished
        assert content(run) == before, f"killed at write {write}"
        assert bool(said) == pending
        opened.close()
        if ended:
            break
    assert write > 12
    assert again > 10


@pytest.mark.parametrize(("every", "after"), [(15, 1), pytest.param(1, 40, marks=thorough)])
def test_killed_at_any_write_up_to_the_first_checkpoint(earlier, made, tmp_path, every, after):
    """Before the first checkpoint the earlier run is restored; after it the new one is resumed."""
    run, old, new, before = earlier
    for some in (old, new):
        prepare_data(some)
    stood = went_on = 0
    for write in itertools.count(every, every):
        if went_on == after:
            break
        assert killed(run, write, lambda: train(new, overwrite=True))
        if checkpoints(run) and '"seed": 7' in (run / "manifest.json").read_text():
            went_on += 1
            assert not killed(run, BEYOND, lambda: train(new)), "without --overwrite"
            assert not has_overwritten(run)
            assert (run / "final").is_dir()
            copied(made, tmp_path)
            continue
        stood += 1
        if write % 3 == 0:
            with pytest.raises(RecipeError, match="seed: 42, the recipe now has 7"):
                train(new)  # which has nothing of its own
        elif write % 3 == 1:
            assert killed(run, write, lambda: train(new, overwrite=True)), "twice in a row"
            assert not train(old).trained
        else:
            assert not train(old).trained
        assert content(run) == before, f"killed at write {write}"
    assert stood >= 2
    print(f"{stood} kills before the first checkpoint, {went_on} after it")


def damaged_base(folder, base, name):
    shutil.copytree(base, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[: 200 if name.endswith(".json") else -100])
    return {"base": str(folder), "random_init": False}


def poisoned(monkeypatch, step):
    compute = ConversationTrainer.compute_loss

    def wrong(self, *arguments, **options):
        loss = compute(self, *arguments, **options)
        return loss * math.nan if self.state.global_step + 1 == step else loss

    monkeypatch.setattr(ConversationTrainer, "compute_loss", wrong)


def interrupted(monkeypatch, error):
    def stop(self, *_, **__):
        raise error

    monkeypatch.setattr(ConversationTrainer, "compute_loss", stop)


@pytest.mark.parametrize(
    ("fails_at", "code"),
    [("data", 3), ("tokenizer", 4), ("base", 4), ("disk", 5), ("write", 5), ("first step", 6), ("Ctrl-C", 75),
     ("launcher", 2)],
)  # fmt: skip
def test_the_earlier_run_survives_a_failing_recipe(
    earlier, tmp_path, whole_base, monkeypatch, capsys, write_rows, fails_at, code
):
    run, old, new, before = earlier
    changes, data, flags = {}, new.data.sources[0].path, []
    if fails_at == "data":
        data = write_rows([{"prompt": "", "response": ""}], "empty.jsonl")
    elif fails_at == "tokenizer":
        changes["model"] = damaged_base(tmp_path / "base", whole_base, "tokenizer.json")
    elif fails_at == "base":
        changes["model"] = damaged_base(tmp_path / "base", whole_base, "model.safetensors")
    elif fails_at == "disk":
        monkeypatch.setattr(DiskSpace, "free", lambda self: 1000)
    elif fails_at == "write":
        interrupted(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    elif fails_at == "first step":
        poisoned(monkeypatch, 1)
    elif fails_at == "Ctrl-C":
        interrupted(monkeypatch, KeyboardInterrupt())
    else:
        changes["train"] = {"schedule": {"warmup_steps": 9}}
    failing = recipe("sft", run, [data], evaluation=None, seed=7, **changes)
    ended, _, said = main_here(capsys, "train", write_recipe(tmp_path / "new.yaml", failing), "--overwrite", *flags)
    assert ended == code, said
    assert content(run) == before
    assert not has_overwritten(run)
    assert ("the earlier run is restored" in said) == (fails_at not in ("launcher", "tokenizer")), said
    assert (run / FAILED_METRICS).exists() == (fails_at == "first step")
    assert not train(old).trained


def test_the_earlier_run_is_deleted_at_the_first_checkpoint(earlier, monkeypatch):
    """A new run that fails later is resumed, without --overwrite."""
    run, _, new, _ = earlier
    there, save = [], ConversationTrainer._save_checkpoint

    def seen(self, *arguments):
        there.append(has_overwritten(run))
        save(self, *arguments)
        there.append(has_overwritten(run))

    monkeypatch.setattr(ConversationTrainer, "_save_checkpoint", seen)
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, 3)
        with logged() as said, pytest.raises(NumericalError, match="checkpoint-2 is intact"):
            train(new, overwrite=True)
    assert there == [True, False]
    assert said[-1] == "to resume this run, omit --overwrite, which would start it again"
    left = {path.name for path in run.iterdir()}
    assert {MINE, "checkpoint-mine", "checkpoint-2"} < left
    gone = ("final", "damaged", "later", "failed", OVERWRITTEN, f".{OVERWRITTEN}")
    assert not [name for name in left if name.startswith(gone)]
    assert train(new).trained
    assert json.loads((run / "manifest.json").read_text())["recipe"]["seed"] == 7


@pytest.mark.parametrize("its_own", [True, False], ids=["made by the run", "the user's"])
def test_an_existing_empty_folder_is_not_removed(tmp_path, write_rows, its_own):
    folder = tmp_path / "run"
    if not its_own:
        folder.mkdir()
    empty = recipe("sft", folder, [write_rows([{"prompt": "", "response": ""}])])
    for overwrite in (False, True):
        with pytest.raises(DataError):
            train(empty, overwrite=overwrite)
        assert folder.exists() != its_own
    assert its_own or not list(folder.iterdir())


def test_a_named_checkpoint_of_a_run_that_was_being_overwritten(earlier, tmp_path, capsys):
    run, old, new, _ = earlier
    shutil.rmtree(run / "final")
    before = content(run)
    assert not killed(run, BEYOND, lambda: open_run(new, overwrite=True))
    path, named = write_recipe(tmp_path / "old.yaml", old), run / "checkpoint-2"
    assert main_here(capsys, "train", path, "--resume", run / "checkpoint-3")[0] == 2
    assert not named.exists()
    code, _, said = main_here(capsys, "train", path, "--resume", named)
    assert code == 0, said
    assert "resuming an unfinished run from checkpoint-2" in said
    assert (run / "later-checkpoint-4").is_dir()
    assert before.items() >= {k: v for k, v in content(run).items() if k.startswith("checkpoint-2/")}.items()


def test_a_user_folder_with_the_name_of_the_overwritten_run(earlier):
    """It is not mistaken for an earlier run, and not overwritten."""
    run, old, new, before = earlier
    (run / OVERWRITTEN).mkdir()
    (run / OVERWRITTEN / "thesis.txt").write_text("mine")
    opened = open_run(old)
    assert opened.finished
    opened.close()
    with pytest.raises(RunEnvironmentError, match=f"{OVERWRITTEN}: is the name .* earlier run; rename"):
        open_run(new, overwrite=True)
    assert content(run) == before | {
        OVERWRITTEN: False,
        f"{OVERWRITTEN}/thesis.txt": content(run)[f"{OVERWRITTEN}/thesis.txt"],
    }


def test_disk_space_of_both_runs(earlier, monkeypatch):
    """The earlier run occupies its space until the first checkpoint is saved."""
    run, _, new, before = earlier
    one = sum(file.stat().st_size for file in (run / "checkpoint-4").iterdir())
    monkeypatch.setattr(DiskSpace, "free", lambda self: one // 2)
    with pytest.raises(RunEnvironmentError, match=r"the first checkpoint needs .* and the earlier run \(.*\) is kept"):
        train(new, overwrite=True)
    assert content(run) == before
    monkeypatch.setattr(DiskSpace, "free", lambda self: one + one // 4)
    assert train(new, overwrite=True).trained, "too little for two checkpoints and final/"


@pytest.mark.parametrize("number", [errno.ENOLCK, pytest.param(errno.EOPNOTSUPP, marks=thorough)])
def test_a_file_system_without_locks(tmp_path, talks, capsys, monkeypatch, number):
    """The errors of Lustre without `-o flock` and of NFS without a lock manager, in the run and in the cache."""
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks]))
    flock, refused = fcntl.flock, [str(tmp_path / "run")]

    def refuse(file, operation):
        if os.readlink(f"/proc/self/fd/{file}").startswith(refused[0]):
            raise OSError(number, os.strerror(number))
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    remedies = {"run": "set another output_dir", "cache": "set NESSO_TUNE_CACHE to a folder on another disk"}
    for folder, instead in remedies.items():
        refused[0] = str(tmp_path / folder)
        code, _, said = main_here(capsys, "train", path)
        assert code == 5, said
        assert f"{tmp_path / folder}" in said
        assert f"does not support file locks ([Errno {number}]" in said
        assert "`-o flock`" in said
        assert instead in said
        assert not (tmp_path / "run").exists()


@thorough
def test_one_of_two_processes_fails(earlier, tmp_path):
    run, _, new, before = earlier
    some = recipe("sft", run, [new.data.sources[0].path], evaluation=None, seed=7, train={"micro_batch_size": 1},
                  distributed={"fsdp": "full_shard"})  # fmt: skip
    done = several("train", write_recipe(tmp_path / "r.yaml", some), "--overwrite", module="tests.support.poisoned",
                   NAN_AT_STEP="1", NAN_AT_RANK="1")  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("the earlier run is restored") == 1, done.stderr
    assert content(run) == before

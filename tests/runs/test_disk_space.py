"""A full disk at any write: exit code 5 with the space needed and free; nothing is lost, and the run resumes."""

import errno
import os
import re
import subprocess
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from nesso_tune.errors import is_disk_full
from nesso_tune.runs.checkpoint import checkpoints, read_manifest
from nesso_tune.runs.disk_space import DiskSpace, saves_left
from nesso_tune.training.sft import ConversationTrainer
from tests.support.runs import main_here, recipe, steps, thorough, write_recipe

SIZE = 160 << 20
STEPS = {"train": {"max_steps": 4}, "checkpoint": {"every_steps": 1}, "evaluation": {"every_steps": 2, "samples": 0}}
RUNTIME = r"the disk is full: (a checkpoint|checkpoint-\d) needs [\d.]+ [KM]?B"


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system of 160 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk, leave):
    """Fills the disk with a file, up to the number of bytes to leave free."""
    free = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        left = free.f_bavail * free.f_frsize - leave
        while left > 0:
            left -= file.write(bytes(min(left, 1 << 20)))


@pytest.fixture
def filled_at(monkeypatch):
    """Fills the disk before a step."""

    def at(disk, step, leave):
        original, done = ConversationTrainer.training_step, []

        def training_step(self, *arguments, **options):
            if self.state.global_step + 1 == step and not done:
                done.append(fill(disk, leave))
            return original(self, *arguments, **options)

        monkeypatch.setattr(ConversationTrainer, "training_step", training_step)

    return at


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights and losses of an undisturbed run, and the size of its checkpoint."""
    return {}


def undisturbed(whole, tmp_path, talks, capsys):
    if not whole:
        path = write_recipe(tmp_path / "w.yaml", recipe("sft", tmp_path / "whole", [talks], **STEPS))
        assert main_here(capsys, "train", path)[0] == 0
        run = tmp_path / "whole"
        whole |= {"weights": load_file(run / "final" / "model.safetensors"), "losses": steps(run)}
        whole["checkpoint"] = sum(f.stat().st_size for f in (run / "checkpoint-4").iterdir())
    return whole


SHARES = [0.0, 0.05, 0.3, 0.34, 0.6, 0.99, 1.0, 1.01, 1.2, 1.32, 1.34]
# one of each kind of write that fails; by hand all
EACH_WRITE = {True: (0.0, 1.2), False: (0.3, 1.01)}


@pytest.mark.parametrize(
    ("share", "seen"),
    [pytest.param(share, seen, id=f"{share}{'' if seen else ' quota'}",
                  marks=() if share in EACH_WRITE[seen] else thorough) for seen in (True, False) for share in SHARES],
)  # fmt: skip
def test_a_disk_that_fills_up_at_any_write(tmp_path, small_disk, talks, capsys, filled_at, monkeypatch, whole, share,
                                           seen):  # fmt: skip
    """`quota`: the check of free space passes, so the writes themselves fail."""
    whole = undisturbed(whole, tmp_path, talks, capsys)
    if not seen:
        monkeypatch.setattr(DiskSpace, "free", lambda self: 1 << 40)
    filled_at(small_disk, 4, int(share * whole["checkpoint"]))
    run = small_disk / "run"
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", run, [talks], **STEPS))
    code, _, said = main_here(capsys, "train", path)
    (small_disk / "filler").unlink(missing_ok=True)
    saved = [c.name for c in checkpoints(run)]
    if code != 0:
        assert code == 5, said
        assert re.search(RUNTIME, said), said
        assert re.search(r"[\d.]+ [KMGT]?B are free; free some space; the same command continues from", said)
        assert "Traceback" not in said
        assert f"continues from {saved[0]}" in said
        assert not list(run.glob(".*.partial")), "partial files are deleted"
    assert saved[-3:] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"] or saved[0] == "checkpoint-4"
    for checkpoint in checkpoints(run):
        read_manifest(checkpoint)
    assert main_here(capsys, "train", path)[0] == 0, "there is space again"
    final = load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(whole["weights"][name], final[name]) for name in final)
    assert steps(run) == whole["losses"]


def test_a_run_that_does_not_fit_does_not_start(tmp_path, small_disk, talks, capsys):
    fill(small_disk, 3 << 20)
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", small_disk / "run", [talks], **STEPS))
    code, _, said = main_here(capsys, "train", path)
    assert code == 5
    assert re.search(
        r"the disk is full for this run: 4 more checkpoint\(s\) and final/ need [\d.]+ MB, [\d.]+ MB", said
    )
    assert "checkpoint.keep" in said
    assert "step 1/" not in said, "before the first step"
    (small_disk / "filler").unlink()
    assert main_here(capsys, "train", path)[0] == 0


def test_a_disk_without_space_for_a_manifest(tmp_path, small_disk, talks, capsys):
    fill(small_disk, 0)
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", small_disk / "run", [talks], **STEPS))
    code, _, said = main_here(capsys, "train", path)
    assert code == 5
    assert "the disk is full" in said
    (small_disk / "filler").unlink()
    assert main_here(capsys, "train", path)[0] == 0


@pytest.mark.parametrize("leave", [0, 8192, pytest.param(20000, marks=thorough)])
def test_no_space_for_the_prepared_data(tmp_path, small_disk, talks, capsys, monkeypatch, leave):
    monkeypatch.setenv("NESSO_TUNE_CACHE", str(small_disk / "cache"))
    fill(small_disk, leave)
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks], **STEPS))
    code, _, said = main_here(capsys, "train", path)
    assert code == 5
    assert "the disk is full" in said
    assert "internal error" not in said
    (small_disk / "filler").unlink()
    assert main_here(capsys, "train", path)[0] == 0


def test_a_disk_that_cannot_be_written(tmp_path, small_disk, talks, capsys):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", small_disk / "run", [talks], **STEPS))
    code, _, said = main_here(capsys, "train", path)
    assert code == 5
    assert "cannot be written" in said


@pytest.mark.parametrize(
    ("steps", "every", "begun", "left"),
    [(10, 3, 0, 4), (9, 3, 0, 3), (10, 3, 3, 3), (10, None, 0, 0), (10, 3, 10, 0), (10, 100, 5, 1), (10, 1, 9, 1)],
)
def test_saves_left(steps, every, begun, left):
    counted = [s for s in range(begun + 1, steps + 1) if every and (s == steps or s % every == 0)]
    assert saves_left(steps, every, begun) == left == len(counted)


def test_errors_of_a_full_disk():
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert is_disk_full(Exception("No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    with pytest.raises(ValueError, match="y") as caught, suppressing():
        raise OSError(errno.ENOSPC, "x")
    assert is_disk_full(caught.value), "an error raised while handling it"


@contextmanager
def suppressing():
    """Replaces an error by another one, as some libraries do."""
    try:
        yield
    except OSError:
        raise ValueError("y") from None

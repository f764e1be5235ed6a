"""Checkpoints that are written while training goes on: the same bytes, complete or absent, and errors surface."""

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.run import train
from nesso_tune.runs import checkpoint as ckpt
from nesso_tune.training import checkpoint
from tests.support.processes import Forked
from tests.support.runs import command, metrics, recipe, several, steps, sums, thorough, write_recipe

PLAN = {"train": {"max_steps": 8}, "evaluation": None}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return sums(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def at_once(tmp_path_factory, rows):
    """A run whose checkpoints are written before training goes on."""
    folder = tmp_path_factory.mktemp("at_once")
    os.environ["NESSO_TUNE_CACHE"] = str(folder / "cache")
    train(
        recipe("sft", folder / "run", [rows], checkpoint={"every_steps": 2, "keep": 9, "asynchronous": False}, **PLAN)
    )
    return folder / "run"


def asynchronous(path, rows, **section):
    return recipe(
        "sft", path, [rows], checkpoint={"every_steps": 2, "keep": 9, "asynchronous": True, **section}, **PLAN
    )


def hashes(saved):
    """{file: SHA-256} of a checkpoint's files, verified, without those that hold the time."""
    files = ckpt.read_manifest(saved)["files"]
    timed = ("counters-", "trainer_state")
    return {name: record["sha256"] for name, record in files.items() if not name.startswith(timed)}


def shard_contents(saved):
    """As `hashes`, of shards by their header and data: torch writes the metadata of a shard in any order."""
    contents = hashes(saved)
    for name in (name for name in contents if name.startswith("shard-")):
        raw = (saved / name).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        contents[name] = json.loads(raw[8:end]), raw[end:]
    return contents


def test_the_same_bytes_though_training_goes_on_during_the_write(tmp_path, rows, at_once, monkeypatch):
    """Each write of a file waits until two more steps are logged, and sees no checkpoint of its step meanwhile."""
    run, save, waited = tmp_path / "run", ckpt.save_tensors, []

    def save_later(tensors, file):
        step = int(file.parent.name.split("-")[1].split(".")[0])
        deadline = time.monotonic() + 60
        while step < 8 and max(steps(run)) < step + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        waited.append(
            (step, threading.current_thread() is threading.main_thread(), (run / f"checkpoint-{step}").exists())
        )
        save(tensors, file)

    monkeypatch.setattr(ckpt, "save_tensors", save_later)
    train(asynchronous(run, rows))
    assert waited == [(step, False, False) for step in (2, 4, 6, 8) for _ in range(2)]
    for saved in ckpt.checkpoints(at_once):
        assert hashes(run / saved.name) == hashes(saved), saved.name
    assert len(ckpt.checkpoints(run)) == 4, "the run has waited for the last one"
    assert steps(run) == steps(at_once)


@pytest.mark.parametrize(
    ("step", "saved"), [(4, ["checkpoint-2"]), (8, ["checkpoint-6", "checkpoint-4", "checkpoint-2"])]
)
def test_an_error_of_the_write_ends_the_run(tmp_path, rows, monkeypatch, step, saved):
    """During training, and at the end, where nothing follows."""
    save = ckpt.save_tensors

    def fail(tensors, file):
        if file.parent.name == f".checkpoint-{step}.partial":
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        save(tensors, file)

    monkeypatch.setattr(ckpt, "save_tensors", fail)
    with pytest.raises(RunEnvironmentError, match="the disk is full: a checkpoint needs"):
        train(asynchronous(tmp_path / "run", rows))
    assert [path.name for path in ckpt.checkpoints(tmp_path / "run")] == saved
    assert not list((tmp_path / "run").glob("*.partial")) + list((tmp_path / "run").glob(".*.partial"))
    assert not (tmp_path / "run" / "final").exists()


def test_an_error_of_the_run_waits_for_the_write(tmp_path, rows, monkeypatch):
    save = ckpt.save_tensors
    monkeypatch.setattr(ckpt, "save_tensors", lambda tensors, file: (time.sleep(0.3), save(tensors, file)))
    monkeypatch.setattr(checkpoint.Checkpointer, "raise_if_failed", lambda self: 1 / (self._write is None))
    with pytest.raises(ZeroDivisionError):
        train(asynchronous(tmp_path / "run", rows))
    assert [path.name for path in ckpt.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert hashes(tmp_path / "run" / "checkpoint-2")


def test_a_run_killed_during_the_write_resumes_from_the_checkpoint_before(tmp_path, rows, at_once):
    """Half of a file is written when two more steps are done: it never counts as a checkpoint."""
    run, path = tmp_path / "run", write_recipe(tmp_path / "r.yaml", asynchronous(tmp_path / "run", rows))
    process = Forked("train", path, module="tests.support.half_written", STOPS_AT="4")
    deadline = time.monotonic() + 120
    half = run / ".checkpoint-4.partial" / ckpt.MOMENTS
    while not half.exists() or max(steps(run)) < 5:
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in ckpt.checkpoints(run)] == ["checkpoint-2"]
    done = command("train", path)
    assert done.returncode == 0, done.stderr
    assert "resuming an unfinished run from checkpoint-2" in done.stderr
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (at_once, run))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert steps(run) == steps(at_once)
    assert [line["step"] for line in metrics(run) if line.get("event") == "resumed"] == [2]
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 4, 6, 8)}


def test_auto_writes_in_the_background_what_is_large_and_fits_twice(tmp_path, monkeypatch):
    class Trainer:
        class accelerator:  # noqa: N801
            num_processes = 4

    ranks = [True]  # what the others find
    monkeypatch.setattr(checkpoint, "gather_object", lambda own: own + ranks)

    def decides(size, sharded=False, setting="auto", free=10**9):
        monkeypatch.setattr(checkpoint, "available_memory", lambda: free)
        disk, section = checkpoint.DiskSpace(tmp_path, size, 0), checkpoint.CheckpointSection(asynchronous=setting)
        return checkpoint.Checkpointer(disk, section, sharded, None, 60)._in_background(Trainer)

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert decides(500_000_000)
    assert not decides(500_000_001)
    assert decides(1_000_000_000, sharded=True), "each node holds half of it"
    assert not decides(99_999_999), "it takes a moment"
    assert decides(1, setting=True)
    assert not decides(500_000_000, setting=False)
    ranks[0] = False
    assert not decides(500_000_000), "all ranks or none"


def test_the_free_memory_is_that_of_the_tightest_control_group(tmp_path, monkeypatch):
    whole = checkpoint.available_memory()
    assert whole > 0
    own = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
    monkeypatch.setattr(checkpoint, "CONTROL_GROUPS", tmp_path)
    (tmp_path / own).mkdir(parents=True, exist_ok=True)
    for name, text in (("max", "3000000"), ("current", "2000000"), ("stat", "anon 5\ninactive_file 500000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert checkpoint.available_memory() == 1_500_000


@thorough
@pytest.mark.parametrize("fsdp", ["full_shard", "hybrid_shard"])
def test_shards_have_the_same_bytes_in_both_ways(tmp_path, rows, fsdp):
    nodes = [{"LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2} for rank in range(4)]
    saved = []
    for name in (False, True):
        some = recipe(
            "sft", tmp_path / str(name), [rows], train={"max_steps": 4, "micro_batch_size": 1}, evaluation=None,
            distributed={"fsdp": fsdp, "state_dict": "sharded"}, checkpoint={"every_steps": 2, "asynchronous": name},
        )  # fmt: skip
        path = write_recipe(tmp_path / f"{name}.yaml", some)
        done = several("train", path, processes=4, own=nodes)
        assert done.returncode == 0, done.stderr[-3000:]
        saved.append({path.name: shard_contents(path) for path in ckpt.checkpoints(tmp_path / str(name))})
    assert saved[0] == saved[1]
    assert len([name for name in saved[0]["checkpoint-2"] if name.startswith("shard-")]) == 4

"""Ranks that do not join or are lost are named once, within the timeout, with exit code 5."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from nesso_tune.distributed.membership import nodes_of
from tests.support.processes import Forked
from tests.support.runs import ROOT, command, lonely, recipe, several, thorough, write_recipe
from tests.test_kill import environment_of, when_at, workers

SHARED = {"micro_batch_size": 1, "global_batch_size": 2}


@pytest.fixture
def path(tmp_path, talks):
    """A recipe with many steps and a timeout of five seconds."""
    some = recipe(
        "sft", tmp_path / "run", [talks], train={**SHARED, "max_steps": 2000}, checkpoint={"every_steps": 3},
        evaluation=None, distributed={"fsdp": "none", "timeout_s": 5},
    )  # fmt: skip
    return write_recipe(tmp_path / "r.yaml", some)


def test_a_rank_that_does_not_join_is_named_within_the_timeout(path, port):
    began = time.monotonic()
    done = command("train", path, **lonely(0, port))
    assert done.returncode == 5
    assert done.stderr.endswith(
        "node 1 (rank 1): did not join within 5 s; check that the node is up and its process was launched\n"
    )
    assert time.monotonic() - began < 120, "libraries load slowly on a busy machine; the default timeout is 1800 s"


def test_an_unreachable_first_node(path, port):
    done = command("train", path, **lonely(1, port))
    assert done.returncode == 5
    assert f"127.0.0.1:{port}: cannot be reached from {socket.gethostname()} (rank 1)" in done.stderr


def test_a_port_in_use(path, port):
    with socket.socket() as holder:
        holder.bind(("", port))
        holder.listen()
        done = command("train", path, **lonely(0, port))
    assert done.returncode == 5
    assert f"127.0.0.1:{port}: is in use; set another port: --master_port of torchrun" in done.stderr


@pytest.mark.parametrize("victim", [pytest.param(0, marks=thorough), 1])  # rank 0 is killed under a launcher below
def test_a_killed_rank_is_named_by_a_remaining_one(path, tmp_path, port, victim):
    """Without a launcher, which would end the other ranks: the remaining rank must detect the loss."""
    both = [Forked("train", path, CUDA_VISIBLE_DEVICES="", **{**lonely(rank, port), "LOCAL_RANK": str(rank)})
            for rank in range(2)]  # fmt: skip
    when_at(both[0], tmp_path / "run", 3, None)
    both[victim].kill()
    assert both[1 - victim].wait(120) == 5
    said = both[1 - victim].stderr
    assert said.count("lost contact with") == 1
    machine = socket.gethostname()
    assert f"rank {1 - victim} on {machine}: lost contact with rank {victim} on {machine} (" in said


@thorough  # without one: the test above
def test_under_a_launcher_one_remaining_rank_names_a_killed_one(path, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--rdzv_backend=c10d",
                "--rdzv_endpoint=localhost:0", "-m", "nesso_tune", "train", path]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.Popen(
        # without `--verify none`, rank 0 has a child, which has its environment
        [*launcher, "--set", "train.global_batch_size=3", "--verify", "none"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    when_at(run, tmp_path / "run", 3, None)
    (first,) = [pid for pid in workers(run.pid) if b"RANK=0" in environment_of(pid)]
    os.kill(first, signal.SIGKILL)
    _, said = run.communicate(timeout=120)
    assert run.returncode != 0
    assert said.count("lost contact with rank 0 on ") == 1


def test_an_error_of_one_rank_is_printed_once(path):
    done = several("train", path, module="tests.support.failing")
    assert done.returncode != 0
    assert done.stderr.count("the disk is full: a checkpoint needs") == 1
    assert "lost contact" not in done.stderr


def test_a_missing_master_address(path):
    done = command("train", path, WORLD_SIZE="2", RANK="0")
    assert done.returncode == 5
    assert "MASTER_ADDR, MASTER_PORT: are not set, but WORLD_SIZE is 2" in done.stderr


def test_missing_nodes_have_their_slurm_names(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert nodes_of([2, 3, 5]) == ["node 1 (rank 2, 3)", "node 2 (rank 5)"]
    (fake := tmp_path / "scontrol").write_text("#!/bin/sh\necho lrdn01; echo lrdn02\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "lrdn[01-02]")
    assert nodes_of([2, 3, 5]) == ["lrdn02 (rank 2, 3)", "node 2 (rank 5)"]

"""A run that is killed between two checkpoints and started again ends with the same bits."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from nesso_tune.run import train
from nesso_tune.runs.checkpoint import WEIGHTS
from tests.support.processes import Forked
from tests.support.runs import ROOT, command, metrics, recipe, thorough, write_recipe


def start(*paths):
    """The run, or a chain of them, in a process of its own."""
    return Forked("train", *paths)


def kill_at(process, run, step):
    """SIGKILL as soon as a step is in metrics.jsonl."""
    when_at(process, run, step, signal.SIGKILL)
    process.wait()


def last_step(run):
    """The last step in a metrics.jsonl that is being written: its last line may not be whole yet."""
    file = run / "metrics.jsonl"
    whole = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return max((line["step"] for line in map(json.loads, whole) if "loss" in line), default=0)


def when_at(process, run, step, number):
    """Sends a signal (or none) as soon as a step is in metrics.jsonl."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it was killed"
        if last_step(run) >= step:
            if number is not None:
                process.send_signal(number)
            return
        time.sleep(0.005)
    pytest.fail("the run did not come that far")


def test_a_chain_killed_in_its_second_run_resumes_there(tmp_path, talks, pairs):
    first = recipe("sft", tmp_path / "sft", [talks], train={"max_steps": 3})
    base = {"base": str(tmp_path / "sft" / "final"), "random_init": False}
    plan = {"train": {"max_steps": 30}, "checkpoint": {"every_steps": 10}, "evaluation": None}
    second = recipe("dpo", tmp_path / "dpo", [pairs], model=base, **plan)
    paths = [write_recipe(tmp_path / "a.yaml", first), write_recipe(tmp_path / "b.yaml", second)]
    kill_at(start(*paths), tmp_path / "dpo", 14)
    model = tmp_path / "sft" / "final" / "model.safetensors"
    before = model.stat().st_mtime_ns
    done = command("train", *paths)
    assert done.returncode == 0, done.stderr
    assert "a.yaml: this run is finished" in done.stderr
    assert "b.yaml: resuming an unfinished run from checkpoint-10" in done.stderr
    assert model.stat().st_mtime_ns == before, "the first is not repeated"
    assert (tmp_path / "dpo" / "final" / "model.safetensors").is_file()
    alone = recipe("dpo", tmp_path / "alone", [pairs], model=base, **plan)
    assert command("train", write_recipe(tmp_path / "c.yaml", alone)).returncode == 0
    a, b = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("alone", "dpo"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed():
    """The weights of an undisturbed run, once it was trained."""
    return {}


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=thorough), pytest.param(signal.SIGINT, marks=thorough)],
)
def test_a_signal_saves_a_checkpoint_and_exits_with_75(tmp_path, talks, undisturbed, number):
    sections = {"train": {"max_steps": 40}, "checkpoint": {"every_steps": 30}, "evaluation": None}
    stopped = tmp_path / "stopped"
    if not undisturbed:
        undisturbed |= load_file(train(recipe("sft", tmp_path / "whole", [talks], **sections)).model_dir / WEIGHTS)
    path = write_recipe(tmp_path / "stopped.yaml", recipe("sft", stopped, [talks], **sections))
    process = start(path)
    when_at(process, stopped, 5, number)
    assert process.wait(60) == 75
    assert not (stopped / "final").exists()
    (saved,) = stopped.glob("checkpoint-*")
    step = int(saved.name.rsplit("-", 1)[-1])
    assert 5 <= step < 30
    assert metrics(stopped)[-1] == {"step": step, "event": "preempted"}
    done = command("train", path)
    assert done.returncode == 0, done.stderr
    final = load_file(stopped / "final" / WEIGHTS)
    assert all(torch.equal(undisturbed[name], final[name]) for name in final)


def test_asked_to_stop_before_the_first_step(tmp_path, talks):
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks], train={"max_steps": 4000}))
    process = start(path)
    while not (tmp_path / "run").exists():  # the libraries are loaded, and the data is not
        assert process.poll() is None
        time.sleep(0.002)
    process.terminate()
    assert process.wait(60) == 75
    assert "SIGTERM: received before training began; run the same command to start again" in process.stderr


def test_asked_to_stop_in_the_last_step_of_the_first_of_a_chain(tmp_path, talks, pairs):
    first = recipe("sft", tmp_path / "sft", [talks], train={"max_steps": 6})
    base = {"base": str(tmp_path / "sft" / "final"), "random_init": False}
    second = recipe("dpo", tmp_path / "dpo", [pairs], model=base, train={"max_steps": 4000})
    process = start(*(write_recipe(tmp_path / f"{some.method}.yaml", some) for some in (first, second)))
    when_at(process, tmp_path / "sft", 6, signal.SIGTERM)
    assert process.wait(60) == 75
    assert (tmp_path / "sft" / "final").exists(), "a run at its end is exported"
    assert not (tmp_path / "dpo" / "final").exists()


@pytest.mark.parametrize(
    ("number", "to_all"),
    [pytest.param(signal.SIGTERM, False, marks=thorough), pytest.param(signal.SIGINT, True, marks=thorough),
     pytest.param(signal.SIGHUP, False, marks=thorough)],
    ids=["TERM to the launcher", "Ctrl-C, which all get", "HUP to the launcher"],
)  # fmt: skip
def test_a_signal_to_the_launcher_saves_the_run(tmp_path, talks, number, to_all):
    batch = {"max_steps": 2000, "micro_batch_size": 1, "global_batch_size": 2}
    some = recipe("sft", tmp_path / "run", [talks], train=batch, evaluation=None, distributed={"fsdp": "none"})
    launch = [sys.executable, "-m", "nesso_tune", "launch", write_recipe(tmp_path / "r.yaml", some),
              "--gpus-per-node", "2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        launch, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    when_at(process, tmp_path / "run", 5, None)
    below = workers(process.pid)
    (os.killpg if to_all else os.kill)(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert said.count("the same command continues") == 1
    assert "Traceback" not in said
    assert len(below) >= 2
    assert not [pid for pid in below if os.path.exists(f"/proc/{pid}")], "no process is left"
    assert list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "final").exists()


@thorough  # without a launcher: tests/distributed/test_membership.py
def test_a_killed_rank_ends_the_run_and_is_named(tmp_path, talks):
    rank = 1
    batch = {"max_steps": 60, "micro_batch_size": 1, "global_batch_size": 2}
    some = recipe("sft", tmp_path / "run", [talks], train=batch, checkpoint={"every_steps": 3}, evaluation=None)
    path = write_recipe(tmp_path / "r.yaml", some)
    launch = [sys.executable, "-m", "nesso_tune", "launch", path, "--gpus-per-node", "2",
              "--set", "distributed.fsdp=none", "--verify", "none"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(launch, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    when_at(process, tmp_path / "run", 5, None)
    (victim,) = [pid for pid in workers(process.pid) if f"RANK={rank}".encode() in environment_of(pid)]
    os.kill(victim, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    machine = socket.gethostname()
    assert f"rank {rank} on {machine}: was killed (SIGKILL)" in said, "the launcher says so"
    assert said.count(f"lost contact with rank {rank} on {machine} (") == 1, "one that lives, too"


def workers(pid):
    """All descendants of a process."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    below: dict[int, list[int]] = {}
    for child, parent in (map(int, line.split()) for line in found.splitlines()):
        below.setdefault(parent, []).append(child)
    out, queue = [], [pid]
    while queue:
        queue += (children := below.get(queue.pop(), []))
        out += children
    return out


def environment_of(pid):
    with open(f"/proc/{pid}/environ", "rb") as stream:
        return stream.read().split(b"\0")

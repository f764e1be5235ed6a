"""A run that is killed between two checkpoints and started again ends with the same bits."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import ROOT, command, metrics, recipe, steps, write_recipe


def start(*paths):
    """The run, or a chain of them, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "nesso_tune", "train", *paths], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )


def kill_at(process, run, step):
    """SIGKILL as soon as a step is in metrics.jsonl."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it was killed"
        if (run / "metrics.jsonl").exists() and max(steps(run), default=0) >= step:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.005)
    pytest.fail("the run did not come that far")


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_killed_and_started_again(tmp_path, request, method):
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    plan = {"max_steps": 40, "schedule": {"warmup_steps": 4, "constant_ratio": 0.8, "min_ratio": 0.3}}
    sections = {"train": plan, "checkpoint": {"every_steps": 10}, "evaluation": {"every_steps": 15}}
    paths = {
        name: write_recipe(tmp_path / f"{name}.yaml", recipe(method, tmp_path / name, [source], **sections))
        for name in ("whole", "killed")
    }
    assert command("train", paths["whole"]).returncode == 0
    killed = tmp_path / "killed"
    for step in (14, 27):
        kill_at(start(paths["killed"]), killed, step)
        assert not (killed / "final").exists()
    done = command("train", paths["killed"])
    assert done.returncode == 0, done.stderr
    a, b = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for key in ("loss", "loss/it", "learning_rate", "eval_loss", "tokens"):
        assert steps(killed, key) == steps(tmp_path / "whole", key), key
    resumed = [line["step"] for line in metrics(killed) if line.get("event") == "resumed"]
    assert resumed == [10, 20]


def test_a_chain_killed_in_its_second_run_goes_on_there(tmp_path, talks, pairs):
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
    assert "b.yaml: an unfinished run: it continues from checkpoint-10" in done.stderr
    assert model.stat().st_mtime_ns == before, "the first is not repeated"
    assert (tmp_path / "dpo" / "final" / "model.safetensors").is_file()
    alone = recipe("dpo", tmp_path / "alone", [pairs], model=base, **plan)
    assert command("train", write_recipe(tmp_path / "c.yaml", alone)).returncode == 0
    a, b = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("alone", "dpo"))
    assert all(torch.equal(a[name], b[name]) for name in a)

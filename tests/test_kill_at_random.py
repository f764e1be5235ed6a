"""Runs that are killed at random moments, every write of a save among them, lose nothing and end with the same bits.

Five kills here; by hand: NESSO_TUNE_KILLS=100 pytest tests/test_kill_at_random.py -s
"""

import os
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nesso_tune.training.checkpoint import checkpoints, read_manifest
from tests.support.runs import ROOT, command, metrics, recipe, steps, write_recipe
from tests.test_kill import kill_at

KILLS = int(os.environ.get("NESSO_TUNE_KILLS", "5"))
STEPS = 48
WRITES = 60  # of two or three saves, or of the end


def start(path, run, write=None):
    """The run in a process of its own, which kills itself at a write."""
    module = "nesso_tune" if write is None else "tests.support.killing"
    variables = {} if write is None else {"KILL_IN": str(run), "KILL_AT_WRITE": str(write)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen([sys.executable, "-m", module, "train", path], cwd=ROOT, env=environment,
                            stderr=subprocess.DEVNULL)  # fmt: skip


def killed_once(path, run, chance):
    """Starts the run and kills it at a random step or write; returns where, or None if it ended before."""
    if chance.random() < 0.5:
        begun = max((int(c.name.split("-")[1]) for c in checkpoints(run)), default=8)
        step = chance.randint(min(begun + 1, STEPS - 1), STEPS - 1)
        kill_at(start(path, run), run, step)
        return f"step {step}"
    write = chance.randint(1, WRITES)
    return f"write {write}" if start(path, run, write).wait(120) == -9 else None


@pytest.mark.parametrize(("method", "kills"), [("sft", KILLS - KILLS // 2), ("dpo", KILLS // 2)])
def test_killed_at_random_moments(tmp_path, request, method, kills):
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    plan = {"max_steps": STEPS, "schedule": {"warmup_steps": 4}}
    sections = {"train": plan, "checkpoint": {"every_steps": 8, "keep": 2}, "evaluation": {"every_steps": 20}}
    names = ("whole", *(f"killed-{i}" for i in range(-(-kills // 10))))  # ten kills on a run are enough
    paths = {
        name: write_recipe(tmp_path / f"{name}.yaml", recipe(method, tmp_path / name, [source], **sections))
        for name in names
    }
    assert command("train", paths["whole"]).returncode == 0
    chance, left = random.Random(method), kills
    for name in names[1:]:
        run, done = tmp_path / name, 0
        kill_at(start(paths[name], run), run, 9)  # now a checkpoint exists; this one is not counted
        while left and done < 10 and not (run / "final").exists():
            where = killed_once(paths[name], run, chance)
            if where is None:
                continue
            left, done = left - 1, done + 1
            print(f"{method} {name}: killed at {where}; whole: {[c.name for c in checkpoints(run)]}", flush=True)
            for whole in checkpoints(run):
                read_manifest(whole)
            assert checkpoints(run), "one is always left"
        end = command("train", paths[name])
        assert end.returncode == 0, end.stderr
        same_run(run, tmp_path / "whole", done)
    assert left == 0, f"{left} of {kills} kills were not made: the runs ended before"


def same_run(run, whole, kills):
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (whole, run))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for key in ("loss", "loss/it", "learning_rate", "grad_norm", "eval_loss", "tokens"):
        assert steps(run, key) == steps(whole, key), key
    resumed = [line for line in metrics(run) if line.get("event") == "resumed"]
    assert len(resumed) in (kills, kills + 1), "one each time, but for a start that found the run finished"

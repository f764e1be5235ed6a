"""Runs that are killed at random moments, every write of a save among them, lose nothing and end with the same bits.

One kill here; by hand: NESSO_TUNE_KILLS=100 NESSO_TUNE_SEED=7 pytest tests/test_kill_at_random.py -s
"""

import os
import random
import shutil
import time
from itertools import count

import pytest
import torch
from safetensors.torch import load_file

from nesso_tune.runs.checkpoint import checkpoints, read_manifest
from tests.support.processes import Forked
from tests.support.runs import command, recipe, steps, thorough, write_recipe
from tests.test_kill import kill_at, last_step

KILLS = int(os.environ.get("NESSO_TUNE_KILLS", "1"))
SEED = os.environ.get("NESSO_TUNE_SEED", "")
STEPS = 48 if KILLS <= 5 else 160  # room for ten kills in one run
WRITES = 60  # of two or three saves, or of the end


def start(path, run, write=None):
    """The run in a process of its own, which kills itself at a write."""
    if write is None:
        return Forked("train", path)
    return Forked("train", path, module="tests.support.killing", KILL_IN=str(run), KILL_AT_WRITE=str(write))


def killed_once(path, run, chance):
    """Starts the run and kills it at a random step or write; returns where, or None if it ended before."""
    if chance.random() < 0.5:
        begun = max((int(c.name.split("-")[1]) for c in checkpoints(run)), default=8)
        step = min(begun + chance.randint(1, 16), STEPS - 1)
        before, process = resumed(run), start(path, run)
        while process.poll() is None and (resumed(run) == before or last_step(run) < step):
            time.sleep(0.005)  # until it has truncated the lines of the previous session
        process.kill()
        return f"step {step}" if process.wait() == -9 else None
    write = chance.randint(1, WRITES)
    return f"write {write}" if start(path, run, write).wait(120) == -9 else None


@pytest.mark.parametrize(("method", "kills"), [pytest.param("sft", KILLS, marks=thorough), ("dpo", KILLS)])
def test_killed_at_random_moments(tmp_path, request, method, kills):
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    plan = {"max_steps": STEPS, "schedule": {"warmup_steps": 4}}
    save = {"every_steps": 8, "keep": 2, "asynchronous": method == "sft"}
    sections = {"train": plan, "checkpoint": save, "evaluation": {"every_steps": 20}}

    def written(name):
        return write_recipe(tmp_path / f"{name}.yaml", recipe(method, tmp_path / name, [source], **sections))

    assert command("train", written("whole")).returncode == 0
    chance, left, runs = random.Random(f"{method}{SEED}"), kills, count()
    print(f"NESSO_TUNE_SEED={SEED}", flush=True)
    while left:
        name, done, early = f"killed-{next(runs)}", 0, 0
        run, path = tmp_path / name, written(name)
        kill_at(start(path, run), run, 9)  # now a checkpoint exists; this one is not counted
        while left and done < 10 and not (run / "final").exists():
            before, where = resumed(run), killed_once(path, run, chance)
            if where is None:
                continue
            left, done = left - 1, done + 1
            early += resumed(run) == before  # at a write before it had gone on
            print(f"{method} {name}: killed at {where}; whole: {[c.name for c in checkpoints(run)]}", flush=True)
            for whole in checkpoints(run):
                read_manifest(whole)
            assert checkpoints(run), "one is always left"
        end = command("train", path)
        assert end.returncode == 0, end.stderr
        same_run(run, tmp_path / "whole", done - early)
        shutil.rmtree(run)


def same_run(run, whole, kills):
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (whole, run))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for key in ("loss", "loss/it", "learning_rate", "grad_norm", "eval_loss", "tokens"):
        assert steps(run, key) == steps(whole, key), key
    assert resumed(run) in (kills, kills + 1), "one each time, but for a start that found the run finished"


def resumed(run):
    """Events of that kind in a metrics.jsonl that may be in the middle of a line."""
    return (run / "metrics.jsonl").read_text(encoding="utf-8").count('"event": "resumed"')

"""Two ranks under FULL_SHARD, killed or stopped at random moments: no hang, and bit-identical final weights.

One kill and one signal by default; by hand: NESSO_TUNE_KILLS=10 NESSO_TUNE_SIGNALS=20 NESSO_TUNE_SEED=7 pytest FILE -s
"""

import os
import random
import signal
import threading
import time
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import Ranks
from tests.support.runs import metrics, recipe, several, steps, thorough, write_recipe
from tests.test_kill import last_step, when_at

KILLS, SIGNALS = (int(os.environ.get(f"NESSO_TUNE_{name}", "1")) for name in ("KILLS", "SIGNALS"))
SEED = os.environ.get("NESSO_TUNE_SEED", "")
HANG_S = 120  # much longer than saving and exiting take
WRITES = (40, 12)  # of each rank, in two or three saves


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folder of the undisturbed run, which the first test that needs it creates."""
    return tmp_path_factory.mktemp("undisturbed") / "whole"


@pytest.fixture
def run(tmp_path, talks, undisturbed):
    """The disturbed run (`go` starts it) and the undisturbed one (`whole`)."""
    return Runs(tmp_path, talks, undisturbed)


class Runs:
    """The same run, undisturbed and disturbed."""

    def __init__(self, folder, talks, whole):
        tries = max(KILLS, SIGNALS)
        self.steps = 30 + 12 * tries
        batch = {"max_steps": self.steps, "micro_batch_size": 1, "global_batch_size": 2}
        sections = {"train": batch, "checkpoint": {"every_steps": 5, "asynchronous": True}, "evaluation": None}
        sections["distributed"] = {"fsdp": "full_shard", "state_dict": "sharded"}
        self.whole, self.path = whole, folder / "run"
        self.recipes = {p: write_recipe(folder / f"{p.name}.yaml", recipe("sft", p, [talks], **sections))
                        for p in (self.whole, self.path)}  # fmt: skip
        self.exit_file = folder / "code"

    def go(self, module="tests.support.fsdp_on_cpu", **variables):
        """Starts the disturbed run in two processes."""
        self.exit_file.unlink(missing_ok=True)
        variables["NESSO_TUNE_EXIT_FILE"] = str(self.exit_file)
        return Ranks("train", self.recipes[self.path], module=module, **variables)

    def further(self, process, chance):
        """Waits for a few more steps."""
        when_at(process, self.path, last_step(self.path) + chance.randint(6, 12), None)

    def assert_identical(self):
        """Finishes both runs and compares them bit by bit."""
        for path in (self.path, self.whole):
            if path == self.whole and (path / "final").exists():
                continue
            done = several("train", self.recipes[path])
            assert done.returncode == 0, done.stderr[-3000:]
        a, b = (load_file(path / "final" / "model.safetensors") for path in (self.whole, self.path))
        assert all(torch.equal(a[name], b[name]) for name in a)
        for key in ("loss", "learning_rate", "grad_norm", "tokens"):
            assert steps(self.path, key) == steps(self.whole, key), key


@thorough
def test_killed_at_random(run):
    print(f"NESSO_TUNE_SEED={SEED}", flush=True)
    chance = random.Random(f"2{SEED}")
    for i in range(KILLS):
        where = ("rank 0", "rank 1", "a write", "all")[i % 4]
        if where == "a write" and list(run.path.glob("checkpoint-*")):
            rank = chance.randint(0, 1)
            write = chance.randint(1, WRITES[rank])
            where = f"rank {rank}, write {write}"
            process = run.go("tests.support.killing", KILL_IN=str(run.path), KILL_AT_WRITE=str(write),
                             KILL_RANK=str(rank))  # fmt: skip
        else:
            process = run.go()
            run.further(process, chance)
            pids = process.pids
            time.sleep(chance.random() * 0.05)
            for pid in pids if where == "all" else [pids[int(where[-1])]]:
                os.kill(pid, signal.SIGKILL)
        assert process.wait(HANG_S) != 0
        print(f"two processes: killed {where}; {sorted(p.name for p in run.path.glob('checkpoint-*'))}", flush=True)
        assert list(run.path.glob("checkpoint-*"))
    run.assert_identical()
    assert sum(line.get("event") == "resumed" for line in metrics(run.path)) == KILLS


@thorough
def test_stop_signals_at_random_skew(run):
    """SIGTERM to one rank, or to both up to 500 ms apart: exit code 75, a checkpoint at that step, and no hang."""
    print(f"NESSO_TUNE_SEED={SEED}", flush=True)
    chance = random.Random(f"3{SEED}")
    for i in range(SIGNALS):
        process = run.go()
        run.further(process, chance)
        pids = process.pids
        first = chance.randint(0, 1)
        skew = None if i % 4 == 3 else chance.random() * 0.5
        os.kill(pids[first], signal.SIGTERM)
        if skew is not None:
            threading.Timer(skew, terminate_if_alive, (pids[1 - first],)).start()
        began = time.monotonic()
        process.wait(HANG_S)
        took = time.monotonic() - began
        print(f"two processes: SIGTERM to {first}, then {skew and round(skew * 1000)} ms: {took:.1f} s", flush=True)
        assert run.exit_file.read_text() == "75"
        assert not (run.path / "final").exists()
        last = metrics(run.path)[-1]
        assert last["event"] == "preempted"
        assert (run.path / f"checkpoint-{last['step']}").is_dir()
    run.assert_identical()
    assert sum(line.get("event") == "resumed" for line in metrics(run.path)) == SIGNALS


def terminate_if_alive(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)

"""One rank fails while its peer waits for it in C code: the error is printed at once, and no process stays.

The process group is gloo with the one property of NCCL's that matters here: its destruction waits for all ranks
(`tests/support/waiting_group.py`). There is no launcher here that would end the other rank.
"""

import os
import signal
import socket
import time

import pytest

from tests.support.processes import Ranks
from tests.support.runs import metrics, recipe, several, steps, thorough, write_recipe
from tests.test_kill import when_at

SPEAKS_S = 10
ENDS_S = 30  # GRACE_S and what a busy machine needs
HOST = socket.gethostname()
MODULE = "tests.support.waiting_group"
PAIR = {"micro_batch_size": 1, "global_batch_size": 2}
FULL = {"fsdp": "full_shard"}


@pytest.fixture
def path(tmp_path, talks):
    """A recipe of four steps, with an evaluation after the second."""
    some = recipe("sft", tmp_path / "run", [talks], train={**PAIR, "max_steps": 4}, distributed=FULL)
    return write_recipe(tmp_path / "r.yaml", some)


class Failure:
    """A run of two ranks of which one fails."""

    def __init__(self, tmp_path, arguments, rank, failure, step, module=MODULE):
        self.raised, self.exit_file = tmp_path / "raised", tmp_path / "code"
        variables = {"FAILURE": failure, "FAILING_STEP": step, "RAISED_AT": self.raised}
        variables["NESSO_TUNE_EXIT_FILE"] = self.exit_file
        self.both = Ranks(*arguments, module=module, FAILING_RANK=rank, **variables)
        self.failing, self.waiting = self.both.ranks[rank], self.both.ranks[1 - rank]
        wait_until(self.raised.exists, 120, self.both)
        self.began = time.monotonic()

    def said_after(self, rank, words):
        """Seconds from the error until a rank printed some words."""
        wait_until(lambda: words in rank.stderr, ENDS_S, self.both)
        return time.monotonic() - self.began

    def exit_codes(self):
        """The exit codes of the failing and the waiting rank; none outlives the bound."""
        left = [max(1.0, self.began + ENDS_S - time.monotonic()) for _ in range(2)]
        return self.failing.wait(left[0]), self.waiting.wait(left[1])


def wait_until(condition, seconds, both):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, both.stderr
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("rank", "failure", "step", "message", "code"),
    [
        pytest.param(1, "memory", "1", f"rank 1 on {HOST}: out of memory: CUDA out of memory", 5, id="memory, step 1"),
        pytest.param(
            0, "memory", "evaluation", f"rank 0 on {HOST}: out of memory", 5, id="memory, evaluation", marks=thorough
        ),
        pytest.param(
            0, "disk", "2", "the disk is full", 5, id="disk of the rank that serves the store", marks=thorough
        ),
        pytest.param(1, "bug", "3", "internal error: KeyError", 1, id="bug", marks=thorough),
    ],
)
def test_a_failing_rank_speaks_and_nobody_waits(tmp_path, path, rank, failure, step, message, code):
    run = Failure(tmp_path, ["train", path], rank, failure, step)
    assert run.said_after(run.failing, message) < SPEAKS_S
    assert run.exit_codes() == (code, code), "the waiting rank ends with the code of the error"
    assert f"cannot go on: rank {rank} on {HOST} failed (exit code {code})" in run.waiting.stderr
    assert "lost contact" not in run.both.stderr
    assert run.exit_file.read_text() == str(code), "rank 0 records it for the Slurm job, whichever rank failed"
    if failure == "memory":
        assert "internal error" not in run.both.stderr
        assert "the plan expected about " in run.failing.stderr
        assert "weights and optimizer" in run.failing.stderr
        assert "in this order: set train.gradient_checkpointing: true, lower data.sequence_len" in run.failing.stderr


@pytest.mark.parametrize("rank", [pytest.param(0, marks=thorough), 1])
def test_a_killed_rank_is_named_by_one_that_waits_in_c_code(tmp_path, path, rank):
    run = Failure(tmp_path, ["train", path], rank, "kill", "2")
    assert run.exit_codes() == (-signal.SIGKILL, 5)
    said = f"rank {1 - rank} on {HOST}: lost contact with rank {rank} on {HOST} (its process has ended"
    assert run.waiting.stderr.count(said) == 1


@thorough
def test_a_long_call_is_no_loss(tmp_path, path):
    """Rank 1 holds the interpreter's lock for eight seconds; its heartbeat thread cannot run."""
    done = several("train", path, module=MODULE, FAILING_RANK=1, FAILURE="slow", FAILING_STEP=2,
                   RAISED_AT=tmp_path / "raised")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "raised").exists()
    assert len(steps(tmp_path / "run")) == 4


@thorough
def test_a_preempted_run_is_no_failure(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks], train={**PAIR, "max_steps": 2000}, distributed=FULL,
                  evaluation=None, checkpoint={"every_steps": 500})  # fmt: skip
    both = Ranks("train", write_recipe(tmp_path / "r.yaml", some), module=MODULE)
    when_at(both, tmp_path / "run", 3, None)
    os.kill(both.pids[1], signal.SIGTERM)
    assert [rank.wait(ENDS_S + 30) for rank in both.ranks] == [75, 75]
    assert metrics(tmp_path / "run")[-1]["event"] == "preempted"
    assert both.stderr.count("asked to stop; saved at step") == 1
    assert "cannot go on" not in both.stderr
    assert "lost contact" not in both.stderr


@thorough
def test_a_rank_that_fails_between_two_runs_of_a_chain(tmp_path, talks, path):
    """The second run has no process group yet: the others prepare its data, or wait for the group."""
    second = recipe("sft", tmp_path / "second", [talks], train={**PAIR, "max_steps": 2}, distributed=FULL)
    both = Ranks("train", path, write_recipe(tmp_path / "second.yaml", second), module=MODULE)
    wait_until((tmp_path / "run" / "final").exists, 120, both)
    wait_until(lambda: "model in" in both.ranks[0].stderr, 60, both)
    both.ranks[1].kill()
    assert both.ranks[0].wait(ENDS_S + 30) == 5
    assert f"lost contact with rank 1 on {HOST}" in both.ranks[0].stderr


def test_a_program_gets_the_exception_and_its_peer_ends(tmp_path, path):
    run = Failure(tmp_path, [path], 1, "disk", "2", module="tests.support.waiting_library_user")
    assert run.exit_codes() == (0, 5)
    assert run.failing.stdout == "caught RunEnvironmentError\n"
    assert f"cannot go on: rank 1 on {HOST} failed (exit code 5)" in run.waiting.stderr


@thorough
def test_a_program_goes_on_after_an_error_of_all_ranks(tmp_path, talks, path):
    """Both ranks get the exception, in a process group that is then aborted; the next run has a new one."""
    unmeasured = {**PAIR, "max_steps": 4, "best_metric": "eval_loss/de"}
    broken = recipe("sft", tmp_path / "broken", [talks], train=unmeasured, distributed=FULL)
    done = several(write_recipe(tmp_path / "broken.yaml", broken), path, module="tests.support.waiting_library_user")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "caught RecipeError\ntrained True\n" * 2
    assert "failed (exit code" not in done.stderr

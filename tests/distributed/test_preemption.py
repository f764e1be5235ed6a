"""Signals before training: a request to stop, or the end of the others when one process has failed."""

import os
import signal

import pytest

from nesso_tune.distributed.preemption import LAUNCHED_VARIABLE, StopRequest
from nesso_tune.errors import Preempted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_training_ends_the_run(number):
    with StopRequest(), pytest.raises(Preempted, match="received before training began"):
        os.kill(os.getpid(), number)


def test_a_launched_process_knows_whether_the_signal_was_forwarded(tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCHED_VARIABLE, str(tmp_path / "forwarded"))
    with StopRequest(), pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 128 + signal.SIGTERM, "without a message: the process that failed has its own"
    with StopRequest(), pytest.raises(Preempted):
        os.kill(os.getpid(), signal.SIGUSR1)  # which Slurm sends to all processes
    (tmp_path / "forwarded").touch()
    with StopRequest(), pytest.raises(Preempted):
        os.kill(os.getpid(), signal.SIGTERM)

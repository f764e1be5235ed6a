"""The exit code of a launcher, from those of its processes."""

import signal

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from nesso_tune.launch.accelerate import _code

ENDED = 128 + signal.SIGTERM  # by torch's launcher


def failed(*ends):
    """The failure of ranks that ended with (exit code, second)."""
    failures = {}
    for rank, (code, second) in enumerate(ends):
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="")
        failures[rank].timestamp = second
    return ChildFailedError("run", failures)


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        pytest.param([(ENDED, 3), (2, 2)], 2, id="one that failed before training"),
        pytest.param([(5, 3), (3, 2)], 3, id="one that failed, and one that lost contact with it"),
        pytest.param([(5, 3), (75, 2)], 75, id="one that was preempted, and one that lost contact with it"),
        pytest.param([(75, 2), (5, 2)], 75, id="the same in the other order"),
        pytest.param([(-signal.SIGKILL, 2), (5, 3)], 5, id="one that was killed and missed"),
        pytest.param([(-signal.SIGTERM, 3), (-signal.SIGKILL, 2)], 137, id="one that was killed"),
        pytest.param([(ENDED, 3), (-signal.SIGKILL, 2)], 137, id="one that was killed before training"),
        pytest.param([(-signal.SIGTERM, 2), (ENDED, 2)], ENDED, id="all were terminated"),
    ],
)
def test_the_code_of_a_launcher(ends, code):
    assert _code(failed(*ends)) == code

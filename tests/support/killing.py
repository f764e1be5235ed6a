"""The command line that sends itself SIGKILL at a given write after the first checkpoint. For tests only.

KILL_IN: run directory. KILL_AT_WRITE: index of the write. KILL_RANK: rank to kill under FSDP with several processes.
A write is a file or folder in the run directory that is opened for writing, created, renamed or removed. A tensor file
counts twice: before it is written, and truncated to half its size.
"""

import os
import signal
import sys
from pathlib import Path

from nesso_tune.runs import checkpoint

if "KILL_RANK" in os.environ:
    import tests.support.fsdp_on_cpu  # noqa: F401 - promotes FSDP on CPU

RUN, LIMIT = os.environ["KILL_IN"], int(os.environ["KILL_AT_WRITE"])
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
seen = 0
save = checkpoint.save_tensors


def count(half=None):
    global seen
    if not any(entry.name.startswith("checkpoint-") for entry in os.scandir(RUN)):
        return
    seen += 1
    if seen == LIMIT:
        if half is not None:
            os.truncate(half, half.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def hook(event, arguments):
    if event not in EVENTS or not str(arguments[0]).startswith(f"{RUN}/"):
        return
    if event != "open" or set(str(arguments[1])) & set("wax+"):
        count()


def truncated_save(tensors, file):
    count()
    save(tensors, file)
    count(half=Path(file))


if os.environ.get("KILL_RANK", "0") == os.environ.get("RANK", "0"):
    checkpoint.save_tensors = truncated_save
    sys.addaudithook(hook)

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()

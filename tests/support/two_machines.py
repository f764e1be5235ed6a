"""A run's preparation on simulated machines whose locks exclude only their own processes. For tests only.

MACHINE names the machine of a process. LOG gets a line for each build and each file that is hashed. BUILD is `slow`
or `wrong`: what a build does. As Lustre does with `-o localflock`, the file system gives each machine its own locks.
"""

import os
import socket
import sys
import time
from pathlib import Path

from nesso_tune import cache, files
from nesso_tune.errors import DataError

MACHINE, LOG = os.environ["MACHINE"], Path(os.environ["LOG"])
cache._machine = lambda: MACHINE
cache.WAIT_MESSAGES_S = (0.3, 0.5)
socket.gethostname = lambda: MACHINE
_lock, _sha256 = files.FileLock, files.sha256


def note(what):
    with LOG.open("a") as log:
        log.write(f"{os.environ.get('RANK', '-')} {what}\n")


def hashed(file):
    note(f"hashed {file.name}")
    return _sha256(file)


files.FileLock = lambda file: _lock(f"{file}-{MACHINE}")
cache.sha256 = hashed


def prepare(recipe_file):
    """What `train` does before its process group exists."""
    from nesso_tune import load_recipe, run
    from nesso_tune.data import pipeline, prepare
    from nesso_tune.distributed import process_group

    build = pipeline.build_documents

    def build_documents(*arguments):
        note("built")
        if os.environ["BUILD"] == "wrong":
            raise DataError("rows.jsonl", "is wrong", "correct it")
        time.sleep(float(os.environ.get("SECONDS", "2")))
        return build(*arguments)

    prepare.build_documents = build_documents
    process_group.WAIT_MESSAGES_S = cache.WAIT_MESSAGES_S
    recipe = load_recipe(recipe_file)
    with process_group.process_group_of_run(), process_group.report_lost_ranks():
        process_group.join_ranks(120)
        print(run._prepare(recipe).summary.fingerprint)
        process_group.init_process_group(120)  # rank 0 serves the store until all are done
        process_group.barrier()  # no rank leaves before all have connected


def build_alone():
    """A process that no launcher started asks the cache for a result."""

    def build(folder):
        note("built")
        (folder / "content").write_text("x")
        time.sleep(1)
        assert (folder / "content").exists(), "another machine has removed it"
        return {}

    print(cache.get_or_build("kind", "key", build, lambda folder, _: (folder / "content").read_text()))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        from nesso_tune.cli.main import end_process
        from nesso_tune.distributed.process_group import on_lost_rank
        from nesso_tune.errors import NessoError
        from nesso_tune.logs import messages_on_stderr

        on_lost_rank(end_process)
        with messages_on_stderr():
            try:
                prepare(sys.argv[1])
            except NessoError as error:
                end_process(error)
    else:
        build_alone()

"""The command line on ranks whose process group behaves as NCCL's when a rank is gone. For tests only.

`destroy_process_group` waits for all ranks, and a rank with nothing to fail at waits for the failing one in a C call
that no Python signal handler interrupts. FAILING_RANK fails by FAILURE at FAILING_STEP; RAISED_AT is the file that it
touches then.
"""

import ctypes
import errno
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

import tests.support.fsdp_on_cpu  # noqa: F401 - promotes FSDP on CPU
from nesso_tune.distributed import process_group
from nesso_tune.training.evaluator import Evaluator
from nesso_tune.training.trainer import BaseTrainer

destroy = dist.destroy_process_group
train_step, evaluate = BaseTrainer.training_step, Evaluator.__call__
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.14 GiB"


def destroy_together():
    store, world = process_group._membership.store, dist.get_world_size()
    store.add("destroyed", 1)
    with suppress(dist.DistError):  # all have come, and rank 0, which serves the store, has ended
        while store.add("destroyed", 0) % world:
            time.sleep(0.05)
    destroy()


def block_for_ever():
    """Locks a mutex twice: the second call never returns and takes no signal, as a wait for a GPU does not."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def fail():
    Path(os.environ["RAISED_AT"]).touch()
    match os.environ["FAILURE"]:
        case "memory":
            raise torch.OutOfMemoryError(OOM)
        case "disk":
            raise OSError(errno.ENOSPC, "No space left on device", "/scratch/run")
        case "bug":
            raise KeyError("a bug")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "slow":  # healthy, but it keeps the interpreter's lock for longer than the heartbeat waits for anything
            ctypes.PyDLL(None).sleep(8)


def at_the_failure():
    if os.environ.get("FAILING_RANK") == os.environ["RANK"]:
        fail()
    elif os.environ.get("FAILURE", "slow") != "slow":
        block_for_ever()


def failing_step(self, *arguments, **options):
    if self.state.global_step + 1 == int(os.environ.get("FAILING_STEP", "0")):
        at_the_failure()
    return train_step(self, *arguments, **options)


def failing_evaluation(self, *arguments, **options):
    if os.environ.get("FAILING_STEP") == "evaluation":
        at_the_failure()
    return evaluate(self, *arguments, **options)


dist.destroy_process_group = destroy_together
if os.environ.get("FAILING_STEP", "").isdigit():
    BaseTrainer.training_step = failing_step
Evaluator.__call__ = failing_evaluation

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()

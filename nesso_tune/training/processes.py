"""The processes of a run: who is first, when they come together, and when they part."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list, gather_object

from nesso_tune.errors import RunEnvironmentError, first_line
from nesso_tune.recipes.gpus import Gpu
from nesso_tune.recipes.plan import World

SEEN_AFTER_S = 5
# What gloo and NCCL say when another process is gone or does not answer in time.
LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "timeout",
        "Timed out", "timed out", "NCCL communicator was aborted", "remote process exited")  # fmt: skip


def world_size() -> int:
    """Processes that the launcher started, known before they come together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes; known before they come together."""
    return int(os.environ.get("RANK", "0")) == 0


def world() -> World:
    """The processes and, where there is one, the kind of GPU."""
    if not torch.cuda.is_available():
        return World(world_size())
    memory = torch.cuda.get_device_properties(0).total_memory
    return World(world_size(), Gpu(torch.cuda.get_device_name(), memory, bfloat16=torch.cuda.is_bf16_supported()))


def idle_gpus() -> int:
    """GPUs of this machine that no process of the run has."""
    return max(0, torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def come_together(timeout_s: int) -> None:
    """Forms the process group. Data is prepared before: no collective operation then waits for a slow disk.

    Args:
        timeout_s: seconds after which a collective operation that does not finish ends the run. Accelerate does not
            pass it on for CPU processes, so their group is formed here.
    """
    timeout = timedelta(seconds=timeout_s)
    try:
        if world_size() > 1 and not torch.cuda.is_available() and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timeout)
        PartialState(cpu=not torch.cuda.is_available(), timeout=timeout)
    except (dist.DistError, RuntimeError) as error:
        meeting = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        check_port(meeting, error)
        raise RunEnvironmentError(
            here(), f"the {world_size()} processes did not come together at {meeting} ({first_line(error)})",
            "see whether each was started, and whether that address and port are reachable from every machine",
        ) from None  # fmt: skip


def check_port(meeting: str, error: Exception) -> None:
    """Raises RunEnvironmentError if processes could not come together because another program has their port."""
    if "EADDRINUSE" in str(error):
        raise RunEnvironmentError(
            meeting, "is in use", "give torchrun another --master_port, accelerate another --main_process_port"
        ) from None


def here() -> str:
    """This process and its machine, as errors call them."""
    return f"process {os.environ.get('RANK', '0')} on {socket.gethostname()}"


@contextmanager
def contact() -> Iterator[None]:
    """Turns the loss of another process, or a collective operation that does not end in time, into one clear error."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not any(sign in str(error) for sign in LOST):
            raise
        raise RunEnvironmentError(
            here(), f"lost contact with another process ({first_line(error)})",
            "that process's message, or the launcher's, says why; the same command continues from the last checkpoint",
        ) from None  # fmt: skip


def from_first(value: Any) -> Any:
    """The first process's value, on all of them."""
    if world_size() == 1:
        return value
    (shared,) = broadcast_object_list([value], from_process=0)
    return shared


def check_shared(folder: Path) -> None:
    """Makes sure that all processes see one and the same folder: checkpoints are written by one and read by all.

    Raises:
        RunEnvironmentError: on all of them, naming the machines that do not.
    """
    if world_size() == 1:
        return
    mark = folder / f".shared-{from_first(uuid4().hex if is_first() else None)}"
    if is_first():
        mark.touch()
    wait_for_all()
    for _ in range(SEEN_AFTER_S * 10):  # network file systems may show a new file a moment later
        if mark.exists():
            break
        time.sleep(0.1)
    blind = [host for host, sees in gather_object([(socket.gethostname(), mark.exists())]) if not sees]
    wait_for_all()
    if is_first():
        mark.unlink(missing_ok=True)
    if blind:
        raise RunEnvironmentError(
            str(folder), f"is not the same folder on all machines (not on {', '.join(sorted(set(blind)))})",
            "set output_dir on a file system that they share",
        )  # fmt: skip


def wait_for_all() -> None:
    """Goes on when every process has come here."""
    PartialState().wait_for_everyone()


def part() -> None:
    """Ends the process group, so that the next run of a chain prepares its data outside of one."""
    if world_size() == 1:
        return
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    if dist.is_initialized():
        dist.destroy_process_group()

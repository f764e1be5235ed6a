"""The processes of a run: who is first, when they come together, and when they part."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list, gather_object

from nesso_tune.distributed.membership import Membership, wait_for_ranks
from nesso_tune.errors import NessoError, RunEnvironmentError, first_line, of_os
from nesso_tune.planning.hardware import Gpu
from nesso_tune.planning.plan import World

SEEN_AFTER_S = 5
# What gloo and NCCL say when another process is gone or does not answer in time.
LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "timeout",
        "Timed out", "timed out", "NCCL communicator was aborted", "remote process exited")  # fmt: skip


def world_size() -> int:
    """Processes that the launcher started, known before they come together."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def is_main_process() -> bool:
    """Whether this is the process that writes; known before they come together."""
    return int(os.environ.get("RANK") or "0") == 0


def detect_world() -> World:
    """The processes and, where there is one, the kind of GPU."""
    if not torch.cuda.is_available():
        return World(world_size())
    memory = torch.cuda.get_device_properties(0).total_memory
    return World(world_size(), Gpu(torch.cuda.get_device_name(), memory, bfloat16=torch.cuda.is_bf16_supported()))


def idle_gpus() -> int:
    """GPUs of this machine that no process of the run has."""
    return max(0, torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE") or "1"))


_membership: Membership | None = None  # of this process, for as long as it lives


def init_process_group(timeout_s: int) -> None:
    """Forms the process group. Data is prepared before: no collective operation then waits for a slow disk.

    Args:
        timeout_s: seconds in which all must have come, and after which a collective operation that does not finish
            ends the run (accelerate would not pass it on for CPU processes).

    Raises:
        RunEnvironmentError: naming the processes that did not come, or what else is in the way.
    """
    global _membership
    on_gpu, timeout = torch.cuda.is_available(), timedelta(seconds=timeout_s)
    if world_size() > 1 and not dist.is_initialized():
        _membership = _membership or wait_for_ranks(world_size(), timeout_s)
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", store=_membership.new_group_store(), rank=int(os.environ["RANK"]),
                world_size=world_size(), timeout=timeout,
            )  # fmt: skip
        except RuntimeError as error:
            raise _deaf("cannot connect to the others, though all are there", error) from None
    PartialState(cpu=not on_gpu, timeout=timeout)


def _this_rank() -> str:
    """This process and its machine, as errors call them."""
    return f"process {os.environ.get('RANK', '0')} on {socket.gethostname()}"


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """Turns the loss of another process, or a collective operation that does not end in time, into one clear error.

    The processes that live say so; the others are named, by the first of those that live. What a process finds
    itself is said once, by whichever found it.
    """
    try:
        yield
    except (NessoError, OSError) as found:
        own = of_os(found) if isinstance(found, OSError) else found
        if _membership is not None and own.speaks is None:
            own.speaks = _membership.claim_message(str(own))
        if own is found:
            raise
        raise own from found
    except RuntimeError as error:
        if world_size() == 1 or not any(sign in str(error) for sign in LOST):
            raise
        raise _lost(error) from None


def _deaf(what: str, error: Exception) -> RunEnvironmentError:
    remedy = (
        "name the network that connects the machines in NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME on CPUs), or raise "
        "distributed.timeout_s"
    )
    return RunEnvironmentError(_this_rank(), f"{what} ({first_line(error)})", remedy)


def _lost(error: Exception) -> RunEnvironmentError:
    with suppress(ValueError):  # of a thread that is not the main one
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which would come before this has been said
    again = "its own message, or the launcher's, says why; the same command continues from the last checkpoint"
    silent = None if _membership is None else _membership.unresponsive_ranks()
    if silent == []:
        return _deaf("all processes live, but they do not hear each other", error)
    if _membership is None or silent is None:
        gone = "the first process" if _membership is None else _membership.store_host
        beside = _membership is not None and not _membership.launchers and _membership.hosts[0] == socket.gethostname()
        speaks = os.environ.get("LOCAL_RANK", "0") == ("1" if beside else "0")  # one on each machine
    else:
        gone = ", ".join(_membership.describe(rank) for rank in silent)
        speaks = int(os.environ["RANK"]) == min(
            set(range(world_size())) - set(silent)
        ) and not _membership.have_reported(silent)
    lost = RunEnvironmentError(_this_rank(), f"lost contact with {gone} ({first_line(error)})", again)
    lost.speaks = speaks
    return lost


def broadcast_from_rank0(value: Any) -> Any:
    """The first process's value, on all of them."""
    if world_size() == 1:
        return value
    (shared,) = broadcast_object_list([value], from_process=0)
    return shared


def check_shared_folder(folder: Path) -> None:
    """Makes sure that all processes see one and the same folder: checkpoints are written by one and read by all.

    Raises:
        RunEnvironmentError: on all of them, naming the machines that do not.
    """
    if world_size() == 1:
        return
    mark = folder / f".shared-{broadcast_from_rank0(uuid4().hex if is_main_process() else None)}"
    if is_main_process():
        mark.touch()
    barrier()
    for _ in range(SEEN_AFTER_S * 10):  # network file systems may show a new file a moment later
        if mark.exists():
            break
        time.sleep(0.1)
    blind = [host for host, sees in gather_object([(socket.gethostname(), mark.exists())]) if not sees]
    barrier()
    if is_main_process():
        mark.unlink(missing_ok=True)
    if blind:
        raise RunEnvironmentError(
            str(folder), f"is not the same folder on all machines (not on {', '.join(sorted(set(blind)))})",
            "set output_dir on a file system that they share",
        )  # fmt: skip


def barrier() -> None:
    """Goes on when every process has come here."""
    PartialState().wait_for_everyone()


def destroy_process_group() -> None:
    """Ends the process group, so that the next run of a chain prepares its data outside of one."""
    if world_size() == 1 and not dist.is_initialized():  # a launcher's single process has one too
        return
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    if dist.is_initialized():
        dist.destroy_process_group()

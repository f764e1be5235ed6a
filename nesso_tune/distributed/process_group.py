"""The process group of a run: initialisation, rank 0, broadcasts, barriers, and errors of lost ranks."""

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
from nesso_tune.errors import NessoError, RunEnvironmentError, first_line, from_os_error
from nesso_tune.planning.hardware import Gpu
from nesso_tune.planning.plan import World

SHARED_FILE_TIMEOUT_S = 5  # network file systems may show a new file only after a moment
# Messages of gloo and NCCL when another rank is lost or does not respond within the timeout.
LOST_RANK_MESSAGES = (
    "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "timeout",
    "Timed out", "timed out", "NCCL communicator was aborted", "remote process exited",
)  # fmt: skip

_membership: Membership | None = None  # for the lifetime of this process, across the runs of a chain


def init_process_group(timeout_s: int) -> None:
    """Initialises the process group and accelerate's state.

    Call it after the data is prepared: otherwise a slow disk would cause timeouts of collective operations.

    Args:
        timeout_s: seconds within which all ranks must join, and the timeout of collective operations (accelerate does
            not set it for CPU processes).

    Raises:
        RunEnvironmentError: if ranks do not join, or cannot communicate.
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
            raise _network_error("cannot connect to the other ranks, though all have joined", error) from None
    PartialState(cpu=not on_gpu, timeout=timeout)


def destroy_process_group() -> None:
    """Destroys the process group: the next run of a chain prepares its data without one."""
    if world_size() == 1 and not dist.is_initialized():  # a single process under a launcher has a group too
        return
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes that the launcher started; known before the process group is initialised."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def is_main_process() -> bool:
    """Whether this is rank 0, which writes the files; known before the process group is initialised."""
    return int(os.environ.get("RANK") or "0") == 0


def detect_world() -> World:
    """Number of processes and, if there is one, the GPU."""
    if not torch.cuda.is_available():
        return World(world_size())
    memory = torch.cuda.get_device_properties(0).total_memory
    return World(world_size(), Gpu(torch.cuda.get_device_name(), memory, bfloat16=torch.cuda.is_bf16_supported()))


def idle_gpus() -> int:
    """Number of GPUs of this node that the run does not use."""
    return max(0, torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE") or "1"))


def broadcast_from_rank0(value: Any) -> Any:
    """Returns rank 0's value on all ranks."""
    if world_size() == 1:
        return value
    (shared,) = broadcast_object_list([value], from_process=0)
    return shared


def barrier() -> None:
    """Waits until all ranks have called it."""
    PartialState().wait_for_everyone()


def check_shared_folder(folder: Path) -> None:
    """Checks that all ranks see the same folder: rank 0 writes checkpoints, and all ranks read them.

    Raises:
        RunEnvironmentError: on all ranks; it names the hosts that do not.
    """
    if world_size() == 1:
        return
    file = folder / f".shared-{broadcast_from_rank0(uuid4().hex if is_main_process() else None)}"
    if is_main_process():
        file.touch()
    barrier()
    for _ in range(SHARED_FILE_TIMEOUT_S * 10):
        if file.exists():
            break
        time.sleep(0.1)
    missing_on = [host for host, sees_it in gather_object([(socket.gethostname(), file.exists())]) if not sees_it]
    barrier()
    if is_main_process():
        file.unlink(missing_ok=True)
    if missing_on:
        raise RunEnvironmentError(
            str(folder), f"is not the same folder on all nodes (not on {', '.join(sorted(set(missing_on)))})",
            "set output_dir to a shared file system",
        )  # fmt: skip


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """Turns the loss of a rank, or the timeout of a collective operation, into one RunEnvironmentError.

    One of the remaining ranks prints the error, which names the lost ranks. An error that several ranks raise
    themselves is printed by one of them.
    """
    try:
        yield
    except (NessoError, OSError) as raised:
        own_error = from_os_error(raised) if isinstance(raised, OSError) else raised
        if _membership is not None and own_error.prints_message is None:
            own_error.prints_message = _membership.claim_message(str(own_error))
        if own_error is raised:
            raise
        raise own_error from raised
    except RuntimeError as error:
        if world_size() == 1 or not any(message in str(error) for message in LOST_RANK_MESSAGES):
            raise
        raise _lost_rank_error(error) from None


def _lost_rank_error(error: Exception) -> RunEnvironmentError:
    with suppress(ValueError):  # signals can only be set in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent by the launcher, before the error is printed
    remedy = "see its own message, or the launcher's; the same command resumes from the last checkpoint"
    lost = None if _membership is None else _membership.unresponsive_ranks()
    if lost == []:
        return _network_error("all ranks are alive but cannot communicate", error)
    if _membership is None or lost is None:  # the store is lost too
        names = "rank 0" if _membership is None else _membership.store_host
        shares_host = (
            _membership is not None and not _membership.launcher_store and _membership.hosts[0] == socket.gethostname()
        )
        prints_message = os.environ.get("LOCAL_RANK", "0") == ("1" if shares_host else "0")  # one rank of each node
    else:
        names = ", ".join(_membership.describe(rank) for rank in lost)
        first_alive = min(set(range(world_size())) - set(lost))
        prints_message = int(os.environ["RANK"]) == first_alive and not _membership.have_reported(lost)
    result = RunEnvironmentError(_this_rank(), f"lost contact with {names} ({first_line(error)})", remedy)
    result.prints_message = prints_message
    return result


def _network_error(problem: str, error: Exception) -> RunEnvironmentError:
    remedy = (
        "set NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME on CPUs) to the network interface that connects the nodes, or "
        "increase distributed.timeout_s"
    )
    return RunEnvironmentError(_this_rank(), f"{problem} ({first_line(error)})", remedy)


def _this_rank() -> str:
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"

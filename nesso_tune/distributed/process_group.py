"""The process group of a run: initialisation, rank 0, broadcasts, barriers, and errors of lost ranks.

A rank that fails says so to the others and leaves without them, because NCCL would wait for them. A rank whose main
thread waits for a lost one is ended by its heartbeat: a call into a library cannot be interrupted by an exception.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from nesso_tune.cache import WAIT_MESSAGES_S
from nesso_tune.distributed.heartbeat import GRACE_S, NCCL_GRACE_S, Heartbeat, RankState
from nesso_tune.distributed.membership import Membership, wait_for_ranks, with_timeout
from nesso_tune.errors import NessoError, RunEnvironmentError, exit_code_of, first_line, from_os_error
from nesso_tune.logs import EVERY_RANK, logger

SHARED_FILE_TIMEOUT_S = 5  # network file systems may show a new file only after a moment
# Messages of gloo and NCCL when another rank is lost or does not respond within the timeout.
LOST_RANK_MESSAGES = (
    "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "timeout",
    "Timed out", "timed out", "NCCL communicator was aborted", "remote process exited",
)  # fmt: skip

T = TypeVar("T")
ABORT_TIMEOUT_S = 5.0
MAX_POLL_S = 0.5
LOSS_NOTICE_S = 2.0  # for the heartbeat to hear of the rank whose loss made a collective operation fail
EXIT_TIMEOUT_S = 10.0  # to print why the heartbeat ends this process
LOST_RANK_REMEDY = "see its own message, or the launcher's; the same command resumes from the last checkpoint"
PREPARE_REMEDY = "run `nesso-tune prepare` first, which has the time it needs, or raise distributed.timeout_s"
LOST_RANK = "lost rank"  # what is common to the messages of all ranks about it

# For the lifetime of this process, across the runs of a chain
_membership: Membership | None = None
_heartbeat: Heartbeat | None = None
_exit_with: Callable[[NessoError], None] | None = None


def join_ranks(timeout_s: int) -> None:
    """Waits until all ranks have joined, and starts the heartbeat. Once a process; a single process joins nothing.

    No process group is needed, so the ranks notice a lost one while the data is prepared, which has no timeout there.

    Raises:
        RunEnvironmentError: if ranks do not join within `timeout_s`.
    """
    global _membership, _heartbeat
    if world_size() == 1 or _membership is not None:
        return
    _membership = wait_for_ranks(world_size(), timeout_s)
    grace_s = NCCL_GRACE_S if torch.cuda.is_available() else GRACE_S
    _heartbeat = Heartbeat(int(os.environ["RANK"]), world_size(), _end_process, grace_s)
    _heartbeat.start(_membership.store, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


def init_process_group(timeout_s: int) -> None:
    """Initialises the process group and accelerate's state.

    Call it after the data is prepared: otherwise a slow disk would cause timeouts of collective operations.

    Args:
        timeout_s: seconds within which all ranks must join, and the timeout of collective operations (accelerate does
            not set it for CPU processes).

    Raises:
        RunEnvironmentError: if ranks do not join, or cannot communicate.
    """
    on_gpu, timeout = torch.cuda.is_available(), timedelta(seconds=timeout_s)
    if world_size() > 1 and not dist.is_initialized():
        join_ranks(timeout_s)
        assert _membership is not None
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", store=_membership.new_group_store(), rank=int(os.environ["RANK"]),
                world_size=world_size(), timeout=timeout,
            )  # fmt: skip
        except RuntimeError as error:
            raise _network_error("cannot connect to the other ranks, though all have joined", error) from None
    PartialState(cpu=not on_gpu, timeout=timeout)


@contextmanager
def one_rank_first(what: str, timeout_s: int, hand_over: Callable[[], str]) -> Iterator[str | None]:
    """Lets rank 0 run the block first, then one rank of each other node, then the remaining ranks.

    For work whose result a file system holds afterwards. It needs `join_ranks`, but no process group.

    Args:
        what: the work, for messages.
        timeout_s: seconds that a rank waits for another one.
        hand_over: called after the block in the first rank of each node.

    Yields:
        What the first rank of this node handed over; None in that rank itself.

    Raises:
        RunEnvironmentError: if the rank before this one failed, is lost, or is not done within `timeout_s`.
    """
    if _membership is None:
        yield None
        return
    rank, turn = int(os.environ["RANK"]), _membership.new_turn()
    first = rank - int(os.environ.get("LOCAL_RANK") or "0")
    if rank != first:
        yield _wait_for(f"{turn}/{first}", first, what, timeout_s, PREPARE_REMEDY)
        return
    if rank != 0:
        _wait_for(f"{turn}/0", 0, what, timeout_s, PREPARE_REMEDY)
    yield None
    _membership.store.set(f"{turn}/{rank}", hand_over())


def exchange_later(what: str, timeout_s: int, *, in_thread: bool) -> Callable[[T], list[T] | None]:
    """A function that gathers JSON data of each rank and may be called in another thread. Every rank must call this.

    Args:
        what: what the ranks do before they call the function, for messages.
        timeout_s: seconds that rank 0 waits for each of the others.
        in_thread: whether the function is called in a thread beside the main thread.

    Returns:
        A function that returns the values of all ranks on rank 0, and None on the others, which do not wait. It raises
        RunEnvironmentError if a rank is lost, or is not done within `timeout_s`.
    """
    if world_size() == 1:
        return lambda value: [value]
    assert _membership is not None
    store, space, rank = _membership.store, _membership.new_turn(), int(os.environ["RANK"])

    def exchange(value: T) -> list[T] | None:
        store.set(f"{space}/{rank}", json.dumps(value))
        if rank != 0:
            return None
        values, remedy = [], "check its disk, or raise distributed.timeout_s"
        for other in range(world_size()):
            key = f"{space}/{other}"
            values.append(json.loads(_wait_for(key, other, what, timeout_s, remedy, in_thread=in_thread)))
            store.delete_key(key)
        return values

    return exchange


def _wait_for(key: str, rank: int, what: str, timeout_s: int, remedy: str, *, in_thread: bool = False) -> str:
    """Waits until a rank has set a key of the store; returns its value. One rank of each node says so.

    In a thread beside the main thread, what the rank has set before it was lost still counts, and no message of the run
    is claimed: the main thread fails by itself.
    """
    assert _membership is not None
    started, name = time.monotonic(), _membership.describe(rank)
    next_message, interval = WAIT_MESSAGES_S
    try:
        while True:
            lost = [] if _heartbeat is None else _heartbeat.lost_ranks()
            if lost and not in_thread:
                raise _error_of(lost, f"while this rank waited for {what}")
            if _membership.store.check([key]):
                return str(_membership.store.get(key).decode())
            if lost:
                names = ", ".join(_membership.describe(state.rank) for state in lost)
                raise RunEnvironmentError(_this_rank(), f"lost contact with {names} during {what}", LOST_RANK_REMEDY)
            waited = time.monotonic() - started
            if waited >= timeout_s:
                error = RunEnvironmentError(_this_rank(), f"{what}: {name} was not done within {timeout_s} s", remedy)
                error.same_on_ranks = f"{what}: {name}"
                raise error
            if waited >= next_message and int(os.environ.get("LOCAL_RANK") or "0") <= 1:
                next_message += interval
                logger.info(
                    f"{_this_rank()}: {what}: waiting for {name}, {waited:.0f} s so far (at most {timeout_s} s)",
                    extra=EVERY_RANK,
                )
            time.sleep(min(MAX_POLL_S, 0.01 + waited / 10))  # short waits end at once
    except (dist.DistError, RuntimeError) as error:
        if in_thread:
            raise RunEnvironmentError(_this_rank(), f"{what}: {first_line(error)}", LOST_RANK_REMEDY) from None
        raise _lost_rank_error(error) from None


def on_lost_rank(exit_with: Callable[[NessoError], None]) -> None:
    """Sets how the heartbeat ends this process when another rank failed or is lost: it prints the error and exits.

    The default logs the error. A program that sets it exits after any error, as the command line does, so the process
    group of a run that failed is then not taken down.
    """
    global _exit_with
    _exit_with = exit_with


@contextmanager
def process_group_of_run() -> Iterator[None]:
    """Ends the process group with the run: with the other ranks after success, without them after an error."""
    if _heartbeat is not None:
        _heartbeat.begin_run()
    try:
        yield
    except BaseException as error:
        if isinstance(error, NessoError) and error.on_all_ranks:
            _destroy_process_group()
        else:
            _abandon_process_group(exit_code_of(error))
        raise
    _destroy_process_group()


def _destroy_process_group() -> None:
    """Destroys the process group: the next run of a chain prepares its data without one. NCCL waits for all ranks."""
    if world_size() > 1 or dist.is_initialized():  # a single process under a launcher has a group too
        _reset_accelerate()
        if dist.is_initialized():
            dist.destroy_process_group()
    if _heartbeat is not None:
        _heartbeat.end_run()


def _abandon_process_group(exit_code: int) -> None:
    """Leaves the process group after an error of this rank, and tells the others, without waiting for them."""
    if _heartbeat is not None:
        _heartbeat.end_run(exit_code)
    if world_size() > 1 or dist.is_initialized():
        _reset_accelerate()
    if dist.is_initialized() and _exit_with is None:  # the process goes on, perhaps with another run
        with_timeout(dist.distributed_c10d._abort_process_group, ABORT_TIMEOUT_S)
        if dist.is_initialized():
            logger.warning(
                f"{_this_rank()}: the process group cannot be aborted: start a new process for the next run",
                extra=EVERY_RANK,
            )


def _reset_accelerate() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def world_size() -> int:
    """Number of processes that the launcher started; known before the process group is initialised."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def is_main_process() -> bool:
    """Whether this is rank 0, which writes the files; known before the process group is initialised."""
    return int(os.environ.get("RANK") or "0") == 0


def broadcast_from_rank0(value: Any) -> Any:
    """Returns rank 0's value on all ranks."""
    if world_size() == 1:
        return value
    (shared,) = broadcast_object_list([value], from_process=0)
    return shared


def broadcast_weights(model: nn.Module) -> bool:
    """Copies parameters and buffers of rank 0 into the model of every other rank, one after the other. Collective.

    Returns:
        Whether it was done: not if the ranks' models differ in a name, shape or type, which all of them notice.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    layout = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()]
    if any(other != layout for other in gather_object([layout])):
        return False
    device = PartialState().device
    for tensor in tensors.values():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(device)  # any type, also with gloo
        dist.broadcast(flat, src=0)
        if not is_main_process() and flat.data_ptr() != tensor.data_ptr():  # a GPU's copy
            tensor.detach().copy_(flat.to(tensor.device).view(tensor.dtype).reshape(tensor.shape))
    return True


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
        if _heartbeat is not None:
            _heartbeat.expect_own_error()
        if _membership is not None and own_error.prints_message is None:
            _membership.mark_reported()
            claimed = _membership.claim_message(own_error.same_on_ranks or str(own_error))
            if claimed is None:  # the rank that served the store has ended, with an error of its own
                rank = "LOCAL_RANK" if isinstance(own_error, RunEnvironmentError) else "RANK"
                claimed = os.environ.get(rank, "0") == "0"
            own_error.prints_message = claimed
        if own_error is raised:
            raise
        raise own_error from raised
    except RuntimeError as error:
        if world_size() == 1 or not any(message in str(error) for message in LOST_RANK_MESSAGES):
            raise
        raise _lost_rank_error(error) from None


def _lost_rank_error(error: Exception) -> RunEnvironmentError:
    """The error of a rank whose collective operation failed."""
    with suppress(ValueError):  # signals can only be set in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent by the launcher, before the error is printed
    if _heartbeat is not None:
        _heartbeat.expect_own_error()
        if known := _heartbeat.lost_ranks(LOSS_NOTICE_S):
            result = _error_of(known, first_line(error))
            result.prints_message = result.prints_message and known[0].exit_code is None
            return result
    lost = None if _membership is None else _membership.unresponsive_ranks()
    if lost == []:
        return _network_error("all ranks are alive but cannot communicate", error)
    if _membership is None or lost is None:  # the store is lost too
        names = "rank 0" if _membership is None else _membership.store_host
        prints_message = _prints_for_its_node()
    else:
        names = ", ".join(_membership.describe(rank) for rank in lost)
        first_alive = min(set(range(world_size())) - set(lost))
        prints_message = int(os.environ["RANK"]) == first_alive and not _membership.have_reported(lost)
    result = RunEnvironmentError(_this_rank(), f"lost contact with {names} ({first_line(error)})", LOST_RANK_REMEDY)
    result.prints_message = prints_message
    return result


def _error_of(lost: Sequence[RankState], reason: str) -> RunEnvironmentError:
    """The error of a rank that cannot go on without others; one rank prints it. It has the exit code of their error."""
    assert _membership is not None
    failed = [state for state in lost if state.exit_code is not None]
    names = ", ".join(_membership.describe(state.rank) for state in failed or lost)
    what = f"lost contact with {names} ({reason})"
    if failed:
        what = f"cannot go on: {names} failed (exit code {failed[0].exit_code})"
    result = RunEnvironmentError(_this_rank(), what, LOST_RANK_REMEDY)
    result.exit_code = result.exit_code if not failed else failed[0].exit_code or result.exit_code
    loses_store = not _membership.launcher_store and any(state.rank == 0 for state in lost)  # its answers may be lost
    claimed = None if loses_store else _membership.claim_message(LOST_RANK)
    result.prints_message = _prints_for_its_node() if claimed is None else claimed
    return result


def _prints_for_its_node() -> bool:
    """Whether this rank prints what the ranks of its node have in common: without the store they cannot agree."""
    shares_host = (
        _membership is not None and not _membership.launcher_store and _membership.hosts[0] == socket.gethostname()
    )
    return os.environ.get("LOCAL_RANK", "0") == ("1" if shares_host else "0")


def _end_process(lost: Sequence[RankState]) -> None:
    """Called by the heartbeat: says why, and ends this process, whatever its main thread does."""
    exit_code = next((state.exit_code for state in lost if state.exit_code), RunEnvironmentError.exit_code)
    deadline = threading.Timer(EXIT_TIMEOUT_S, os._exit, (exit_code,))  # if printing blocks
    deadline.daemon = True
    deadline.start()
    error = _error_of(lost, "its process has ended, or its machine cannot be reached")
    if _exit_with is not None:
        _exit_with(error)
    if error.prints_message:
        logger.error(str(error), extra=EVERY_RANK)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(error.exit_code)


def _network_error(problem: str, error: Exception) -> RunEnvironmentError:
    remedy = (
        "set NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME on CPUs) to the network interface that connects the nodes, or "
        "increase distributed.timeout_s"
    )
    return RunEnvironmentError(_this_rank(), f"{problem} ({first_line(error)})", remedy)


def _this_rank() -> str:
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"

"""Membership: all ranks register in a store, and errors name the ranks that do not join or are lost later."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from threading import Thread
from typing import TypeVar

import torch.distributed as dist

from nesso_tune.errors import Problem, RunEnvironmentError

RESPONSE_TIMEOUT_S = 3  # for ranks that are alive to respond after a failure
RANK0_HEAD_START_S = 0.5
T = TypeVar("T")


def wait_for_ranks(world_size: int, timeout_s: int) -> Membership:
    """Registers this rank and waits until all ranks have joined.

    Raises:
        RunEnvironmentError: if ranks do not join within the timeout; it names them and, where known, their nodes.
    """
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise RunEnvironmentError(
            "MASTER_ADDR, MASTER_PORT", f"are not set, but WORLD_SIZE is {world_size}",
            "start the run with `nesso-tune launch`, torchrun or `accelerate launch`",
        ) from None  # fmt: skip
    launcher_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = _rank() == 0 and not launcher_store
    root = connect_store(address, port, _rank(), world_size, timeout_s, is_master=is_master)
    prefix = f"nesso/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.PrefixStore(prefix, root)
    store.set(f"host/{_rank()}", socket.gethostname())
    missing = missing_ranks(store, "host", world_size, timeout_s)
    if missing:
        error = did_not_join(nodes_of(missing), timeout_s)
        error.prints_message = _rank() == min(set(range(world_size)) - set(missing))
        raise error
    hosts = [store.get(f"host/{rank}").decode() for rank in range(world_size)]
    groups = connect_store(address, port, _rank(), world_size, timeout_s, is_master=False)
    return Membership(store, dist.PrefixStore(prefix, groups), hosts, launcher_store)


class Membership:
    """The ranks of a run and the store that they share.

    Attributes:
        store: served by the launcher or by rank 0.
        hosts: host name of each rank.
        launcher_store: whether the launcher serves the store; otherwise the store is lost with rank 0.
    """

    def __init__(self, store: dist.Store, groups: dist.Store, hosts: Sequence[str], launcher_store: bool) -> None:
        self.store, self.hosts, self.launcher_store = store, tuple(hosts), launcher_store
        self._group_root = groups  # a connection of its own: a process group can block one while it waits
        self._polls = self._groups = self._turns = 0

    def new_group_store(self) -> dist.Store:
        """A namespace of the store for one more process group: each run of a chain has its own group."""
        self._groups += 1
        return dist.PrefixStore(f"group/{self._groups}", self._group_root)

    def new_turn(self) -> str:
        """A namespace of the store for work that ranks do one after another."""
        self._turns += 1
        return f"turn/{self._turns}"

    def unresponsive_ranks(self) -> list[int] | None:
        """After a failure, the ranks that do not respond; None if the store does not respond."""
        self._polls += 1
        key = f"alive/{self._polls}"

        def poll() -> list[int]:
            self.store.set(f"{key}/{_rank()}", "")
            return missing_ranks(self.store, key, len(self.hosts), RESPONSE_TIMEOUT_S)

        return with_timeout(poll, RESPONSE_TIMEOUT_S + 1)

    def claim_message(self, message: str) -> bool | None:
        """Whether this rank prints an error that other ranks may have too; None if the store does not respond.

        Rank 0 has precedence.
        """
        key = f"printed/{hashlib.sha256(message.encode()).hexdigest()}"

        def claim() -> bool:
            if _rank() != 0:
                time.sleep(RANK0_HEAD_START_S)
            return bool(self.store.add(key, 1) == 1)

        return with_timeout(claim, RESPONSE_TIMEOUT_S + 1)

    def mark_reported(self) -> None:
        """Marks this rank as ended by an error of its own."""
        with_timeout(lambda: self.store.set(f"ended/{_rank()}", ""), RESPONSE_TIMEOUT_S + 1)

    def have_reported(self, ranks: Sequence[int]) -> bool:
        """Whether lost ranks ended with an error of their own."""
        keys = [f"ended/{rank}" for rank in ranks]
        return bool(with_timeout(lambda: self.store.check(keys), RESPONSE_TIMEOUT_S + 1))

    @property
    def store_host(self) -> str:
        """The process that serves the store, for errors."""
        return f"the launcher on {os.environ['MASTER_ADDR']}" if self.launcher_store else self.describe(0)

    def describe(self, rank: int) -> str:
        """A rank and its host, for errors."""
        return f"rank {rank} on {self.hosts[rank]}"


def with_timeout(query: Callable[[], T], timeout_s: float) -> T | None:
    """The result of a query to other ranks; None if it fails or takes too long, as without a network connection."""
    results: list[T] = []

    def run() -> None:
        with suppress(dist.DistError, RuntimeError):
            results.append(query())

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return results[0] if results else None


def connect_store(
    address: str, port: int, rank: int, world_size: int, timeout_s: int, *, is_master: bool
) -> dist.Store:
    """Connects to the TCP store at an address, or serves it.

    Raises:
        RunEnvironmentError: if the store cannot be reached, or the port is in use.
    """
    timeout = timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(address, port, world_size, is_master, timeout, wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        if "EADDRINUSE" in str(error):
            raise RunEnvironmentError(
                f"{address}:{port}", "is in use",
                "set another port: --master_port of torchrun, --main_process_port of accelerate",
            ) from None  # fmt: skip
        unreachable = RunEnvironmentError(
            f"{address}:{port}", f"cannot be reached from {socket.gethostname()} (rank {rank})",
            "check that the process on the first node is running, and that no firewall blocks the port",
        )  # fmt: skip
        unreachable.prints_message = None if "TORCHELASTIC_RUN_ID" in os.environ else True
        raise unreachable from None


def missing_ranks(store: dist.Store, key: str, world_size: int, timeout_s: float) -> list[int]:
    """The ranks that have not set `key/<rank>` within the timeout."""
    deadline = time.monotonic() + timeout_s
    keys = [f"{key}/{rank}" for rank in range(world_size)]
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [rank for rank in range(world_size) if not store.check([keys[rank]])]


def did_not_join(nodes: Sequence[str], timeout_s: int) -> RunEnvironmentError:
    """The error that names the nodes that did not join within the timeout."""
    remedy = "check that the node is up and its process was launched"
    return RunEnvironmentError(Problem(node, f"did not join within {timeout_s} s", remedy) for node in nodes)


def nodes_of(ranks: Sequence[int]) -> list[str]:
    """The nodes of ranks that never joined, with these ranks in parentheses."""
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    names = slurm_node_names()
    by_node: dict[int, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(rank // ranks_per_node, []).append(rank)
    return [f"{node_name(node, names)} (rank {', '.join(map(str, of_node))})" for node, of_node in by_node.items()]


def node_name(number: int, names: Sequence[str]) -> str:
    """The name of a node in Slurm; outside Slurm its number."""
    return names[number] if number < len(names) else f"node {number}"


def slurm_node_names() -> list[str]:
    """Host names of the job's nodes, in the order of their numbers; empty outside Slurm."""
    node_list = os.environ.get("SLURM_JOB_NODELIST")
    if not node_list or shutil.which("scontrol") is None:
        return []
    done = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=False)
    return done.stdout.split()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))

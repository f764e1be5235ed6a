"""Who is there: processes that do not come are named, and so are those that are lost later."""

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

ANSWER_S = 3  # seconds in which a process that lives says so after a loss
AFTER_FIRST_S = 0.5
T = TypeVar("T")


class Membership:
    """The store where processes say their names, and the names of all.

    Attributes:
        store: of the launcher, or of the first process.
        hosts: the machine of each process.
        launchers: whether the store is the launcher's; else it goes with the first process.
    """

    def __init__(self, store: dist.Store, hosts: Sequence[str], launchers: bool) -> None:
        self.store, self.hosts, self.launchers = store, tuple(hosts), launchers
        self._asked = self._formed = 0

    def new_group_store(self) -> dist.Store:
        """A part of the store for one more process group: each run of a chain has its own."""
        self._formed += 1
        return dist.PrefixStore(f"group/{self._formed}", self.store)

    def unresponsive_ranks(self) -> list[int] | None:
        """After a loss: the processes that do not answer. None if the store itself does not."""
        self._asked += 1
        key = f"alive/{self._asked}"

        def ask() -> list[int]:
            self.store.set(f"{key}/{_rank()}", "")
            return missing_ranks(self.store, key, len(self.hosts), ANSWER_S)

        return _bounded(ask)

    def claim_message(self, message: str) -> bool | None:
        """Whether this process is to print what several may have found; notes that it ends. None: nobody can tell.

        The first process goes first if it has found it, too.
        """
        key = f"said/{hashlib.sha256(message.encode()).hexdigest()}"

        def claim() -> bool:
            self.store.set(f"ended/{_rank()}", "")
            if _rank() != 0:
                time.sleep(AFTER_FIRST_S)
            return bool(self.store.add(key, 1) == 1)

        return _bounded(claim)

    def have_reported(self, ranks: Sequence[int]) -> bool:
        """Whether processes that are gone said why."""
        return bool(_bounded(lambda: self.store.check([f"ended/{rank}" for rank in ranks])))

    @property
    def store_host(self) -> str:
        """Who is gone when the store is."""
        return f"the launcher on {os.environ['MASTER_ADDR']}" if self.launchers else self.describe(0)

    def describe(self, rank: int) -> str:
        """A process and its machine, as errors call them."""
        return f"process {rank} on {self.hosts[rank]}"


def _bounded(ask: Callable[[], T]) -> T | None:
    """What a question to the store gives; None if it does not answer: over a cut cable its client waits for ever."""
    found: list[T] = []

    def try_it() -> None:
        with suppress(dist.DistError, RuntimeError):
            found.append(ask())

    asking = Thread(target=try_it, daemon=True)
    asking.start()
    asking.join(ANSWER_S + 1)
    return found[0] if found else None


def wait_for_ranks(processes: int, timeout_s: int) -> Membership:
    """Waits until every process has said its name.

    Raises:
        RunEnvironmentError: naming those that did not come within the time and, where it is known, their machines.
    """
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise RunEnvironmentError(
            "MASTER_ADDR, MASTER_PORT", f"do not say where the {processes} processes of WORLD_SIZE meet",
            "start them with `nesso-tune launch`, torchrun or `accelerate launch`",
        ) from None  # fmt: skip
    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = _rank() == 0 and not launchers
    store = connect_store(address, port, _rank(), processes, timeout_s, is_master=serves)
    own = dist.PrefixStore(f"nesso/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    own.set(f"here/{_rank()}", socket.gethostname())
    missing = missing_ranks(own, "here", processes, timeout_s)
    if missing:
        nobody = did_not_join(nodes_of(missing), timeout_s)
        nobody.speaks = _rank() == min(set(range(processes)) - set(missing))
        raise nobody
    return Membership(own, [own.get(f"here/{rank}").decode() for rank in range(processes)], launchers)


def connect_store(address: str, port: int, rank: int, members: int, timeout_s: int, *, is_master: bool) -> dist.Store:
    """The store at an address, which one member serves.

    Raises:
        RunEnvironmentError: if it cannot be reached, or something else has its port.
    """
    limit = timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(address, port, members, is_master, limit, wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        if "EADDRINUSE" in str(error):
            raise RunEnvironmentError(
                f"{address}:{port}", "is in use",
                "give torchrun another --master_port, accelerate another --main_process_port",
            ) from None  # fmt: skip
        unreached = RunEnvironmentError(
            f"{address}:{port}", f"cannot be reached from {socket.gethostname()} (number {rank})",
            "see whether the first machine's part runs, and whether a firewall or another network stands between",
        )  # fmt: skip
        unreached.speaks = None if "TORCHELASTIC_RUN_ID" in os.environ else True
        raise unreached from None


def missing_ranks(store: dist.Store, key: str, processes: int, timeout_s: float) -> list[int]:
    """The processes that have not written their key when the time is up."""
    until = time.monotonic() + timeout_s
    keys = [f"{key}/{rank}" for rank in range(processes)]
    while not store.check(keys) and time.monotonic() < until:
        time.sleep(0.1)
    return [rank for rank in range(processes) if not store.check([keys[rank]])]


def did_not_join(machines: Sequence[str], timeout_s: int) -> RunEnvironmentError:
    """The error that names those for which the others have waited."""
    remedy = "see whether it is up and its part was started"
    return RunEnvironmentError(Problem(machine, f"did not come within {timeout_s} s", remedy) for machine in machines)


def node_name(number: int, nodes: Sequence[str]) -> str:
    """A machine as Slurm calls it, else by its number."""
    return nodes[number] if number < len(nodes) else f"machine {number}"


def nodes_of(ranks: Sequence[int]) -> list[str]:
    """The machines of processes that never said their names: as Slurm calls them, else by number."""
    each = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = slurm_node_names()
    found: dict[int, list[int]] = {}
    for rank in ranks:
        found.setdefault(rank // each, []).append(rank)
    return [f"{node_name(node, nodes)} (process {', '.join(map(str, of))})" for node, of in found.items()]


def slurm_node_names() -> list[str]:
    """Names of the job's machines, in the order of their numbers; empty outside Slurm."""
    packed = os.environ.get("SLURM_JOB_NODELIST")
    if not packed or shutil.which("scontrol") is None:
        return []
    said = subprocess.run(["scontrol", "show", "hostnames", packed], capture_output=True, text=True, check=False)
    return said.stdout.split()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))

"""Heartbeat: a thread in every rank that notices within seconds when another rank has failed or is lost.

NCCL raises no error when a rank is gone: its kernels wait, and a main thread that waits for them runs no Python code,
not even a signal handler. So every rank holds a TCP connection to rank 0, whose address is in the store of
`membership`. The operating system closes it when a process ends, however it ends, and its keepalive probes notice a
machine that is gone. No thread has to answer in time, so a compilation, a slow disk or any other long call is not taken
for a loss.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace

import torch.distributed as dist

from nesso_tune.logs import EVERY_RANK, logger

POLL_S = 0.5
GRACE_S = 5.0  # for the main thread to end by itself: gloo raises an error when a rank is lost
NCCL_GRACE_S = 2.0  # only for an error that all ranks raise; torch's own watchdog may abort the process after that
OWN_ERROR_S = 30.0  # for the main thread to report an error of its own
CONNECT_TIMEOUT_S = 30.0
ALL_CONNECTED_S = 2.0  # for the ranks that have just joined to connect, before rank 0 tells them of its error
MAX_LINE = 4096  # bytes
ADDRESS_KEY = "heartbeat"
KEEPALIVE_S = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}  # 60 s in all


@dataclass(frozen=True)
class RankState:
    """What is known of a rank.

    Attributes:
        rank: its number.
        ended_runs: number of runs that it has ended; a chain of recipes has several.
        exit_code: of the error that ended the last of them; None if it ended well.
        gone: whether its process has ended, or its machine cannot be reached.
    """

    rank: int
    ended_runs: int = 0
    exit_code: int | None = None
    gone: bool = False

    def is_lost_to(self, run: int) -> bool:
        """Whether it will take no further part in a run, counted from 1, without having ended it well."""
        return (self.gone and self.ended_runs < run) or (self.exit_code is not None and self.ended_runs >= run)


@dataclass
class _Connection:
    """A connection to another rank; rank 0 does not know which one until it has sent the token."""

    socket: socket.socket
    rank: int | None
    buffer: bytes = field(default=b"", repr=False)


class Heartbeat:
    """Knows the state of all ranks, and calls `on_loss` in its thread if one is lost to the current run.

    Rank 0 passes what it learns of one rank on to the others. The main thread has `grace_s` to end by itself.
    """

    def __init__(
        self, rank: int, world_size: int, on_loss: Callable[[Sequence[RankState]], None], grace_s: float = GRACE_S
    ) -> None:
        self._own, self._on_loss, self._grace_s = RankState(rank), on_loss, grace_s
        self._unconnected = set(range(1, world_size)) if rank == 0 else set[int]()
        self._states: dict[int, RankState] = {}
        self._connections: list[_Connection] = []
        self._server: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._lock = threading.RLock()
        self._token = b""
        self._in_run = True
        self._noticed_at: float | None = None
        self._wait_until = 0.0

    def start(self, store: dist.Store, master: str, port: int) -> None:
        """Connects to rank 0, or listens as rank 0, and starts the thread.

        Args:
            store: all ranks have joined it.
            master: address of the store.
            port: of the store.
        """
        try:
            if self._own.rank == 0:
                self._listen(store, master, port)
            else:
                self._connect(store.get(ADDRESS_KEY).decode())
        except OSError as error:
            logger.warning(
                f"rank {self._own.rank} on {socket.gethostname()}: no heartbeat ({error}): if a rank is lost, this one "
                "notices it after distributed.timeout_s", extra=EVERY_RANK,
            )  # fmt: skip
            return
        os.register_at_fork(after_in_child=self._close_in_child)
        threading.Thread(target=self._watch, name="nesso-tune heartbeat", daemon=True).start()

    def begin_run(self) -> None:
        """From now on, this rank needs the others."""
        with self._lock:
            self._in_run = True

    def end_run(self, exit_code: int | None = None) -> None:
        """Tells the others that this rank has ended its run, and whether by an error. It no longer needs them."""
        deadline = time.monotonic() + ALL_CONNECTED_S
        while exit_code is not None and self._unconnected and time.monotonic() < deadline:
            time.sleep(0.01)  # a rank that connects too late would not learn why this one is gone
        with self._lock:
            self._own = replace(self._own, ended_runs=self._own.ended_runs + 1, exit_code=exit_code)
            self._in_run, self._noticed_at, self._wait_until = False, None, 0.0
            self._send(self._own)

    def expect_own_error(self) -> None:
        """The main thread reports an error: it gets the time to do so."""
        self._wait_until = time.monotonic() + OWN_ERROR_S

    def lost_ranks(self, wait_s: float = 0.0) -> list[RankState]:
        """The ranks that are lost to the current run, as soon as there are any."""
        deadline = time.monotonic() + wait_s
        while True:
            with self._lock:
                run, states = self._own.ended_runs + 1, sorted(self._states.values(), key=lambda state: state.rank)
            lost = [state for state in states if state.is_lost_to(run)]
            if lost or time.monotonic() >= deadline:
                return lost
            time.sleep(0.05)

    # The thread

    def _watch(self) -> None:
        while True:
            for key, _ in self._selector.select(POLL_S):
                if key.data is None:
                    self._accept()
                else:
                    self._receive(key.data)
            if lost := self._overdue():
                self._on_loss(lost)
                return

    def _overdue(self) -> list[RankState]:
        """The lost ranks, once the main thread has had the time to end by itself."""
        lost = self.lost_ranks() if self._in_run else []
        now = time.monotonic()
        with self._lock:
            if not lost or not self._in_run:
                self._noticed_at = None
                return []
            self._noticed_at = self._noticed_at or now
            return lost if now >= max(self._noticed_at + self._grace_s, self._wait_until) else []

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(MAX_LINE)
        except OSError:
            data = b""
        *lines, connection.buffer = (connection.buffer + data).split(b"\n")
        with self._lock:
            trusted = all(self._read(connection, line) for line in lines) and len(connection.buffer) < MAX_LINE
            if not data or not trusted:
                self._drop(connection)

    def _read(self, connection: _Connection, line: bytes) -> bool:
        """Reads a line; whether it comes from a rank of this run."""
        if connection.rank is None:
            token, _, rank = line.partition(b" ")
            if not hmac.compare_digest(token, self._token) or not rank.isdigit():
                return False
            connection.rank = int(rank)
            self._unconnected.discard(connection.rank)
            for state in (self._own, *self._states.values()):
                self._send(state, only=connection)
            return True
        state = RankState(**json.loads(line))
        self._update(state, connection)
        return True

    def _drop(self, connection: _Connection) -> None:
        self._selector.unregister(connection.socket)
        self._connections.remove(connection)
        connection.socket.close()
        if connection.rank is not None:
            state = self._states.get(connection.rank, RankState(connection.rank))
            self._update(replace(state, gone=True), connection)

    def _update(self, state: RankState, source: _Connection) -> None:
        self._states[state.rank] = state
        if self._own.rank == 0:
            self._send(state, besides=source)

    # Connections

    def _listen(self, store: dist.Store, master: str, port: int) -> None:
        self._token = secrets.token_hex(16).encode()
        address = ""
        try:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)
            self._selector.register(self._server, selectors.EVENT_READ, None)
            address = json.dumps([_own_address(master, port), self._server.getsockname()[1], self._token.decode()])
        finally:
            store.set(ADDRESS_KEY, address)  # empty: the others do not wait for it

    def _accept(self) -> None:
        assert self._server is not None
        with suppress(OSError):
            self._add(_Connection(self._server.accept()[0], None))

    def _connect(self, address: str) -> None:
        if not address:
            raise OSError("rank 0 cannot listen")
        host, port, token = json.loads(address)
        connected = socket.create_connection((host, port), CONNECT_TIMEOUT_S)
        connected.settimeout(None)
        connected.sendall(f"{token} {self._own.rank}\n".encode())
        self._add(_Connection(connected, 0))

    def _add(self, connection: _Connection) -> None:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE_S.items():
            if hasattr(socket, option):  # not on every system
                connection.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        with self._lock:
            self._connections.append(connection)
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def _send(self, state: RankState, only: _Connection | None = None, besides: _Connection | None = None) -> None:
        line = json.dumps(asdict(state)).encode() + b"\n"
        for connection in self._connections if only is None else [only]:
            if connection is not besides and connection.rank is not None:
                with suppress(OSError):  # the thread notices that it is closed
                    connection.socket.sendall(line)

    def _close_in_child(self) -> None:
        """A forked child must not keep the connections of its parent open."""
        for connection in self._connections:
            connection.socket.close()
        if self._server is not None:
            self._server.close()


def _own_address(master: str, port: int) -> str:
    """The address of this machine on the network of the store; the store's own address if it is on this machine."""
    family, kind, _, _, address = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        own = str(probe.getsockname()[0])
    return master if own == address[0] or own.startswith("127.") or own == "::1" else own

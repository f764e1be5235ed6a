"""Measurements of `nesso-tune doctor` across the machines of a launcher: links, shared folders, locks and clocks.

All functions that measure are called by all ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from nesso_tune.distributed.process_group import (
    broadcast_from_rank0,
    init_process_group,
    process_group_of_run,
    report_lost_ranks,
)
from nesso_tune.errors import Problem
from nesso_tune.files import format_bytes
from nesso_tune.launch.doctor import Disk, MachineReport, existing_folder
from nesso_tune.logs import aligned

MESSAGE_SIZE = 16 << 20  # elements of the test message: 64 MiB in float32
ROUNDS = 5
SLOW = 0.5  # report speeds below this fraction of the median
SLOW_DISK = 0.25  # disks are shared with other users
MAX_CLOCK_DIFFERENCE_S = 1.0
NEW_FILE_S = 5.0  # network file systems may show a new file only after a moment


class Link(NamedTuple):
    """Bandwidth in GB/s between two processes, given by (host, rank)."""

    one: tuple[str, int]
    other: tuple[str, int]
    speed: float

    def __str__(self) -> str:
        return f"{self.one[0]} (process {self.one[1]}) to {self.other[0]} (process {self.other[1]})"


@dataclass(frozen=True)
class Allocation:
    """What all processes found together.

    Attributes:
        machines: report of each rank.
        reduce_s: seconds of an all-reduce of the test message over all ranks.
        inside: GB/s of an all-reduce among the processes of each host with several.
        links: between a process of each host and one of each other; on a single host, from rank 0 to the others.
        clocks: seconds by which the clock of each host differs from the median.
        unshared: hosts that do not see a file that rank 0 made in the output folder.
        local_locks: whether another host could take a lock that rank 0 holds there; None if none sees the folder.
    """

    machines: list[MachineReport]
    reduce_s: float
    inside: dict[str, float]
    links: list[Link]
    clocks: dict[str, float]
    unshared: list[str]
    local_locks: bool | None

    @property
    def hosts(self) -> list[str]:
        """The hosts, in the order of their first rank."""
        return list(dict.fromkeys(machine.host for machine in self.machines))

    def facts(self) -> list[tuple[str, str]]:
        """(label, value) lines to print."""
        n = len(self.machines)
        locks = "of each machine alone (no lock of another machine is seen)" if self.local_locks else "shared"
        reduced = f"64 MiB in {self.reduce_s * 1e3:.0f} ms, {_ring_rate(n, self.reduce_s):.1f} GB/s"
        facts = [("processes", f"{n} on {len(self.hosts)} machine(s)"), ("all-reduce", reduced)]
        if self.local_locks is not None:
            facts.append(("file locks", locks))
        return facts + [("link", f"{link}: {link.speed:.1f} GB/s") for link in self.links]

    def problems(self) -> list[Problem]:
        """Problems of single machines, and machines that differ from the others."""
        # processes of one machine report the same problem
        own = dict.fromkeys((machine.host, problem) for machine in self.machines for problem in machine.problems)
        problems = [Problem(f"{host}: {p.where}", p.what, p.remedy) for host, p in own]
        unseen, shared = "does not see the output folder of the first machine", "set output_dir to a shared file system"
        problems += [Problem(host, unseen, shared) for host in self.unshared]
        problems += [
            Problem(host, f"clock differs by {offset:+.1f} s", "synchronise it (NTP)")
            for host, offset in self.clocks.items() if abs(offset) > MAX_CLOCK_DIFFERENCE_S
        ]  # fmt: skip
        remedy = "check its GPUs and their links (`nvidia-smi topo -m`), or exclude it"
        problems += slow_ones("all-reduce among its processes", self.inside, "GB/s", SLOW, remedy)
        return [*problems, *self._slow_disks(), *slow_links(self.links), *find_differences(self.machines)]

    def _slow_disks(self) -> list[Problem]:
        """Of at least three machines with the same disk: the speed of a disk that others use too varies."""
        by_label: dict[str, dict[str, float]] = {}
        for machine in self.machines:
            for disk in machine.disks:
                by_label.setdefault(disk.label, {})[machine.host] = disk.write_rate / 1e6
        if len(self.hosts) - len(self.unshared) < 3:
            return []
        remedy = "check its connection to the file system, or exclude it"
        return [
            problem for label, speeds in by_label.items()  # a host that does not share the folder has a disk of its own
            for problem in slow_ones(f"disk of {label}", speeds, "MB/s", SLOW_DISK, remedy, self.unshared)
        ]  # fmt: skip

    def table(self, problems: Sequence[Problem]) -> list[str]:
        """One line for each machine, with the number of its problems."""
        rows = [("machine", "GPUs", "inside GB/s", "links GB/s", "clock s", "output folder", "caches", "problems")]
        for host in self.hosts:
            machine = next(machine for machine in self.machines if machine.host == host)
            speeds = [link.speed for link in self.links if host in (link.one[0], link.other[0])]
            count = sum(problem.where == host or problem.where.startswith(f"{host}: ") for problem in problems)
            rows.append(
                (host, str(len(machine.gpus)), _number(self.inside.get(host)),
                 _number(statistics.median(speeds) if speeds else None), f"{self.clocks[host]:+.2f}",
                 *_disk_cells(machine.disks), str(count) if count else "none")
            )  # fmt: skip
        return aligned(rows)


def measure_allocation(machine: MachineReport, folder: Path, timeout_s: int) -> Allocation:
    """Measures what connects the processes of a launcher, in a process group of its own; the same on all ranks.

    Args:
        machine: report of this process.
        folder: output folder of runs; it need not exist.
        timeout_s: seconds for each step.

    Raises:
        RunEnvironmentError: if a process did not join or is lost.
    """
    with process_group_of_run():
        init_process_group(timeout_s)
        with report_lost_ranks():
            machines = gather_object([machine])
            hosts = [one.host for one in machines]
            dist.barrier()
            clocks = gather_object([time.time()])
            reduce_s = broadcast_from_rank0(_median_time(dist.all_reduce))
            inside, links = _inside(hosts), _links(hosts)
            unshared, local_locks = _shared_folder(existing_folder(folder), hosts)
    middle = statistics.median(clocks)
    offsets = {host: clock - middle for host, clock in zip(hosts, clocks, strict=True)}
    return Allocation(machines, reduce_s, inside, links, offsets, unshared, local_locks)


def find_differences(machines: Sequence[MachineReport]) -> list[Problem]:
    """Problems with machines that differ from the majority in GPUs or versions."""
    problems = []
    for name in dict.fromkeys(name for machine in machines for name in machine.versions):
        problems += _outliers(name, [(m.host, m.versions.get(name, "missing")) for m in machines])
    return problems + _outliers("GPUs", [(m.host, ", ".join(m.gpus) or "none") for m in machines])


def _outliers(name: str, values: list[tuple[str, str]]) -> list[Problem]:
    """Problems with the hosts whose value is not the most common one; `values` are (host, value)."""
    common = statistics.mode(value for _, value in values)
    outliers = dict.fromkeys((host, value) for host, value in values if value != common)
    remedy = "use the same on all machines"
    return [Problem(host, f"{name} is {value}, on the others {common}", remedy) for host, value in outliers]


def slow_links(links: Sequence[Link]) -> list[Problem]:
    """Problems with machines whose links are slow, and with single slow links between the others.

    Usual is the median, over the machines, of their fastest links: one bad machine makes half of all links slow.
    """
    by_host: dict[str, list[float]] = {}
    for link in links:
        for host in {link.one[0], link.other[0]}:
            by_host.setdefault(host, []).append(link.speed)
    if not links:
        return []
    several = len(by_host) > 1
    usual = statistics.median(max(speeds) for speeds in by_host.values()) if several else _median_speed(links)
    remedy = "check its network, or exclude it"
    problems = [Problem(host, f"its links have at most {max(speeds):.1f} GB/s (usual: {usual:.1f})", remedy)
                for host, speeds in by_host.items() if several and max(speeds) < SLOW * usual]  # fmt: skip
    named = {problem.where for problem in problems}
    return problems + [
        Problem(str(link), f"bandwidth {link.speed:.1f} GB/s (usual: {usual:.1f})", remedy)
        for link in links if link.speed < SLOW * usual and not {link.one[0], link.other[0]} & named
    ]  # fmt: skip


def _median_speed(links: Sequence[Link]) -> float:
    return statistics.median(link.speed for link in links)


def slow_ones(
    what: str, speeds: Mapping[str, float], unit: str, fraction: float, remedy: str, others: Collection[str] = ()
) -> list[Problem]:
    """Problems with machines below a fraction of the median speed.

    Args:
        what: was measured.
        speeds: by host.
        unit: of the speeds.
        fraction: of the median speed.
        remedy: of each problem.
        others: hosts that do not count in the median.
    """
    counted = [speed for host, speed in speeds.items() if host not in others]
    median = statistics.median(counted) if counted else 0.0
    return [
        Problem(host, f"{what}: {speed:.1f} {unit} (median: {median:.1f})", remedy)
        for host, speed in speeds.items() if speed < fraction * median
    ]  # fmt: skip


def pair_rounds(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """All pairs of some ranks in rounds, so that each rank is in at most one pair of a round (circle method)."""
    circle: list[int | None] = [*ranks, *([None] if len(ranks) % 2 else [])]
    rounds = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def _links(hosts: Sequence[str]) -> list[Link]:
    """The links between the first processes of all machines, measured in rounds; see `Allocation.links`."""
    firsts = [hosts.index(host) for host in dict.fromkeys(hosts)]
    rounds = pair_rounds(firsts) if len(firsts) > 1 else [[(0, other)] for other in range(1, len(hosts))]
    rank, own = dist.get_rank(), []
    for pairs in rounds:
        for one, other in pairs:
            if rank in (one, other):
                took = _median_time(partial(_ping_pong, one, other))
                if rank == one:
                    speed = 2 * MESSAGE_SIZE * 4 / took / 1e9
                    own.append(Link((hosts[one], one), (hosts[other], other), speed))
        dist.barrier()
    links: list[Link] = gather_object(own)
    return links


def _inside(hosts: Sequence[str]) -> dict[str, float]:
    """GB/s of an all-reduce among the processes of each host that has several; all hosts at the same time."""
    own: list[tuple[str, float]] = []
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, name in enumerate(hosts) if name == host]
        if 1 < len(ranks) < len(hosts):
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                took = _median_time(partial(dist.all_reduce, group=group))
                own = [(host, _ring_rate(len(ranks), took))] if dist.get_rank() == ranks[0] else []
    dist.barrier()
    return dict(gather_object(own))


def _shared_folder(folder: Path, hosts: Sequence[str]) -> tuple[list[str], bool | None]:
    """The hosts that do not see a file of rank 0 in the folder, and whether one of them takes a lock of rank 0."""
    rank = dist.get_rank()
    file = folder / f".doctor-{broadcast_from_rank0(uuid4().hex if rank == 0 else None)}"
    lock = FileLock(file, timeout=0)
    if rank == 0:
        _try(lock.acquire)
    dist.barrier()
    sees, took = rank == 0, False
    if rank != 0 and hosts.index(hosts[rank]) == rank:  # the first process of another host
        deadline = time.monotonic() + NEW_FILE_S
        while not (sees := file.exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        took = sees and _try(lock.acquire)
    found = gather_object([(hosts[rank], sees or hosts.index(hosts[rank]) != rank, took)])
    dist.barrier()
    if rank == 0 or took:
        lock.release()
    if rank == 0:
        _try(file.unlink)
    unshared = [host for host, sees, _ in found if not sees]
    others = {*hosts} - {hosts[0], *unshared}
    return unshared, any(took for _, _, took in found) if others else None


def _try(action: Callable[[], object]) -> bool:
    """Whether an action on the file system succeeds; disks that cannot be written are reported by `inspect_machine`."""
    try:
        action()
    except (OSError, Timeout, NotImplementedError):
        return False
    return True


def _ping_pong(one: int, other: int, message: torch.Tensor) -> None:
    if dist.get_rank() == one:
        dist.send(message, other)
        dist.recv(message, other)
    else:
        dist.recv(message, one)
        dist.send(message, one)


def _median_time(operation: Callable[[torch.Tensor], object]) -> float:
    """Median seconds of an operation on the test message, without the first call, which initializes connections."""
    on_gpu = torch.cuda.is_available()
    message = torch.zeros(MESSAGE_SIZE, device="cuda" if on_gpu else "cpu")
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        operation(message)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _ring_rate(processes: int, seconds: float) -> float:
    """GB/s of each link in a ring all-reduce of the test message."""
    return 2 * (processes - 1) / processes * MESSAGE_SIZE * 4 / seconds / 1e9


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _disk_cells(disks: Sequence[Disk]) -> tuple[str, str]:
    """The output folder, and the slowest of the caches."""
    first, *others = [
        f"{format_bytes(disk.free)} free, {disk.write_rate / 1e6:.0f} MB/s, {disk.latency_s * 1e3:.1f} ms"
        for disk in disks
    ] or ["-"]
    return first, others[0] if others else "-"

"""Whether the processes of a job find each other, are alike, and how fast they talk; in bounded time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from nesso_tune.errors import Problem
from nesso_tune.launch.machine import Machine
from nesso_tune.training.processes import come_together, contact, from_first, world_size

MESSAGE = 16 << 20  # numbers of one test message: 64 MiB in float32
ROUNDS = 5
SLOW = 0.5  # of the median: below it a link is named


def compare(machines: Sequence[Machine]) -> list[Problem]:
    """What differs between machines: each that is not as most are, by name."""
    problems = []
    for name in dict.fromkeys(name for machine in machines for name in machine.versions):
        problems += _odd(name, [(m.host, m.versions.get(name, "missing")) for m in machines])
    return problems + _odd("GPUs", [(m.host, ", ".join(m.gpus) or "none") for m in machines])


def _odd(what: str, of: list[tuple[str, str]]) -> list[Problem]:
    usual = statistics.mode(value for _, value in of)
    odd = dict.fromkeys((host, value) for host, value in of if value != usual)
    return [Problem(host, f"{what} is {value}, elsewhere {usual}", "make the machines alike") for host, value in odd]


def meet(machine: Machine, timeout_s: int) -> tuple[list[Machine], list[tuple[str, str]], list[Problem]]:
    """Brings all processes together and measures how they talk.

    Args:
        machine: what this process found.
        timeout_s: seconds for each step.

    Returns:
        What every process found, facts for people, and problems; the same on all processes.

    Raises:
        RunEnvironmentError: if a process is missing or lost.
    """
    come_together(timeout_s)
    with contact():
        machines = gather_object([machine])
        reduce_s = _median_time(dist.all_reduce)
        reduce_s = from_first(reduce_s)
        links = _links(machines)
    n = world_size()
    rate = 2 * (n - 1) / n * MESSAGE * 4 / reduce_s / 1e9  # what a ring moves over each link
    facts = [("processes", f"{n} on {len({m.host for m in machines})} machine(s)"),
             ("all-reduce", f"64 MiB in {reduce_s * 1e3:.0f} ms, {rate:.1f} GB/s")]  # fmt: skip
    facts += [("link", f"process 0 to {name}: {speed:.1f} GB/s") for name, speed in links]
    return machines, facts, [*compare(machines), *slow(links)]


def slow(links: Sequence[tuple[str, float]]) -> list[Problem]:
    """The links (name, GB/s) that are far below the others."""
    if not links:
        return []
    usual = statistics.median(speed for _, speed in links)
    return [
        Problem(name, f"talks at {speed:.1f} GB/s, the others at {usual:.1f}", "look at its network, or leave it out")
        for name, speed in links if speed < SLOW * usual
    ]  # fmt: skip


def _links(machines: Sequence[Machine]) -> list[tuple[str, float]]:
    """GB/s from the first process to one process of every other machine, in turn; on one machine, to each process."""
    rank, seen, peers = dist.get_rank(), {machines[0].host}, []
    alone = len({machine.host for machine in machines}) == 1
    for other, machine in enumerate(machines[1:], 1):
        if alone or machine.host not in seen:
            peers.append(other)
            seen.add(machine.host)
    links = []
    for peer in peers:
        took = _median_time(partial(_there_and_back, rank, peer)) if rank in (0, peer) else None
        dist.barrier()
        links.append((f"{machines[peer].host} (process {peer})", 2 * MESSAGE * 4 / from_first(took) / 1e9))
    return links


def _there_and_back(rank: int, peer: int, message: torch.Tensor) -> None:
    if rank == 0:
        dist.send(message, peer)
        dist.recv(message, peer)
    else:
        dist.recv(message, 0)
        dist.send(message, 0)


def _median_time(operation: Callable[[torch.Tensor], Any]) -> float:
    """Seconds that an operation on the test message takes; the first time, which sets things up, does not count."""
    on_gpu = torch.cuda.is_available()
    message = torch.zeros(MESSAGE, device="cuda" if on_gpu else "cpu")
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        operation(message)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])

"""Work on blocks in as many processes as there are cores, results in the order of the blocks.

The processes are forked: they share the tokenizer and whatever else the work needs, and start at once. What runs in
them never touches torch or a device, so a fork is safe even where the parent has loaded both.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import chain, islice
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, TypeVar

from nesso_tune import cache
from nesso_tune.errors import RunEnvironmentError
from nesso_tune.recipes.schema import Recipe

Block = TypeVar("Block")
Result = TypeVar("Result")
BLOCKS_AHEAD_PER_PROCESS = 3  # blocks for each process that are read before their results are asked for
MIN_PARALLEL_BLOCKS = 4  # blocks that are worked on here: below, starting processes takes longer

_work: Callable[[Any], Any] | None = None  # in a worker: what it does


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(work: Callable[[Block], Result], blocks: Iterable[Block]) -> Iterator[Result]:
    """What `work` makes of each block, in order; few blocks are in memory at a time.

    Raises:
        whatever `work` raises, when it is the turn of its block.
        RunEnvironmentError: if a process is ended from outside.
    """
    jobs, blocks = available_cores() if sys.platform == "linux" else 1, iter(blocks)
    first = list(islice(blocks, MIN_PARALLEL_BLOCKS))
    if jobs == 1 or len(first) < MIN_PARALLEL_BLOCKS:
        yield from map(work, chain(first, blocks))
        return
    with _processes(work, jobs) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for block in chain(first, blocks):
                pending.append(pool.submit(_do, block))
                if len(pending) >= BLOCKS_AHEAD_PER_PROCESS * jobs:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise RunEnvironmentError(
                "preparation", "one of its processes was ended from outside", "look whether memory ran out; run again"
            ) from None


@contextmanager
def _processes(work: Callable[[Any], Any], jobs: int) -> Iterator[ProcessPoolExecutor]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process is one core's work
    pool = ProcessPoolExecutor(jobs, get_context("fork"), initializer=_start, initargs=(work,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    gc.set_threshold(100_000)  # rows make many objects and no cycles
    follow_parent()


def follow_parent() -> None:
    """In a forked process: the parent decides what comes of signals, and takes the process along when it ends."""
    for asked in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(asked, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent takes its workers along, and with them the lock that they inherited."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _do(block: Any) -> Any:
    assert _work is not None
    return _work(block)


NICE = 10  # loading is the longer way, on one core: where cores are few it goes first

# What is being prepared, by which process, and where it says how that ended.
_begun: tuple[Recipe, BaseProcess, Connection] | None = None


@contextmanager
def prepare_in_background(prepare: Callable[[Recipe], Any], recipe: Recipe) -> Iterator[None]:
    """Prepares the data of a recipe while the block runs; what is not finished at its end is given up."""
    global _begun
    if sys.platform != "linux" or "torch" in sys.modules:  # then there is nothing to win
        yield
        return
    context = get_context("fork")
    result, told = context.Pipe(duplex=False)
    process: BaseProcess = context.Process(target=_prepare, args=(prepare, recipe, told))
    process.start()
    told.close()  # or its end would not be seen
    _begun = recipe, process, result
    try:
        yield
    finally:
        _begun = None
        process.kill()  # its own processes end with it
        process.join()
        result.close()


def wait_for_background_preparation(recipe: Recipe) -> None:
    """Waits where this recipe's data is being prepared.

    Raises:
        whatever went wrong with it.
    """
    global _begun
    if _begun is None or _begun[0] is not recipe:
        return
    (_, process, result), _begun = _begun, None
    error = None
    with suppress(EOFError):  # ended from outside: then it is done here
        error, checked = result.recv()
        cache.trust_verified(checked)  # or all of it would be read and hashed a second time
    process.join()
    if error is not None:
        raise error


def _prepare(prepare: Callable[[Recipe], Any], recipe: Recipe, told: Connection) -> None:
    global _begun
    _begun = None
    follow_parent()
    os.nice(NICE)
    try:
        prepare(recipe)
        told.send((None, cache.verified_files()))
    except Exception as error:
        with suppress(Exception):  # one that cannot be sent is met again by whoever asks for the data
            told.send((error, {}))

"""Parallel work in forked processes: an ordered map over blocks of rows, and preparing data during slow imports.

Forked processes share the tokenizer and everything else in memory, and start at once. Forking is safe although the
parent may have loaded torch: this package's own code uses neither torch nor a device in them, and user readers, which
may use torch on the CPU, run with one thread (as in the workers of torch's `DataLoader`).
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, TypeVar, cast

from nesso_tune import cache
from nesso_tune.data.files import FileHash, FileStamp, hashed_files, trust_hashes
from nesso_tune.errors import RunEnvironmentError
from nesso_tune.recipes.schema import Recipe

Block = TypeVar("Block")
Result = TypeVar("Result")
BLOCKS_AHEAD_PER_PROCESS = 3  # blocks that are read before their results are needed
MIN_PARALLEL_BLOCKS = 4  # with fewer blocks, starting processes takes longer than the work
_NICENESS = 10  # of preparation in the background: the imports in the foreground take longer and use one core

_function: Callable[[Any], Any] | None = None  # in a worker process: what it applies to each block
# Preparation in the background: its recipe, its process, and the connection on which it reports its outcome.
_background: tuple[Recipe, BaseProcess, Connection] | None = None


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(function: Callable[[Block], Result], blocks: Iterable[Block]) -> Iterator[Result]:
    """Applies a function to each block in one process per core; yields the results in the order of the blocks.

    At most `BLOCKS_AHEAD_PER_PROCESS` blocks per process are in memory. A few blocks, or blocks on a single core or on
    a system without safe forking, are processed in this process.

    Raises:
        RunEnvironmentError: if a worker process is killed.
        Exception: whatever the function raises, in the place of that block's result; whatever reading the blocks
            raises, after the results of all earlier blocks. So the first error of the data is the one that is raised.
    """
    processes, read = available_cores() if sys.platform == "linux" else 1, _with_error_as_last(blocks)
    first = list(islice(read, MIN_PARALLEL_BLOCKS))
    if processes == 1 or len(first) < MIN_PARALLEL_BLOCKS:
        for block in chain(first, read):
            if isinstance(block, _ReadError):
                raise block.error
            yield function(block)
        return
    with _process_pool(function, processes) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for block in chain(first, read):
                pending.append(block.future() if isinstance(block, _ReadError) else pool.submit(_apply, block))
                if len(pending) >= BLOCKS_AHEAD_PER_PROCESS * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise RunEnvironmentError(
                "preparation", "a worker process was killed", "check whether the machine ran out of memory; run again"
            ) from None


@dataclass(frozen=True)
class _ReadError:
    """An error that reading a block raised, in the place of that block."""

    error: Exception

    def future(self) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(self.error)
        return future


def _with_error_as_last(blocks: Iterable[Block]) -> Iterator[Block | _ReadError]:
    """The blocks; blocks are read ahead of their results, so an error of reading must wait for its turn."""
    try:
        yield from blocks
    except Exception as error:
        yield _ReadError(error)


@contextmanager
def _process_pool(function: Callable[[Any], Any], processes: int) -> Iterator[ProcessPoolExecutor]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process
    pool = ProcessPoolExecutor(processes, get_context("fork"), initializer=_start_worker, initargs=(function,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    gc.set_threshold(100_000)  # rows make many objects and no cycles
    torch = sys.modules.get("torch")
    if torch is not None:  # its thread pool does not survive a fork: a user reader could wait for it forever
        torch.set_num_threads(1)
    follow_parent()


def _apply(block: Any) -> Any:
    assert _function is not None
    return _function(block)


@dataclass(frozen=True)
class ReadFiles:
    """The files that a process has read and hashed, so that another process on the machine need not.

    Attributes:
        data: of the sources, see `data.files.hashed_files`.
        cached: of prepared data in the cache, see `cache.verified_files`.
    """

    data: dict[str, FileHash]
    cached: dict[str, cache.Stamp]

    @classmethod
    def of_this_process(cls) -> ReadFiles:
        """The files that this process has read."""
        return cls(hashed_files(), cache.verified_files())

    @classmethod
    def from_json(cls, text: str) -> ReadFiles:
        """Reads what `to_json` returned."""
        data, cached = json.loads(text)
        hashes = {
            name: (cast(FileStamp, tuple(stamp)), bytes.fromhex(digest)) for name, (stamp, digest) in data.items()
        }
        return cls(hashes, {name: cast(cache.Stamp, tuple(stamp)) for name, stamp in cached.items()})

    def to_json(self) -> str:
        """The files as ASCII text, for another process."""
        return json.dumps([{name: (stamp, digest.hex()) for name, (stamp, digest) in self.data.items()}, self.cached])

    def trust(self) -> None:
        """Takes them over from another process: files that were not changed since then are not read again."""
        trust_hashes(self.data)
        cache.trust_verified(self.cached)


@contextmanager
def prepare_in_background(prepare: Callable[[Recipe], Any], recipe: Recipe) -> Iterator[None]:
    """Prepares the data of a recipe in another process inside a `with` block; aborts it at the end of the block.

    Does nothing where torch is already imported (there is no time to gain) or forking is unsafe.

    Args:
        prepare: `prepare_data`; it fills the cache.
        recipe: the recipe; `wait_for_background_preparation` compares it by identity.
    """
    global _background
    if sys.platform != "linux" or "torch" in sys.modules:
        yield
        return
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process: BaseProcess = context.Process(target=_prepare, args=(prepare, recipe, sender))
    process.start()
    sender.close()  # so that the receiver sees the end of the stream when the process ends
    _background = recipe, process, receiver
    try:
        yield
    finally:
        _background = None
        process.kill()  # its own worker processes end with it
        process.join()
        receiver.close()


def wait_for_background_preparation(recipe: Recipe) -> None:
    """Waits for the preparation of this recipe in the background, if there is one.

    If that process was killed, this returns, and the caller prepares the data itself.

    Raises:
        Exception: whatever the preparation raised.
    """
    global _background
    if _background is None or _background[0] is not recipe:
        return
    (_, process, receiver), _background = _background, None
    error = None
    with suppress(EOFError):  # the process was killed
        error, files = receiver.recv()
        files.trust()
    process.join()
    if error is not None:
        raise error


def _prepare(prepare: Callable[[Recipe], Any], recipe: Recipe, sender: Connection) -> None:
    """Runs in the background process."""
    global _background
    _background = None
    follow_parent()
    os.nice(_NICENESS)
    try:
        prepare(recipe)
        sender.send((None, ReadFiles.of_this_process()))
    except Exception as error:
        with suppress(Exception):  # an error that cannot be pickled is raised again when the caller prepares the data
            sender.send((error, ReadFiles({}, {})))


def follow_parent() -> None:
    """Leaves signals to the parent process, and makes this process end when the parent does."""
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process when its parent was killed, which also releases the inherited lock."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)

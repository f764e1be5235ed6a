"""Data prepared in a process of its own while this one loads the libraries: neither needs the other, both take seconds.

The process is forked while there are neither threads nor torch. It leaves its result in the cache, where `prepare_data`
finds it; what goes wrong in it is raised there, as if it had gone wrong there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from nesso_tune.data import cache
from nesso_tune.data.pool import follow_parent
from nesso_tune.recipes.schema import Recipe

NICE = 10  # loading is the longer way, on one core: where cores are few it goes first

# What is being prepared, by which process, and where it says how that ended.
_begun: tuple[Recipe, BaseProcess, Connection] | None = None


@contextmanager
def prepared_ahead(prepare: Callable[[Recipe], Any], recipe: Recipe) -> Iterator[None]:
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


def wait_for_it(recipe: Recipe) -> None:
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
        cache.trust(checked)  # or all of it would be read and hashed a second time
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
        told.send((None, cache.checked()))
    except Exception as error:
        with suppress(Exception):  # one that cannot be sent is met again by whoever asks for the data
            told.send((error, {}))

"""What the package logs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from nesso_tune.logs import logger


@contextmanager
def logged(level: int = logging.INFO) -> Iterator[list[str]]:
    """The messages of a block of code, in order."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)

"""What the package logs."""

import logging
import re
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


def without_steps(messages: list[str]) -> list[str]:
    """The messages that are neither the figures of a step nor those of the verified `final/`."""
    return [message for message in messages if not re.match(r"step \d+/\d+ |final/ verified", message)]

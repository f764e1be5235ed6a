"""How far the preparation of data is: rows a second and the time that is left, on stderr."""

from __future__ import annotations

import sys
from time import monotonic

from nesso_tune.terminal import print_notes, print_text

FIRST = 2.0  # seconds before anything is said
EVERY = {True: 0.5, False: 30.0}  # seconds between two lines, in a terminal and elsewhere


class Progress:
    """Counts rows and bytes of the sources; speaks only where it takes a while."""

    def __init__(self, total: int) -> None:
        """`total`: bytes of all sources."""
        self._total, self._started = max(1, total), monotonic()
        self._rows = self._done = 0
        self._terminal = sys.stderr.isatty()
        self._next = self._started + FIRST
        self._spoken = False

    def advance(self, rows: int, size: int) -> None:
        """Adds a block."""
        self._rows, self._done = self._rows + rows, min(self._total, self._done + size)
        now = monotonic()
        if now >= self._next:
            self._next = now + EVERY[self._terminal]
            self._say(now - self._started)

    def end(self) -> None:
        """Leaves the line, if there is one."""
        if self._spoken and self._terminal:
            print_notes("")

    def _say(self, seconds: float) -> None:
        share = self._done / self._total
        left = seconds * (1 - share) / max(share, 1e-9)
        clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
        line = f"{self._rows:,} rows, {self._rows / seconds:,.0f} a second, {share:.0%}, {clock} left"
        start, end = ("\r", "") if self._terminal else ("", "\n")
        print_text(f"{start}{line:<70}{end}", error=True, keep="\r\n")
        self._spoken = True

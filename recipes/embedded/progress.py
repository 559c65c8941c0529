"""Progress on a terminal (one line that changes) or in a file (a line now and then)."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO


class Progress:
    """Shows how far things are. `say` lines stay; `show` lines are replaced by the next one.

    Args:
        stream: where to write; stdout when None.
        every: seconds between `show` lines where lines cannot be replaced.
    """

    def __init__(self, stream: TextIO | None = None, every: float = 10.0) -> None:
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._every = every
        self._next = 0.0

    def say(self, text: str) -> None:
        """Write a line that stays."""
        self._stream.write(f"\r\x1b[K{text}\n" if self._live else f"{text}\n")
        self._stream.flush()
        self._next = 0.0

    def show(self, text: str) -> None:
        """Show `text` as the present state."""
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{text[:width]}")
        elif time.monotonic() >= self._next:
            self._stream.write(f"{text}\n")
            self._next = time.monotonic() + self._every
        self._stream.flush()


class Pace:
    """Time that a training has left, by the updates it took since it was first seen to move.

    Args:
        updates: how many there will be.
    """

    def __init__(self, updates: int) -> None:
        self._updates = updates
        self._first: tuple[float, int] | None = None  # (time, update)

    def left(self, update: int) -> str:
        """M:SS from `update`, which is above 0; `-:--` while nothing is known."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, update)
        since, begun = self._first
        if update <= begun:
            return "-:--"
        return clock((self._updates - update) * (now - since) / (update - begun))


def clock(seconds: float) -> str:
    """Seconds as M:SS."""
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"

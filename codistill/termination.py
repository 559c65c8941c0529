"""SIGTERM, as batch systems and clouds send it: one chance to publish before the process goes.

The signal only leaves a note; the training thread reads it between two updates. The handler that was there before is
called at once. Where there was none, the process still ends by SIGTERM, after the training thread's next update but no
later than `GRACE_SECONDS`, unless that thread hangs inside a library: Python then hears of no signal but SIGKILL. A
second SIGTERM changes nothing, since launcher and scheduler may both send one. Processes forked from this one keep the
handler that was there.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Optional

GRACE_SECONDS = 20.0  # below the 30 that Slurm, Kubernetes and torchrun leave before they kill


class Termination:
    """Whether this process has been asked to end.

    Attributes:
        requested: SIGTERM has come, and `settle` has not been called since.
    """

    def __init__(self) -> None:
        """Nothing is changed before `install`."""
        self.requested = False
        self._before: Any = None
        self._pid: Optional[int] = None  # of the process that installed it; None: not installed
        self._deadline = 0.0

    def install(self) -> None:
        """Listen from now on; Python allows that to the main thread alone, elsewhere nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._before = signal.getsignal(signal.SIGTERM)
        if self._before is not None:  # None: it belongs to a library that is not Python's, and could not be put back
            self._pid = os.getpid()
            signal.signal(signal.SIGTERM, self._note)

    def remove(self) -> None:
        """Put back what was there before, unless somebody else has taken the place meanwhile."""
        if self._pid != os.getpid() or threading.current_thread() is not threading.main_thread():
            return
        self._pid = None
        if signal.getsignal(signal.SIGTERM) == self._note:
            signal.signal(signal.SIGTERM, self._before)

    @property
    def deadly(self) -> bool:
        """Whether nobody else handles the signal, so that it ends the process."""
        return bool(self._before == signal.SIG_DFL)

    @property
    def seconds_left(self) -> float:
        """What remains of the grace."""
        return max(0.0, self._deadline - time.monotonic())

    def settle(self) -> None:
        """What could be done was done: end as SIGTERM would have ended us, or go on where somebody else handles it."""
        self.requested = False
        if self.deadly:
            self._end()

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        if self._pid is None:  # removed, but a handler that came later still calls us
            if callable(self._before):
                self._before(number, frame)
            return
        if os.getpid() != self._pid:
            self._end()
            return
        first, self.requested = not self.requested, True
        if first:
            self._deadline = time.monotonic() + GRACE_SECONDS
        if callable(self._before):
            self._before(number, frame)
        elif self.deadly and first:
            timer = threading.Timer(GRACE_SECONDS, os._exit, (128 + number,))
            timer.daemon = True
            timer.start()

    def _end(self) -> None:
        """Do what would have been done without us."""
        signal.signal(signal.SIGTERM, self._before)
        os.kill(os.getpid(), signal.SIGTERM)

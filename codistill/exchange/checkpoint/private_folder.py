"""The folder where a machine's fetcher keeps verified snapshots for this peer's workers, which map them.

Each start has one of its own: neither another machine with the same temporary folder nor a process that was replaced
and still runs may delete our files, or write to them while they are mapped. A living owner holds a lock in its folder;
so the next start can tell what a killed one has left, and removes that alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path
from typing import Optional

LOCK = "lock"


class PrivateFolder:
    """One start's folder on one machine.

    Attributes:
        path: where it is; the same on all workers of the machine.
    """

    def __init__(self, owner: int, fetcher: int, start: int) -> None:
        """Nothing is made yet.

        Args:
            owner: stands for the peer's save dir; below 2^60, as are the others.
            fetcher: rank of the worker that fetches for this machine.
            start: drawn anew for every start of the peer.
        """
        self._of_any_start = f"codistill-{owner:015x}-{fetcher}-"
        self.path = Path(tempfile.gettempdir()) / f"{self._of_any_start}{start:015x}"
        self._lock: Optional[int] = None

    def make(self) -> None:
        """Make it, for this user alone, in place of what killed starts have left; by the worker that fetches.

        Raises:
            OSError: it cannot be made.
        """
        self._delete_left_behind()
        self.path.mkdir(mode=0o700)
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody can tell, and it may stay
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Delete it, if it was made by this object.

        What a killed start has left, too: its forked children may have held its lock when ours began.
        """
        if self._lock is None:
            return
        self._delete_left_behind()
        _delete(self.path)
        os.close(self._lock)
        self._lock = None

    def _delete_left_behind(self) -> None:
        """Folders of former starts, each while we hold its lock; without one nobody knows, and they are left alone."""
        for folder in self.path.parent.glob(f"{self._of_any_start}*"):
            with contextlib.suppress(OSError):
                lock = os.open(folder / LOCK, os.O_RDWR)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _delete(folder)
                finally:
                    os.close(lock)


def _delete(folder: Path) -> None:
    """Delete it, the lock last: what a kill leaves in the midst can still be told to be nobody's. Follows no link."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            for name in sorted(os.listdir(opened), key=lambda name: name == LOCK):
                os.unlink(name, dir_fd=opened)
        finally:
            os.close(opened)
        folder.rmdir()

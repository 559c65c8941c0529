"""Sockets that a forked child must not keep.

A child forked from this process, such as a loader of data, holds every socket open that was open then. The machine at
the other end would not learn that we have closed ours, or died, before the last child has ended. What is opened within
`kept_from_children` is taken out of a child's hands as it starts, even when it starts meanwhile. Where the system does
not tell which files are open, children keep them.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

_opened: dict[int, int] = {}  # by descriptor, the socket's inode, which tells it from a later one of the same number
_opening: list[frozenset[int]] = []  # for each open block, the inodes that were there before


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Children forked from now on do not hold the network sockets that are opened in this block.

    Others that another thread opens meanwhile count too: a child has no use for those either.
    """
    before = frozenset(_sockets().values())
    _opening.append(before)
    try:
        yield
    finally:
        now = _sockets()
        for descriptor in [one for one, inode in list(_opened.items()) if now.get(one) != inode]:
            _opened.pop(descriptor, None)
        _opened.update({one: inode for one, inode in now.items() if inode not in before})
        _opening[:] = [one for one in _opening if one is not before]


def _sockets() -> dict[int, int]:
    """Inodes of this process's internet sockets, by descriptor."""
    found = {}
    with contextlib.suppress(OSError), _no_default_timeout():
        for descriptor in map(int, os.listdir("/dev/fd")):
            with contextlib.suppress(OSError):  # no socket, or closed meanwhile
                one = socket.socket(fileno=descriptor)
                one.detach()  # looked at, not taken over
                if one.family in (socket.AF_INET, socket.AF_INET6):
                    found[descriptor] = os.fstat(descriptor).st_ino
    return found


@contextlib.contextmanager
def _no_default_timeout() -> Iterator[None]:
    """With one Python would make every socket that it looks at non-blocking, for all that use it."""
    timeout = socket.getdefaulttimeout()
    if timeout is None:
        yield
        return
    socket.setdefaulttimeout(None)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)


def _let_go() -> None:
    """In the child: the descriptors stay taken, so that whoever believes to own one does not meet another file."""
    if not _opened and not _opening:
        return
    before = frozenset.intersection(*_opening) if _opening else None
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor, inode in _sockets().items():
        if _opened.get(descriptor) == inode or (before is not None and inode not in before):
            with contextlib.suppress(OSError):
                os.dup2(nothing, descriptor)
    os.close(nothing)
    _opened.clear()
    _opening.clear()


os.register_at_fork(after_in_child=_let_go)

"""Connecting a group in the background, and how long training may wait for others in all.

`Forming` waits, without any cost to training, until every member has come to the proposal's store, then connects.
Whatever goes wrong makes it FAILED; abandoned, it leaves no connection behind. `Patience` bounds the waits that ended
in nothing: each of them, and their sum as a share of the run.
"""

from __future__ import annotations

import contextlib
import threading
import time
from enum import IntEnum
from typing import Optional

import torch.distributed as dist

from codistill.exchange.prediction.board import CONNECT_SECONDS, reach
from codistill.exchange.prediction.group import Group
from codistill.exchange.prediction.posts import Proposal
from codistill.text import first_line

LOOK_SECONDS = 0.05  # between two looks whether all members are there
JOIN_SECONDS = 15.0  # for connecting once all are there
WAIT_SECONDS = 30.0  # longest wait for the others at one micro-batch
BASE_SECONDS = 60.0  # waits in vain, in all, whatever the length of the run
SHARE = 0.1  # of the run that waits in vain may take beyond that
LEAST_SECONDS = 5.0  # with less left it is no use to meet


class State(IntEnum):
    """What one worker can say of a group that is being formed; the lowest of all workers' answers counts."""

    FAILED = 0
    PENDING = 1
    READY = 2


class Forming:
    """One worker's way into a proposed group.

    Attributes:
        proposal: the group.
        why: what went wrong, once it has.
    """

    def __init__(self, proposal: Proposal, me: int, rank: int) -> None:
        """Begin at once.

        Args:
            proposal: the group; `me` is one of its members.
            me: our peer number.
            rank: this worker; it connects with those of the same rank.
        """
        self.proposal = proposal
        self.why = ""
        self._me, self._rank = me, rank
        self._group: Optional[Group] = None
        self._abandoned = threading.Event()
        self._done = threading.Event()
        self._lock = threading.Lock()  # of `_group`, which belongs to nobody for a moment
        threading.Thread(target=self._run, name="codistill-forming", daemon=True).start()

    @property
    def state(self) -> State:
        """How far it is."""
        if not self._done.is_set():
            return State.PENDING
        return State.FAILED if self._group is None else State.READY

    def wait(self, seconds: float) -> None:
        """Until it is settled, for at most so long."""
        self._done.wait(seconds)

    def take(self) -> Group:
        """The group; once, when READY."""
        with self._lock:
            group, self._group = self._group, None
        assert group is not None, "there is nothing to take"
        return group

    def abandon(self) -> None:
        """Want it no more; one that was not taken is closed."""
        with self._lock:
            self._abandoned.set()
            group, self._group = self._group, None
        if group is not None:
            group.close()

    def _run(self) -> None:
        try:
            group = self._connect()
        except Exception as error:  # a host name that is none, say
            self.why = first_line(error)
            group = None
        with self._lock:
            if not self._abandoned.is_set():
                self._group, group = group, None
        if group is not None:
            group.close()
        self._done.set()

    def _connect(self) -> Optional[Group]:
        proposal = self.proposal
        connection = reach(proposal.host, proposal.port, CONNECT_SECONDS)
        store = dist.PrefixStore(f"{proposal.generation}/{self._rank}", connection)
        store.set(f"come/{self._me}", "1")
        come = [f"come/{member}" for member in proposal.members]
        while not store.check(come):
            if self._abandoned.wait(LOOK_SECONDS):
                return None
        return Group(store, proposal.members, self._me, proposal.generation, JOIN_SECONDS)


class Patience:
    """How long this worker may still wait for others."""

    def __init__(self, timeout: float) -> None:
        """The run begins now; `timeout` seconds are what the user allows for one wait."""
        self._began = time.monotonic()
        self._cap = min(timeout, WAIT_SECONDS)
        host = host_timeout()
        if host is not None:
            self._cap = min(self._cap, host / 3)  # two waits in one update must not let the host's collectives fail
        self._spent = 0.0

    def limit(self) -> float:
        """The longest wait allowed now, in seconds."""
        return max(0.0, min(self._cap, self._left()))

    def spend(self, seconds: float) -> None:
        """So long was waited in vain."""
        self._spent += seconds

    def pause(self) -> float:
        """Seconds until it makes sense to wait for anybody again."""
        return max(0.0, min(LEAST_SECONDS, self._cap) - self._left()) / SHARE

    def _left(self) -> float:
        return BASE_SECONDS + SHARE * (time.monotonic() - self._began) - self._spent


def host_timeout() -> Optional[float]:
    """Seconds after which a collective of the host's own process group fails; None without a group, or unknown."""
    found: list[float] = []
    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(AttributeError, RuntimeError):  # these are torch's own matters
            group = dist.distributed_c10d._get_default_group()
            for device in group._device_types:
                with contextlib.suppress(AttributeError, RuntimeError):
                    found.append(group._get_backend(device).options._timeout.total_seconds())
    return min(found, default=None)

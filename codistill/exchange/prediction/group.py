"""One worker's collective with the same-numbered workers of the other peers, through gloo, beside the host's groups.

Promises: every wait is bounded. Nothing is received before all members have shown the same header, in which the size of
what follows stands; members with different headers all raise `Mismatch` at the same micro-batch, and the group stays
good. After any other failure it is closed, which the others notice at once, and every call raises `GroupLost`. No size
from the network is believed or allocated. Traffic is neither signed nor encrypted: for trusted networks.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from codistill.exchange.errors import ExchangeError
from codistill.exchange.prediction.forks import kept_from_children
from codistill.exchange.snapshot import WIRE_DTYPES
from codistill.text import first_line

logger = logging.getLogger(__name__)

_MAGIC = int.from_bytes(b"codist\0\1", "big")  # the last byte is the version
_FIELDS = 16  # of a header, for ever: gloo aborts the process that meets another size
_DIMENSIONS = 4
_HEADER, _PAYLOAD = 1, 2  # tags
_POLL_SECONDS = 0.02
_LEAST_SECONDS = 0.001  # 0 would mean the group's own time-out
_DTYPES = tuple(WIRE_DTYPES)


class GroupLost(RuntimeError):
    """The group cannot be used any more: a member is gone or did not answer in time, or it was closed."""


class MemberLeft(GroupLost):
    """The group is over since a member has left it on purpose: its training has ended, or goes on somewhere else."""


class Mismatch(ExchangeError):
    """The members are not at the same batch, or not in the same way: this one goes without predictions.

    Causes, the first that applies: batch, shape, format, inputs.

    Attributes:
        front: epoch and batch of the member that is furthest.
        unlike: the members that differ from us.
    """

    front: tuple[int, int] = (0, 0)
    unlike: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Header:
    """What all members must have in common before logits travel.

    Attributes:
        epoch: the host's epoch.
        batch: micro-batch of that epoch.
        shape: of the logits.
        dtype: of the logits on the wire, a key of `WIRE_DTYPES`.
        topk: as in `wire.encode`.
        checksum: of the inputs, from `wire.checksum`.
        size: bytes of payload.
    """

    epoch: int
    batch: int
    shape: tuple[int, ...]
    dtype: str
    topk: int
    checksum: int
    size: int

    def integers(self) -> list[int]:
        """As signed 64-bit integers; leading dimensions beyond four are taken together."""
        shape = list(self.shape)
        while len(shape) > _DIMENSIONS:
            shape[:2] = [shape[0] * shape[1]]
        padding = [-1] * (_DIMENSIONS - len(shape))
        dtype = _DTYPES.index(self.dtype)
        return [self.epoch, self.batch, *shape, *padding, dtype, self.topk, self.checksum, self.size]

    @classmethod
    def of(cls, integers: Sequence[int]) -> Header:
        """What `integers` made of a header; a dtype that is not known has no name."""
        epoch, batch, *shape, dtype, topk, checksum, size = integers
        name = _DTYPES[dtype] if 0 <= dtype < len(_DTYPES) else "unknown"
        return cls(epoch, batch, tuple(length for length in shape if length >= 0), name, topk, checksum, size)


_HELLO = Header(0, 0, (), "float32", 0, 0, 0)
_GOODBYE = Header(-1, 0, (), "float32", 0, 0, 0)


class Group:
    """This worker among the same-numbered workers of the group's members; for one thread at a time.

    Forming and exchanging leave the interpreter to other threads. `close` may be called from any of them; during an
    exchange it takes effect when that ends.

    Attributes:
        sent: bytes sent so far, by exchanges that all members ended.
        received: bytes received so far.
    """

    def __init__(self, store: dist.Store, members: Sequence[int], me: int, generation: int, timeout: float) -> None:
        """Connect; every member must, with a store (or prefix) that no other group uses or has used.

        The address is chosen as gloo does: that of the interface in GLOO_SOCKET_IFNAME, or of the host's name.

        Args:
            store: where the members find each other; another thread that uses the same object may have to wait.
            members: numbers of the peers in the group.
            me: number of this peer.
            generation: of the group, the same for all members.
            timeout: seconds until all must have connected.

        Raises:
            GroupLost: They have not; or the store has failed.
        """
        self.sent = 0
        self.received = 0
        self._me = me
        self._generation = generation
        self._group: Any = None
        ranks = {peer: rank for rank, peer in enumerate(sorted(members))}
        rank = ranks.pop(me)
        self._ranks = ranks
        deadline = time.monotonic() + timeout
        trouble = self._connect(store, rank, deadline)
        if trouble is not None:
            raise GroupLost(f"the group of peers {_listed(sorted(members))} could not form: {trouble}")
        self._meet(_HELLO, deadline)

    def exchange(self, header: Header, payload: Tensor, seconds: float) -> dict[int, Tensor]:
        """Give every other member our payload and take theirs.

        Args:
            header: what this is about.
            payload: one dimension of uint8 on the CPU, of the header's size; not to be changed meanwhile.
            seconds: longest time that all of it may take.

        Returns:
            The other members' payloads, each of the header's size, by peer number.

        Raises:
            Mismatch: The members' headers differ; they may go on with the next micro-batch.
            MemberLeft: A member has left; the group is closed.
            GroupLost: It failed; the group is closed.
            ValueError: The payload is not as described.
        """
        if payload.shape != (header.size,) or payload.dtype != torch.uint8 or not payload.is_contiguous():
            raise ValueError(f"payload has shape {tuple(payload.shape)} and {payload.dtype}, not {header.size} bytes")
        deadline = time.monotonic() + seconds
        theirs, own = self._meet(header, deadline), Header.of(header.integers())
        if left := [peer for peer, other in theirs.items() if other == _GOODBYE]:
            self.close()
            raise MemberLeft(f"{_named(left)} left the group")
        if any(other != own for other in theirs.values()):
            raise _mismatch(own, theirs)
        return self._swap(payload, _PAYLOAD, deadline)

    def leave(self, seconds: float) -> None:
        """Close the group, and have the others know that it was meant; for that wait until their next exchange."""
        with contextlib.suppress(GroupLost):
            self._meet(_GOODBYE, time.monotonic() + seconds)
        self.close()

    def close(self) -> None:
        """Leave the group; the others' exchange with us fails at once. May be called again."""
        self._group = None

    def _connect(self, store: dist.Store, rank: int, deadline: float) -> Optional[str]:
        """Become a member; gives what went wrong."""
        try:
            store.set(f"here/{self._me}", "1")
            while absent := [peer for peer in self._ranks if not store.check([f"here/{peer}"])]:
                if time.monotonic() > deadline:
                    return f"{_named(absent)} did not come in time"
                time.sleep(_POLL_SECONDS)
            with kept_from_children():
                self._group = dist.ProcessGroupGloo(store, rank, len(self._ranks) + 1, _remaining(deadline))
        except RuntimeError as error:
            return first_line(error)
        return None

    def _meet(self, header: Header, deadline: float) -> dict[int, Header]:
        """Everybody shows everybody a header."""
        integers = [_MAGIC, self._generation, self._me, *header.integers()]
        own = torch.tensor(integers + [0] * (_FIELDS - len(integers)), dtype=torch.int64)
        theirs = {}
        for peer, shown in self._swap(own, _HEADER, deadline).items():
            magic, generation, number, *rest = shown.tolist()
            if (magic, generation, number) != (_MAGIC, self._generation, peer):
                self.close()
                raise GroupLost(f"who answered is not peer {peer} of generation {self._generation}")
            theirs[peer] = Header.of(rest[: len(header.integers())])
        return theirs

    def _swap(self, own: Tensor, tag: int, deadline: float) -> dict[int, Tensor]:
        """Everybody gives everybody a tensor of own's size."""
        theirs = {peer: torch.empty_like(own) for peer in self._ranks}
        if own.numel() == 0:
            return theirs
        # No frame that an exception keeps may know the group: it would stay connected.
        trouble = _transfer(self._group, self._ranks, own, theirs, tag, deadline)
        if trouble is not None:
            self.close()
            raise GroupLost(trouble)
        self.sent += own.nbytes * len(theirs)
        self.received += own.nbytes * len(theirs)
        return theirs


def _transfer(
    group: Any, ranks: Mapping[int, int], own: Tensor, theirs: Mapping[int, Tensor], tag: int, deadline: float
) -> Optional[str]:
    """Send `own` to all and fill `theirs`; gives what went wrong.

    Sends and receives between pairs, not a collective: each may be waited for with a time of its own, and nothing is
    copied on the way.
    """
    if group is None:
        return "the group is closed"
    whom = "a peer"
    try:
        works = [(peer, group.recv([theirs[peer]], rank, tag)) for peer, rank in ranks.items()]
        works += [(peer, group.send([own], rank, tag)) for peer, rank in ranks.items()]
        for peer, work in works:
            whom = f"peer {peer}"
            work.wait(_remaining(deadline))
    except RuntimeError as error:
        logger.debug("codistill: %s: %s", whom, error)
        return f"{whom} {'did not answer in time' if time.monotonic() >= deadline else 'closed the connection'}"
    return None


def _remaining(deadline: float) -> timedelta:
    return timedelta(seconds=max(deadline - time.monotonic(), _LEAST_SECONDS))


def _mismatch(own: Header, theirs: Mapping[int, Header]) -> Mismatch:
    unlike = {peer: other for peer, other in theirs.items() if other != own}
    found = [_difference(own, other, peer) for peer, other in unlike.items()]
    mismatch = Mismatch(found[0][0], "; ".join(text for _, text in found))
    mismatch.unlike = frozenset(unlike)
    mismatch.front = max((header.epoch, header.batch) for header in (own, *theirs.values()))
    return mismatch


def _difference(own: Header, other: Header, peer: int) -> tuple[str, str]:
    """The cause, and a person's words, of the first difference that matters."""
    if (other.epoch, other.batch) != (own.epoch, own.batch):
        return "batch", (
            f"peer {peer} is at epoch {other.epoch}, batch {other.batch}, "
            f"we are at epoch {own.epoch}, batch {own.batch}"
        )
    place = f"at epoch {own.epoch}, batch {own.batch}"
    if other.shape != own.shape:
        return "shape", f"peer {peer} has logits of shape {other.shape} {place}, we have {own.shape}"
    if (other.dtype, other.topk) != (own.dtype, own.topk):
        return "format", f"peer {peer} sends {_format(other)} {place}, we send {_format(own)}"
    if other.checksum != own.checksum:
        return "inputs", f"peer {peer} has other inputs {place}: its data, augmentation or mixup differ from ours"
    return "format", f"peer {peer} sends {other.size} bytes {place}, we send {own.size}"


def _format(header: Header) -> str:
    return f"{f'the {header.topk} largest' if header.topk else 'all'} logits as {header.dtype}"


def _named(peers: Sequence[int]) -> str:
    return f"peer {peers[0]}" if len(peers) == 1 else f"peers {_listed(peers)}"


def _listed(peers: Sequence[int]) -> str:
    return ", ".join(map(str, peers))

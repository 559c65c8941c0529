"""A group in use: what one worker exchanges with its counterparts at every micro-batch, and when that is over.

`swap` never raises and waits no longer than `Patience` allows. Members at different micro-batches come in step again by
themselves: who is ahead waits, who is behind catches up. Members with different data go without predictions; when they
only ever differ, or anything else fails, the group is closed at once, so that the others notice, and `lost` says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from codistill.exchange.prediction.forming import WAIT_SECONDS, Patience
from codistill.exchange.prediction.group import Group, GroupLost, Header, MemberLeft, Mismatch
from codistill.exchange.prediction.wire import checksum, decode, encode
from codistill.exchange.protocol import Position
from codistill.meters import Incidents, logger

MISMATCHES = 8  # in a row, before the group is given up
PROVEN = 20  # exchanges after which a group has been worth its while


class InStep:
    """This worker in a group.

    Attributes:
        members: the peers' numbers.
        lost: whether the group is closed.
        apart: whether that was because its members only ever differed.
        unlike: those that differed from us then.
    """

    def __init__(
        self, group: Group, members: Sequence[int], dtype: str, topk: int, patience: Patience, incidents: Incidents
    ) -> None:
        """Take over `group`, which is connected.

        Args:
            group: of this worker and its counterparts.
            members: the peers' numbers.
            dtype: of the logits on the wire.
            topk: how many of them travel; 0: all.
            patience: how long to wait.
            incidents: told of every difference and fault.
        """
        self.members = tuple(members)
        self.lost = self.apart = False
        self.unlike: frozenset[int] = frozenset()
        self._group, self._dtype, self._topk = group, dtype, topk
        self._patience, self._incidents = patience, incidents
        self._last = self._rejoin = Position(0, 0)  # tried last; exchange nothing before
        self._rejoin_by = 0.0  # by our monotonic clock, when who waits for us there has given up
        self._good = self._bad = 0  # exchanges; mismatches in a row

    @property
    def met(self) -> bool:
        """Whether all members have come to a micro-batch."""
        return self._good + self._bad > 0

    @property
    def proven(self) -> bool:
        """Whether it was worth its while."""
        return self._good >= PROVEN and not self.apart

    @property
    def sent(self) -> int:
        """Bytes sent."""
        return self._group.sent

    @property
    def received(self) -> int:
        """Bytes received."""
        return self._group.received

    def swap(self, own: Tensor, inputs: Sequence[Tensor], position: Position) -> list[Tensor]:
        """The other members' logits, of own's shape, in the order of their numbers; none after any trouble."""
        began = time.monotonic()
        behind = position < self._rejoin and began < self._rejoin_by
        if self.lost or behind or position <= self._last:  # a host may do a micro-batch again
            return []
        self._last = position
        try:
            found = self._exchange(own, inputs, position, began + self._patience.limit())
        except Mismatch as error:
            self._differ(error)
            return []
        except MemberLeft as error:
            self.close()
            logger.info("codistill: %s; those that still train meet again", error)
            return []
        except GroupLost as error:
            self._patience.spend(time.monotonic() - began)
            self._lose("lost", f"{error}; training goes on, and those that are there meet again")
            return []
        except Exception as error:  # no memory, say; the others must not wait for what will not come
            self._lose("internal", f"predictions could not be exchanged: {type(error).__name__}: {error}")
            return []
        self._good, self._bad = self._good + 1, 0
        return found

    def leave(self, seconds: float) -> None:
        """Leave the group, and let the others know, for at most so long, that it was meant."""
        self.lost = True
        self._group.leave(seconds)

    def close(self) -> None:
        """Leave the group; the others notice at once. May be called again."""
        self.lost = True
        self._group.close()

    def _exchange(self, own: Tensor, inputs: Sequence[Tensor], position: Position, end: float) -> list[Tensor]:
        payload = encode(own, self._dtype, self._topk)
        header = Header(
            epoch=position.epoch,
            batch=position.batch,
            shape=tuple(own.shape),
            dtype=self._dtype,
            topk=self._topk,
            checksum=checksum(inputs),
            size=payload.numel(),
        )
        while True:
            try:
                found = self._group.exchange(header, payload, end - time.monotonic())
            except Mismatch as error:
                if error.cause != "batch" or error.front > (position.epoch, position.batch):
                    raise
                continue  # we are ahead: once more, when the others have come to where we are
            return [decode(found[peer], own, self._dtype, self._topk) for peer in sorted(found)]

    def _differ(self, error: Mismatch) -> None:
        """This micro-batch goes without a penalty; a group whose members only ever differ is no use."""
        self._rejoin = Position(*error.front)  # where those that are ahead wait for us
        self._rejoin_by = time.monotonic() + WAIT_SECONDS
        if error.cause != "batch" or self._good or self._bad:  # at the start one may come a little late
            self._incidents.report(error.cause, str(error), about=str(self.members))
        self._bad += 1
        if self._bad >= MISMATCHES:
            self.apart, self.unlike = True, error.unlike
            self._lose("apart", f"{error}; so it was {MISMATCHES} times in a row: these peers go on apart for a while")

    def _lose(self, cause: str, message: str) -> None:
        self.close()
        self._incidents.report(cause, message)

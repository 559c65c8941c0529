"""Whom a peer learns from, when not from all: a preference among the others, and how many of them.

Every peer reads a fixed number of others, however many there are, so that its cost does not grow with the run. Who is
absent is passed over: a ring closes over the peers that are there.
"""

from __future__ import annotations

import hashlib
import random

from codistill.config import TOPOLOGY


class Topology:
    """One peer's view of a topology.

    Attributes:
        reads: how many others this peer learns from at a time.
        reads_all: whether these are all there are.
        draws: whether the preference is another in every interval.
    """

    def __init__(self, name: str, *, peer: int, peers: int, seed: str) -> None:
        """Draws nothing from a generator that anybody else uses.

        Args:
            name: `all`, `ring` or `random-K`, as options are judged.
            peer: our number.
            peers: in the run.
            seed: of `random-K`; the same gives the same draws.
        """
        drawn = TOPOLOGY.fullmatch(name)
        assert drawn is not None, f"{name} is no topology"
        others = peers - 1
        self.reads = {"all": others, "ring": min(1, others)}.get(name) or min(int(drawn[1] or 1), others)
        self.reads_all = self.reads == others
        self.draws = drawn[1] is not None and not self.reads_all
        self._peer, self._peers, self._seed = peer, peers, seed

    @property
    def others(self) -> list[int]:
        """All other peers, from the one before us backwards around the ring."""
        return [(self._peer - step) % self._peers for step in range(1, self._peers)]

    @property
    def readers(self) -> list[int]:
        """The peers that may learn from us while nobody is passed over."""
        return self.others if self.draws or self.reads_all else [(self._peer + 1) % self._peers]

    def preference(self, interval: int) -> list[int]:
        """All other peers, in the order in which they are to be learnt from in the `interval`-th interval."""
        preferred = self.others
        if self.draws:
            digest = hashlib.sha256(f"{self._seed} {self._peer} {interval}".encode()).digest()
            random.Random(digest).shuffle(preferred)
        return preferred

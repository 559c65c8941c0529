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
        self._random = drawn[1] is not None
        self._peer, self._peers, self._seed = peer, peers, seed

    def preference(self, interval: int) -> list[int]:
        """All other peers, in the order in which they are to be learnt from in the `interval`-th interval."""
        before = [(self._peer - step) % self._peers for step in range(1, self._peers)]
        if self._random:
            digest = hashlib.sha256(f"{self._seed} {self._peer} {interval}".encode()).digest()
            random.Random(digest).shuffle(before)
        return before

"""Who of the other peers is there, as far as their `latest.json` tells by our own monotonic clock.

Nobody's word on time is taken: a heartbeat that we have seen unchanged for so long has stopped. What could not be read
at all is held against nobody. A peer that was never looked at counts as there until it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Optional

from codistill.exchange.manifest import Latest, Reference


class Standing(IntEnum):
    """Of how much use a peer is to those who learn from it; lower is better."""

    HERE = 0  # training, or not known to be absent
    ENDED = 1  # what it left is final: of use, but it learns nothing more
    ABSENT = 2  # never spoken, silent, gone without a final snapshot, or its newest snapshot was refused


@dataclass(frozen=True)
class _Word:
    """What a peer said last; without a beat it has not spoken."""

    beat: Optional[tuple[int, int]] = None  # incarnation and heartbeat
    since: float = 0.0  # when we first saw that beat
    silent: bool = False
    closed: bool = False
    final: bool = False
    floor: int = 0
    newest: Optional[Reference] = None
    refused: Optional[Reference] = None


class Presence:
    """Written by the fetching thread, read by any."""

    def __init__(self, silence: float) -> None:
        """Everybody counts as there.

        Args:
            silence: seconds without a heartbeat after which a peer is absent.
        """
        self._silence = silence
        self._words: dict[int, _Word] = {}

    def heard(self, peer: int, latest: Optional[Latest]) -> None:
        """A look at `peer` found `latest`; None: nothing, or nothing that makes sense."""
        before, now = self._words.get(peer, _Word()), time.monotonic()
        if latest is None or before.beat == (latest.incarnation, latest.heartbeat):
            silent = before.beat is not None and now - before.since > self._silence
            self._words[peer] = replace(before, silent=silent)
            return
        newest = latest.manifest
        self._words[peer] = _Word(
            beat=(latest.incarnation, latest.heartbeat),
            since=now,
            closed=latest.closed,
            final=newest is not None and newest.final,
            floor=latest.resume_floor,
            newest=None if newest is None else newest.reference,
            refused=before.refused,
        )

    def unreadable(self, peer: int) -> None:
        """The store did not answer: silence counts from now."""
        if peer in self._words:
            self._words[peer] = replace(self._words[peer], since=time.monotonic())

    def refused(self, peer: int, reference: Reference) -> None:
        """That snapshot of `peer` is of no use."""
        self._words[peer] = replace(self._words.get(peer, _Word()), refused=reference)

    def standing(self, peer: int) -> Standing:
        """Of how much use `peer` is right now."""
        word = self._words.get(peer)
        if word is None:
            return Standing.HERE
        if word.beat is None or (word.newest is not None and word.newest == word.refused):
            return Standing.ABSENT
        if word.closed or word.silent:
            return Standing.ENDED if word.final else Standing.ABSENT
        return Standing.HERE

    def lowest_floor(self, peers: Iterable[int]) -> int:
        """The lowest update that any of `peers` could restart from; 0 while one has not been heard of."""
        return min((self._words.get(peer, _Word()).floor for peer in peers), default=0)

"""The workers of a peer agree on which snapshots to take up, all of them at the same update or none.

Worker 0 names, for every other peer, the snapshot it has (or keeps naming the last one until all have it). Each worker
says whether that snapshot lies verified on its machine; the minimum over the workers decides. Nothing but a few
integers travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Optional

from codistill.exchange.manifest import Manifest, Reference
from codistill.workers import Workers


class Readiness(IntEnum):
    """What one worker can say of a proposal; the lowest of all workers' answers counts."""

    REFUSED = 0
    PENDING = 1
    READY = 2


@dataclass(frozen=True)
class Proposal:
    """A snapshot that worker 0 wants all workers to take up."""

    peer: int
    reference: Reference
    sha256: str
    final: bool

    @classmethod
    def of(cls, manifest: Manifest) -> Proposal:
        """The proposal to take up what `manifest` describes."""
        return cls(manifest.peer, manifest.reference, manifest.sha256, manifest.final)


_FIELDS = 8  # incarnation (0: nothing proposed), update, sequence, final, and the sha256 in four


def encode(proposal: Optional[Proposal]) -> list[int]:
    """A proposal as `_FIELDS` signed 64-bit integers."""
    if proposal is None:
        return [0] * _FIELDS
    digest = bytes.fromhex(proposal.sha256)
    words = [int.from_bytes(digest[i : i + 8], "big", signed=True) for i in range(0, 32, 8)]
    reference = proposal.reference
    return [reference.incarnation, reference.update, reference.sequence, int(proposal.final), *words]


def decode(peer: int, fields: Sequence[int]) -> Optional[Proposal]:
    """The proposal for `peer` that `encode` made `fields` of."""
    incarnation, update, sequence, final, *words = fields
    if incarnation == 0:
        return None
    digest = b"".join(word.to_bytes(8, "big", signed=True) for word in words)
    return Proposal(peer, Reference(incarnation, update, sequence), digest.hex(), bool(final))


def meet(
    workers: Workers,
    peers: Sequence[int],
    proposals: dict[int, Proposal],
    readiness: Callable[[Proposal], Readiness],
) -> dict[int, tuple[Proposal, Readiness]]:
    """Two small collectives: what worker 0 proposes, and whether all can.

    Args:
        workers: this peer's workers; all of them call this at the same update.
        peers: the other peers' numbers, in the same order on every worker.
        proposals: worker 0's, by peer; ignored on the others.
        readiness: judges a proposal on this machine.

    Returns:
        By peer, what was proposed and the workers' common answer.
    """
    shared = workers.share([field for peer in peers for field in encode(proposals.get(peer))])
    proposed = {peer: decode(peer, shared[i * _FIELDS : (i + 1) * _FIELDS]) for i, peer in enumerate(peers)}
    answers = workers.minimum([Readiness.READY if p is None else readiness(p) for p in proposed.values()])
    return {
        peer: (proposal, Readiness(answer))
        for (peer, proposal), answer in zip(proposed.items(), answers, strict=True)
        if proposal is not None
    }

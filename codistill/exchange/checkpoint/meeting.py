"""The workers of a peer agree on which snapshots to take up, all of them at the same update or none.

Worker 0 names its neighbours and, for each, the snapshot it has (or keeps naming the last one until all have it). Each
worker says whether that snapshot lies verified on its machine; the minimum over the workers decides. Nothing but a few
integers travels, as many as there are neighbours at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


_FIELDS = 9  # peer, incarnation (0: nothing proposed), update, sequence, final, and the sha256 in four
_NOBODY = -1


def encode(peer: int, proposal: Optional[Proposal]) -> list[int]:
    """A neighbour and what is proposed of it as `_FIELDS` signed 64-bit integers."""
    if proposal is None:
        return [peer] + [0] * (_FIELDS - 1)
    digest = bytes.fromhex(proposal.sha256)
    words = [int.from_bytes(digest[i : i + 8], "big", signed=True) for i in range(0, 32, 8)]
    reference = proposal.reference
    return [peer, reference.incarnation, reference.update, reference.sequence, int(proposal.final), *words]


def decode(fields: Sequence[int]) -> tuple[int, Optional[Proposal]]:
    """What `encode` made `fields` of."""
    peer, incarnation, update, sequence, final, *words = fields
    if incarnation == 0:
        return peer, None
    digest = b"".join(word.to_bytes(8, "big", signed=True) for word in words)
    return peer, Proposal(peer, Reference(incarnation, update, sequence), digest.hex(), bool(final))


def meet(
    workers: Workers,
    places: int,
    proposals: Mapping[int, Optional[Proposal]],
    readiness: Callable[[Proposal], Readiness],
) -> dict[int, tuple[Optional[Proposal], Readiness]]:
    """Two small collectives: whom worker 0 learns from and what it proposes of them, and whether all can.

    Args:
        workers: this peer's workers; all of them call this at the same update.
        places: most neighbours there can be, the same number on every worker.
        proposals: worker 0's, by neighbour, or None where it proposes nothing; ignored on the others.
        readiness: judges a proposal on this machine.

    Returns:
        By neighbour, what was proposed and the workers' common answer (to nothing: ready).
    """
    named = [encode(peer, proposal) for peer, proposal in proposals.items()]
    named += [encode(_NOBODY, None)] * (places - len(named))
    shared = workers.share([field for fields in named[:places] for field in fields])
    proposed = dict(decode(shared[at : at + _FIELDS]) for at in range(0, len(shared), _FIELDS))
    proposed.pop(_NOBODY, None)
    judged = [Readiness.READY if p is None else readiness(p) for p in proposed.values()]
    answers = workers.minimum(judged)
    return {
        peer: (proposal, Readiness(answer)) for (peer, proposal), answer in zip(proposed.items(), answers, strict=True)
    }

"""Ways to codistil: whom a peer learns from, and through what. The demo's own is `CHECKPOINT`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One way to codistil.

    Args:
        name: in folders and tables.
        flags: what every peer is told in addition.
        peers: in the run, of one worker each.
        unlike: every second peer is a deeper model.
    """

    name: str
    flags: tuple[str, ...] = ()
    peers: int = 2
    unlike: bool = False


CHECKPOINT = Variant("codistill")
_PREDICTION = ("--codistill-exchange", "prediction")
VARIANTS = (
    CHECKPOINT,
    Variant("prediction", _PREDICTION),
    Variant("prediction-top-8", (*_PREDICTION, "--codistill-topk", "8")),
    Variant("ring-of-4", ("--codistill-topology", "ring"), peers=4),
    Variant("unlike", unlike=True),
)

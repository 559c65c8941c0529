"""What the façade asks of an exchange, whichever way peers are known to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Protocol

from torch import Tensor, nn

from codistill.exchange.membership import Identity
from codistill.workers import WorkersLost

# Called in the background with each copy of what is published, and the update it is of; gives numbers for the manifest.
OnCopy = Callable[[int, Mapping[str, Tensor]], Mapping[str, float]]


@dataclass(frozen=True, order=True)
class Position:
    """Where in the data a micro-batch lies; the same for all peers that go through it in step.

    Attributes:
        epoch: the host's epoch, from 1.
        batch: micro-batches of that epoch before this one.
    """

    epoch: int
    batch: int


class Used(Protocol):
    """A peer whose predictions are at hand."""

    def staleness(self, update: int) -> int:
        """Own updates since anything new of it was taken up."""

    def gap(self, update: int) -> int:
        """Own update minus the peer's."""


class Exchange(Protocol):
    """One worker's side of an exchange; every worker of a peer calls the same methods at the same updates."""

    def start(
        self,
        identity: Identity,
        terms: Mapping[str, Any],
        update: int,
        on_copy: OnCopy,
    ) -> None:
        """Join the run."""

    def begin_update(self, update: int, *, willing: bool) -> None:
        """`update` updates are done; `willing`: the penalty has a weight from now on."""

    def begin_batch(self, position: Position) -> Optional[Position]:
        """The next micro-batch is at `position`; gives where to go on after it, when data must be skipped for that."""

    @property
    def publishes(self) -> bool:
        """Whether `boundary` copies our weights, on worker 0, unless it has to skip that."""

    def boundary(self, update: int, epoch: int, metrics: Mapping[str, float]) -> bool:
        """An interval has ended; gives whether our weights were copied, so that `on_copy` is called for them."""

    def predict_early(self, forward: Callable[[nn.Module], Tensor], update: int) -> None:
        """Do what can be done of `predictions` for the batch at hand before our own logits are known."""

    def predictions(
        self, own: Tensor, forward: Callable[[nn.Module], Tensor], inputs: Sequence[Tensor], update: int
    ) -> list[Tensor]:
        """The peers' logits for the batch at hand, each of own's shape; by checkpoint, they may be overwritten."""

    def in_use(self, update: int) -> Mapping[int, Used]:
        """The peers that `predictions` would ask, by number."""

    @property
    def counters(self) -> dict[str, int]:
        """Bytes `sent` and `received`, publications `skipped`: since the start, by this worker."""

    def set_floor(self, update: int) -> None:
        """A checkpoint of `update` is on disk."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, in plain types."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; before `start`."""

    def finish(self, update: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Training has ended normally."""

    def leave(self, update: int, epoch: int, metrics: Mapping[str, float], seconds: float) -> None:
        """The process is about to be ended from outside, after `seconds` at the earliest."""

    def close(self, seconds: Optional[float] = None) -> None:
        """Stop what runs in the background, within `seconds` (the run's timeout without it)."""

    def end_without_workers(self, error: WorkersLost) -> None:
        """Exchange no more: the workers of this peer cannot meet."""

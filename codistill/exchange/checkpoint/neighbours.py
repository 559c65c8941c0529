"""Worker 0's choice of whom to learn from: a few of the other peers, as the topology prefers, passing over the absent.

Without sync the neighbours of an interval are chosen in the middle of the one before: their snapshots are here when it
begins, and by then those who keep our pace have stored what they published last, so that one transfer will do. A draw
stands until what it drew is in use: what takes longer to come is not given up for others that would take as long. With
sync the choice is the topology's alone, so that it can be repeated.
"""

from __future__ import annotations

from collections.abc import Container

from codistill.config import CodistillConfig
from codistill.exchange.checkpoint.presence import Presence, Standing
from codistill.topology import Topology


class Neighbours:
    """Whom we learn from.

    Attributes:
        chosen: their numbers, in order; at most `Topology.reads`.
    """

    def __init__(self, config: CodistillConfig, topology: Topology, presence: Presence) -> None:
        """Nobody is chosen yet."""
        self._config, self._topology, self._presence = config, topology, presence
        self._draw, self._drawn = 0, 0  # the interval whose draw stands, and own update at which it was drawn
        self.chosen: list[int] = []

    def of_boundary(self, update: int) -> list[int]:
        """With sync: whose snapshots of `update` to take up."""
        self.chosen = sorted(self._topology.preference(update // self._config.interval)[: self._topology.reads])
        return self.chosen

    def of_next_boundary(self, update: int, used: Container[int]) -> list[int]:
        """Without sync: whose newest snapshots to take up at the boundary after `update`.

        Peers that ended come after those that train: what they left stays as it is and has been learnt from, while the
        place is worth more with one that still learns. The absent come last: they are looked at, should they come.

        Args:
            update: updates done so far.
            used: the peers that the modules hold.
        """
        if self._settled(update, used):
            self._draw, self._drawn = update // self._config.interval + 1, update
        preference = self._topology.preference(self._draw)
        self.chosen = sorted(sorted(preference, key=self._presence.standing)[: self._topology.reads])
        return self.chosen

    def boundary_passed(self, update: int, used: Container[int]) -> None:
        """Without sync: a draw that is in use is done with; until the next one nobody is looked at."""
        if self._topology.draws and self._settled(update, used):
            self.chosen = []

    def _settled(self, update: int, used: Container[int]) -> bool:
        """Whether there is nothing to wait for of what was chosen, or has been for too long."""
        if update - self._drawn >= self._config.staleness_bound:
            return True
        return all(peer in used or self._presence.standing(peer) is Standing.ABSENT for peer in self.chosen)

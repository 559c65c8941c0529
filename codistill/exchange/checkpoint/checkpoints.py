"""Exchange by checkpoint: peers are modules of our own, holding the weights of their last accepted snapshot.

Nothing here makes an update wait beyond one copy of the weights out, one copy in, and one meeting of this peer's
workers; with `sync` the wait is asked for, and bounded. Whatever fails, the last good weights stay in use until they
are too stale, and training goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from torch import Tensor, nn

from codistill.config import CodistillConfig, ConfigError, flag
from codistill.exchange.checkpoint.architectures import Architectures
from codistill.exchange.checkpoint.fetcher import NEWEST, Fetcher, Wish
from codistill.exchange.checkpoint.joining import Joining
from codistill.exchange.checkpoint.neighbours import Neighbours
from codistill.exchange.checkpoint.peer_modules import InUse, PeerModules, held_before
from codistill.exchange.checkpoint.private_folder import PrivateFolder
from codistill.exchange.checkpoint.uptake import Uptake
from codistill.exchange.membership import Identity
from codistill.exchange.protocol import OnCopy, Position
from codistill.exchange.publisher import Publisher
from codistill.meters import Incidents
from codistill.topology import Topology
from codistill.workers import Workers, WorkersLost

STORE_SECONDS = 60.0  # longest wait for the store before the first update


class CheckpointExchange:
    """This peer's side of the exchange; one object per worker, all of them called at the same updates."""

    def __init__(
        self,
        config: CodistillConfig,
        workers: Workers,
        save_dir: Path,
        state: Callable[[], Mapping[str, Tensor]],
        architectures: Architectures,
        incidents: Incidents,
    ) -> None:
        """Nothing is read or written before `start`.

        Args:
            config: validated options; its `dir` is set.
            workers: of this peer.
            save_dir: of this peer; holds the token that owns the peer number.
            state: gives our own weights; live tensors.
            architectures: what peers' models may be.
            incidents: told of every refusal and fault.
        """
        self._config, self._workers, self._save_dir = config, workers, save_dir
        self._state, self._incidents = state, incidents
        self._topology = Topology(config.topology, peer=config.peer, peers=config.peers, seed=config.run_id)
        self._folder: Optional[PrivateFolder] = None
        self._architectures = architectures
        self._publisher: Optional[Publisher] = None
        self._fetcher: Optional[Fetcher] = None
        self._neighbours: Optional[Neighbours] = None  # worker 0's choice
        places = self._topology.reads
        self._modules = PeerModules(architectures, places, config.staleness_bound, incidents)
        self._uptake = Uptake(config, workers, places, self._modules, architectures, incidents)
        self._before: dict[int, InUse] = {}  # what a checkpoint says was in use
        self._ahead = config.sync  # nothing is left to do before the next boundary
        self._early: Optional[dict[int, Tensor]] = None  # predictions for the batch at hand
        self._over = False

    def start(
        self,
        identity: Identity,
        terms: Mapping[str, Any],
        update: int,
        on_copy: OnCopy,
    ) -> None:
        """Join the run and, after a resume, take up again what was in use.

        Args:
            identity: output space and initial weights of this peer.
            terms: what all peers of the run must agree on.
            update: updates done so far.
            on_copy: called in the background with every snapshot of ours.

        Raises:
            ConfigError: the dir cannot be opened, the run has other terms, the number is taken, the signing key in the
                environment is unusable, or a synchronous run cannot be resumed from here.
        """
        joining = Joining(self._config, self._workers, self._save_dir, self._incidents)
        self._folder = joining.folder

        def enter() -> None:
            if self._workers.first:
                floor = self._needed_from(update, self._still_of_use(update))
                self._publisher = joining.publisher(
                    identity, terms, floor, self._lowest_floor, on_copy, anew=update == 0
                )
            if self._workers.fetches:
                self._fetcher = joining.fetcher(identity, self._architectures, self._topology)

        self._workers.together(enter)
        self._uptake.reads_from(self._folder.path, self._fetcher)
        if self._guide is not None:
            self._neighbours = Neighbours(self._config, self._topology, self._guide.presence)
        self._take_up_again(update)

    def begin_update(self, update: int, *, willing: bool) -> None:
        """In the middle between two boundaries: get ready for the next."""
        self._early = None  # of a batch that failed before its penalty
        if not self._ahead and update % self._config.interval >= self._config.interval // 2:
            self._look_ahead(update)

    def begin_batch(self, position: Position) -> Optional[Position]:
        """Nothing to skip: peers go through the data each in its own way."""

    @property
    def publishes(self) -> bool:
        """Whether there is still somebody who publishes: worker 0, unless the exchange is over or we were replaced."""
        return self._publisher is not None and not self._publisher.stopped and not self._over

    def boundary(self, update: int, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Publish our weights and take up the peers'; called every `interval` updates.

        Args:
            update: updates done so far.
            epoch: the host's epoch.
            metrics: numbers for the manifest.

        Returns:
            Whether our weights were copied, so that `on_copy` is called for them.
        """
        if self._over:
            return False
        if self._config.sync:
            copied = self._publish(update, epoch, metrics)
            self._await_update(update)
            self._take_up(update, patient=True)
        else:
            self._take_up(update, patient=False)
            copied = self._publish(update, epoch, metrics)  # last: hashing begins now, and would slow the other down
        self._ahead = self._config.sync
        if self._neighbours is not None and not self._config.sync:
            self._neighbours.boundary_passed(update, self._modules.peers)
            self._attend(self._neighbours.chosen, (), NEWEST)
        return copied

    def predict_early(self, forward: Callable[[nn.Module], Tensor], update: int) -> None:
        """Let the peers predict now; the next `predictions` of this update gives that."""
        self._early = None  # first, for its memory
        self._early = self._modules.predictions(forward, update)

    def predictions(
        self, own: Tensor, forward: Callable[[nn.Module], Tensor], inputs: Sequence[Tensor], update: int
    ) -> list[Tensor]:
        """What `forward` gives, without autograd, for every peer in use, in the order of their numbers."""
        found, self._early = self._early, None
        return self._modules.fitting(self._modules.predictions(forward, update) if found is None else found, own.shape)

    def in_use(self, update: int) -> dict[int, InUse]:
        """The peers whose snapshots are not too stale at `update`."""
        return self._modules.in_use(update)

    def set_floor(self, update: int) -> None:
        """A checkpoint of `update` is on disk: that is where a restart would begin."""
        if self._publisher is not None:
            self._publisher.set_floor(self._needed_from(update, self._modules.in_use(update)))

    def _needed_from(self, update: int, used: Mapping[int, InUse]) -> int:
        """The oldest snapshots that a restart at `update` takes up again.

        Those of the boundary before, since the next one comes after `update`; and of a peer that was late then, the one
        that is still `used`. A final one stays where it is.
        """
        boundary = max(0, update - 1) // self._config.interval * self._config.interval
        return min([boundary, *(one.proposal.reference.update for one in used.values() if not one.proposal.final)])

    @property
    def counters(self) -> dict[str, int]:
        """Bytes sent and received, publications skipped: since the start, by this worker."""
        return {
            "sent": self._publisher.sent if self._publisher else 0,
            "received": self._fetcher.received if self._fetcher else 0,
            "skipped": self._publisher.skipped if self._publisher else 0,
        }

    def state_dict(self) -> dict[str, Any]:
        """What is in use, in plain types."""
        return self._modules.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what was in use; `start` fetches it again."""
        self._before = held_before(state)

    def finish(self, update: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Training ended normally: publish the final snapshot, waiting at most `timeout` seconds."""
        left = self._config.timeout
        if self._publisher is not None and not self._over:
            left -= self._publish_now(update, epoch, metrics, left, final=True)
        self._close(left, ended=True)

    def leave(self, update: int, epoch: int, metrics: Mapping[str, float], seconds: float) -> None:
        """The process is about to be ended from outside: publish what there is, waiting at most `seconds`."""
        if self._publisher is not None and not self._over:
            seconds -= self._publish_now(update, epoch, metrics, seconds, final=False)
            self._publisher.flush(seconds)

    def close(self, seconds: Optional[float] = None) -> None:
        """Stop the threads, giving an attempt to store `seconds` (`timeout` if None), and remove our files."""
        self._close(self._config.timeout if seconds is None else seconds, ended=False)

    def end_without_workers(self, error: WorkersLost) -> None:
        """Exchange no more: the last good snapshots stay in use until they are too stale."""
        self._workers.close()  # first, for those who still wait for us
        self._incidents.report("workers", f"{error}; the exchange is over, training goes on")
        self.close(1.0)

    def _publish(self, update: int, epoch: int, metrics: Mapping[str, float]) -> bool:
        if self._publisher is None or self._over:
            return False
        return self._publisher.publish(self._state(), update=update, epoch=epoch, metrics=metrics)

    def _publish_now(
        self, update: int, epoch: int, metrics: Mapping[str, float], seconds: float, *, final: bool
    ) -> float:
        """Have our weights published, after what is being stored right now; the seconds that took, without storing."""
        assert self._publisher is not None
        began = time.monotonic()
        self._publisher.publish(
            self._state(), update=update, epoch=epoch, metrics=metrics, final=final, patience=seconds
        )
        return time.monotonic() - began

    def _close(self, seconds: float, *, ended: bool) -> None:
        if self._over:
            return
        self._over = True
        if self._publisher is not None:
            self._publisher.close(max(0.0, seconds), ended=ended)
        if self._fetcher is not None:
            self._fetcher.close(seconds=1.0)
        if self._folder is not None:
            self._folder.remove()

    def _take_up_again(self, update: int) -> None:
        """After a resume: fetch exactly what was in use; without sync the newest in place of what is gone."""
        before = self._before
        if before:
            self._fetch_now({peer: Wish.of(used.proposal) for peer, used in before.items()}, update)
            self._modules.date_back(before)
        lacking = self._lacking()
        if lacking and not self._config.sync:
            self._fetch_now(dict.fromkeys(lacking, NEWEST), update)
            lacking = self._lacking()
        of_use = self._still_of_use(update)
        for peer in (one for one in lacking if one in of_use):
            [gone] = self._workers.share([self._guide is not None and self._guide.hopeless(peer)])
            self._miss(peer, before[peer].proposal.reference.update, update, gone=bool(gone))
        if self._config.sync:
            self._require_next(update)
            return
        if self._neighbours is not None:
            self._neighbours.chosen = []  # what was wished for exactly is wished for no more
        self._look_ahead(update)

    def _fetch_now(self, wishes: Mapping[int, Wish], update: int) -> None:
        """Take up what is wished for, waiting for it, but not for ever."""
        if self._over:
            return
        if self._guide is not None and self._neighbours is not None:
            self._neighbours.chosen = sorted(self._before)
            for peer, wish in wishes.items():
                self._guide.remember(peer, self._before[peer].proposal.reference)
                self._guide.wish(peer, wish)
            self._guide.wait(min(STORE_SECONDS, self._config.timeout))
        self._take_up(update, patient=True)

    def _still_of_use(self, update: int) -> dict[int, InUse]:
        """What a checkpoint says was in use, but for what was too stale to be learnt from."""
        bound = self._config.staleness_bound
        return {peer: used for peer, used in self._before.items() if used.staleness(update) <= bound}

    def _lacking(self) -> list[int]:
        """The peers that a checkpoint says were in use and that are not, on some worker: all must meet as often."""
        before = sorted(self._before)
        held = self._workers.minimum([self._modules.held(peer) is not None for peer in before])
        return [peer for peer, by_all in zip(before, held, strict=True) if not by_all]

    def _require_next(self, update: int) -> None:
        """Sync mode: a peer that is past our next boundary must still have the snapshot it published there."""
        boundary = -(-max(update, 1) // self._config.interval) * self._config.interval
        lacking = self._first_lacking(boundary)
        [peer] = self._workers.share([-1 if lacking is None else lacking])
        if peer >= 0:
            self._miss(peer, boundary, update, gone=True)

    def _first_lacking(self, boundary: int) -> Optional[int]:
        """Worker 0: a neighbour that has deleted its snapshot of `boundary`, as far as a store tells that answers."""
        if self._guide is None or self._neighbours is None:
            return None
        end = time.monotonic() + min(STORE_SECONDS, self._config.timeout)
        for peer in self._neighbours.of_boundary(boundary):
            if time.monotonic() < end and self._guide.lacks(peer, boundary):
                return peer
        return None

    def _miss(self, peer: int, theirs: int, update: int, *, gone: bool) -> None:
        message = f"the snapshot of peer {peer} at update {theirs} {'is gone' if gone else 'was not to be had in time'}"
        if self._config.sync:
            advice = "resume from the newest checkpoint, or start again with a new " + flag("run-id")
            raise ConfigError(
                f"{flag('sync')}: cannot resume from update {update}: {message}; "
                + (advice if gone else "start again when the store answers")
            )
        if self._workers.first:
            self._incidents.report("gone", message, about=str(peer))

    @property
    def _guide(self) -> Optional[Fetcher]:
        """Worker 0's fetcher, whose finds are proposed to all workers; None on the others."""
        return self._fetcher if self._workers.first else None

    def _await_update(self, update: int) -> None:
        """Sync mode, worker 0: store our snapshot and wait for the others' of the same update, both bounded."""
        if self._publisher is not None and not self._publisher.flush(self._config.timeout):
            self._incidents.report("late", f"our own snapshot of update {update} was not stored in time")
        if self._guide is not None and self._neighbours is not None:
            neighbours = self._neighbours.of_boundary(update)
            self._attend(neighbours, neighbours, Wish(update=update))
            self._guide.wait(self._config.timeout)
            for peer in neighbours:
                if self._guide.found(peer) is None:
                    message = f"no snapshot of peer {peer} at update {update}; going on without"
                    self._incidents.report("late", message, about=str(peer))

    def _look_ahead(self, update: int) -> None:
        """Worker 0: look for what is to be taken up at the next boundary."""
        self._ahead = True
        if self._neighbours is None:
            return
        before = self._neighbours.chosen
        chosen = self._neighbours.of_next_boundary(update, self._modules.peers)
        self._attend(chosen, [peer for peer in chosen if peer not in before], NEWEST)

    def _attend(self, neighbours: Sequence[int], wanted: Sequence[int], wish: Wish) -> None:
        """Worker 0: follow the neighbours only, wishing anew for those of whom something else is `wanted`."""
        if self._guide is not None:
            self._guide.attend(neighbours, keep=self._modules.peers)
            for peer in wanted:
                self._guide.wish(peer, wish)

    def _take_up(self, update: int, *, patient: bool) -> None:
        neighbours = self._neighbours.chosen if self._neighbours is not None else ()
        try:
            self._uptake.take_up(neighbours, update, patient=patient)
        except WorkersLost as error:
            self.end_without_workers(error)

    def _lowest_floor(self) -> int:
        return self._fetcher.lowest_floor() if self._fetcher is not None else 0

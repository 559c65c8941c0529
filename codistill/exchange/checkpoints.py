"""Exchange by checkpoint: peers are modules of our own, holding the weights of their last accepted snapshot.

Nothing here makes an update wait beyond one copy of the weights out, one copy in, and one meeting of this peer's
workers; with `sync` the wait is asked for, and bounded. Whatever fails, the last good weights stay in use until they
are too stale, and training goes on.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from torch import Tensor, nn

from codistill.config import CodistillConfig, ConfigError, flag
from codistill.exchange.architectures import Architecture, Architectures
from codistill.exchange.errors import ExchangeError, Refused, StorageError
from codistill.exchange.fetcher import HURRIED_SECONDS, NEWEST, Fetcher, Wish, read_architecture, snapshot_file
from codistill.exchange.meeting import Proposal, Readiness, meet
from codistill.exchange.membership import Identity, Membership, owner_token
from codistill.exchange.objects import Objects, without_credentials
from codistill.exchange.peer_modules import InUse, PeerModules, held_before
from codistill.exchange.protocol import Position
from codistill.exchange.publisher import Publisher
from codistill.exchange.signing import KEY, signing_key
from codistill.exchange.store import RunStore
from codistill.meters import Incidents
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
        self._others = [peer for peer in range(config.peers) if peer != config.peer]
        self._key: Optional[bytes] = None
        self._token = ""
        self._store: Optional[RunStore] = None
        self._folder = Path(tempfile.gettempdir())
        self._architectures = architectures
        self._publisher: Optional[Publisher] = None
        self._fetcher: Optional[Fetcher] = None
        self._modules = PeerModules(architectures, config.staleness_bound, incidents)
        self._before: dict[int, InUse] = {}  # what a checkpoint says was in use
        self._pending: dict[int, Proposal] = {}
        self._opened: dict[int, tuple[Optional[Architecture], dict[str, Tensor]]] = {}
        self._over = False

    def start(
        self,
        identity: Identity,
        terms: Mapping[str, Any],
        update: int,
        on_buffer: Callable[[Mapping[str, Tensor]], None],
    ) -> None:
        """Join the run and, after a resume, take up again what was in use.

        Args:
            identity: output space and initial weights of this peer.
            terms: what all peers of the run must agree on.
            update: updates done so far.
            on_buffer: called in the background with every snapshot of ours.

        Raises:
            ConfigError: the dir cannot be opened, the run has other terms, the number is taken, the signing key in the
                environment is unusable, or a synchronous run cannot be resumed from here.
        """
        self._together(self._prepare)
        [number] = self._workers.share([int(self._token[:15] or "0", 16)])
        self._folder = Path(tempfile.gettempdir()) / f"codistill-{number:015x}"
        agreed = {**terms, KEY: "set"} if self._key is not None else terms

        def enter() -> None:
            if self._workers.first:
                self._join(identity, agreed, update, on_buffer)
            if self._workers.fetches:
                self._start_fetcher(identity)

        self._together(enter)
        self._take_up_again(update)

    def begin_update(self, update: int, *, willing: bool) -> None:
        """Nothing to do between two boundaries."""

    def begin_batch(self, position: Position) -> Optional[Position]:
        """Nothing to skip: peers go through the data each in its own way."""

    def boundary(self, update: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Publish our weights and take up the peers'; called every `interval` updates.

        Args:
            update: updates done so far.
            epoch: the host's epoch.
            metrics: numbers for the manifest.
        """
        if self._over:
            return
        if self._publisher is not None:
            self._publisher.publish(self._state(), update=update, epoch=epoch, metrics=metrics)
        if self._config.sync:
            self._await_update(update)
        self._take_up(update, patient=self._config.sync)

    def predictions(
        self, own: Tensor, forward: Callable[[nn.Module], Tensor], inputs: Sequence[Tensor], update: int
    ) -> list[Tensor]:
        """What `forward` gives, without autograd, for every peer in use, in the order of their numbers."""
        return list(self._modules.predictions(own.shape, forward, update))

    def in_use(self, update: int) -> dict[int, InUse]:
        """The peers whose snapshots are not too stale at `update`."""
        return self._modules.in_use(update)

    def set_floor(self, update: int) -> None:
        """A checkpoint of `update` is on disk: that is where a restart would begin."""
        if self._publisher is not None:
            self._publisher.set_floor(self._needed_from(update))

    def _needed_from(self, update: int) -> int:
        """The boundary whose snapshots are in use when update `update` ends: the next boundary comes after it."""
        return max(0, update - 1) // self._config.interval * self._config.interval

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
            shutil.rmtree(self._folder, ignore_errors=True)

    def _together(self, action: Callable[[], None]) -> None:
        """Do it on every worker; when one of them fails, all do."""
        refusal: Optional[Exception] = None
        try:
            action()
        except Exception as error:
            refusal = error
        [fine] = self._workers.minimum([refusal is None])
        if not fine:
            raise refusal or ConfigError("another worker of this peer could not join the run; its message says why")

    def _prepare(self) -> None:
        """What can go wrong on this worker alone."""
        self._key = signing_key()
        if self._workers.first:
            self._token = owner_token(self._save_dir, self._config.peer)
        if self._workers.fetches:
            self._store = RunStore(self._open(), self._config.run_id, self._key)

    def _open(self) -> Objects:
        try:
            return Objects(str(self._config.dir))
        except StorageError as error:
            place = without_credentials(str(self._config.dir))
            raise ConfigError(f"{flag('dir')} {place}: cannot be opened: {error}") from None

    def _join(
        self,
        identity: Identity,
        terms: Mapping[str, Any],
        update: int,
        on_buffer: Callable[[Mapping[str, Tensor]], None],
    ) -> None:
        membership = Membership(self._reached_store, self._config.peer, self._token, terms, self._save_dir)
        try:
            membership.join()
        except ExchangeError as error:  # the publisher tries again with every heartbeat
            self._incidents.report(error.cause, str(error))
        self._publisher = Publisher(
            self._reached_store,
            membership,
            self._config,
            identity,
            self._incidents,
            lambda: self._fetcher.lowest_floor() if self._fetcher else 0,
            on_buffer,
        )
        self._publisher.start(floor=self._needed_from(update))

    def _start_fetcher(self, identity: Identity) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)  # left by a killed predecessor with our token
        try:
            self._folder.mkdir(mode=0o700)
        except OSError as error:
            raise ConfigError(f"{self._folder}: {error.strerror}; name a writable folder with TMPDIR") from None
        self._fetcher = Fetcher(
            self._reached_store,
            self._folder,
            self._others,
            self._architectures.template,
            self._config.dtype,
            identity,
            self._incidents,
        )
        self._fetcher.start()

    def _take_up_again(self, update: int) -> None:
        """After a resume: fetch exactly what was in use; without sync the newest in place of what is gone."""
        before = self._before
        if before:
            self._fetch_now({peer: Wish(reference=used.proposal.reference) for peer, used in before.items()}, update)
            self._modules.date_back(before)
            if not self._config.sync and self._any_lacking():
                self._fetch_now(dict.fromkeys(self._lacking(), NEWEST), update)
        for peer in self._lacking():
            self._miss(peer, before[peer].proposal.reference.update, update)
        if self._config.sync:
            self._require_next(update)
        if self._guide is not None and not self._config.sync:
            for peer in self._others:
                self._guide.wish(peer, NEWEST)

    def _fetch_now(self, wishes: Mapping[int, Wish], update: int) -> None:
        """Take up what is wished for, waiting for it, but not for ever."""
        if self._over:
            return
        if self._guide is not None:
            for peer, wish in wishes.items():
                self._guide.remember(peer, self._before[peer].proposal.reference)
                self._guide.wish(peer, wish)
            self._guide.wait(min(STORE_SECONDS, self._config.timeout))
        self._take_up(update, patient=True)

    def _lacking(self) -> list[int]:
        """The peers that a checkpoint says were in use and that are not."""
        return [peer for peer in sorted(self._before) if self._modules.held(peer) is None]

    def _any_lacking(self) -> bool:
        """Whether worker 0 lacks any: the others must know before they meet again."""
        [lacking] = self._workers.share([bool(self._lacking())])
        return bool(lacking)

    def _require_next(self, update: int) -> None:
        """Sync mode: a peer that is past our next boundary must still have the snapshot it published there."""
        boundary = -(-max(update, 1) // self._config.interval) * self._config.interval
        lacking = [peer for peer in self._others if self._guide is not None and self._guide.lacks(peer, boundary)]
        [peer] = self._workers.share([lacking[0] if lacking else -1])
        if peer >= 0:
            self._miss(peer, boundary, update)

    def _miss(self, peer: int, theirs: int, update: int) -> None:
        message = f"the snapshot of peer {peer} at update {theirs} is gone"
        if self._config.sync:
            raise ConfigError(
                f"{flag('sync')}: cannot resume from update {update}: {message}; "
                f"resume from the newest checkpoint, or start again with a new {flag('run-id')}"
            )
        if self._workers.first:
            self._incidents.report("gone", message, about=str(peer))

    @property
    def _reached_store(self) -> RunStore:
        assert self._store is not None, "only workers that publish or fetch open the store"
        return self._store

    @property
    def _guide(self) -> Optional[Fetcher]:
        """Worker 0's fetcher, whose finds are proposed to all workers; None on the others."""
        return self._fetcher if self._workers.first else None

    def _await_update(self, update: int) -> None:
        """Sync mode, worker 0: store our snapshot and wait for the others' of the same update, both bounded."""
        if self._publisher is not None and not self._publisher.flush(self._config.timeout):
            self._incidents.report("late", f"our own snapshot of update {update} was not stored in time")
        if self._guide is not None:
            for peer in self._others:
                self._guide.wish(peer, Wish(update=update))
            self._guide.wait(self._config.timeout)
            for peer in self._others:
                if self._guide.found(peer) is None:
                    message = f"no snapshot of peer {peer} at update {update}; going on without"
                    self._incidents.report("late", message, about=str(peer))

    def _take_up(self, update: int, *, patient: bool) -> None:
        """Let the workers meet, and swap to what all of them have; `patient`: until nothing is pending, bounded."""
        deadline = time.monotonic() + self._config.timeout
        self._propose()
        while True:
            try:
                agreed = meet(self._workers, self._others, self._pending, self._readiness)
            except WorkersLost as error:
                self.end_without_workers(error)
                return
            for peer, (proposal, answer) in agreed.items():
                if answer is Readiness.READY:
                    self._swap(proposal, update)
                if answer is not Readiness.PENDING:
                    self._pending.pop(peer, None)
                    if self._guide is not None and not self._config.sync:
                        self._guide.wish(peer, NEWEST)  # a file that had vanished was wished for exactly
            self._opened.clear()
            if not patient or all(answer is not Readiness.PENDING for _, answer in agreed.values()):
                return
            if time.monotonic() > deadline:
                self._pending.clear()  # worker 0's word: the next meeting, with nothing proposed, is the last
            time.sleep(HURRIED_SECONDS)

    def _propose(self) -> None:
        """Worker 0: name what is new, sticking to what is still pending until every worker has answered for it."""
        if self._guide is None:
            return
        for peer in self._others:
            manifest = self._guide.found(peer)
            used = self._modules.held(peer)
            proposal = None if manifest is None else Proposal.of(manifest)
            if proposal is not None and (used is None or used.proposal != proposal):
                self._pending.setdefault(peer, proposal)

    def _readiness(self, proposal: Proposal) -> Readiness:
        """Whether this worker can swap to `proposal` right now; if it cannot, see to it that it can next time."""
        path = snapshot_file(self._folder, proposal.sha256)
        try:
            self._opened[proposal.peer] = self._open_snapshot(proposal)
            return Readiness.READY
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever it is, this worker must answer: the others are waiting
            self._incidents.report("disk", f"{path}: {type(error).__name__}: {error}", about=str(proposal.peer))
            return Readiness.REFUSED
        if self._fetcher is None:
            return Readiness.PENDING
        self._fetcher.wish(proposal.peer, Wish(reference=proposal.reference))
        return Readiness.REFUSED if self._fetcher.hopeless(proposal.peer) else Readiness.PENDING

    def _swap(self, proposal: Proposal, update: int) -> None:
        """Take up a snapshot that is open; should that fail, go back to the one before, whose file is still here."""
        before = self._modules.held(proposal.peer)
        if self._modules.swap(proposal, *self._opened[proposal.peer], update) or before is None:
            return
        with contextlib.suppress(OSError, RuntimeError, Refused):
            self._modules.swap(before.proposal, *self._open_snapshot(before.proposal), before.accepted)

    def _open_snapshot(self, proposal: Proposal) -> tuple[Optional[Architecture], dict[str, Tensor]]:
        """What a verified snapshot is of, and its tensors."""
        path = snapshot_file(self._folder, proposal.sha256)
        architecture = read_architecture(path)
        return architecture, self._architectures.template(architecture).open(path, verified=True)

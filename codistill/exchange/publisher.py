"""Publishing this peer's snapshots from a background thread.

`publish` copies the weights into one persistent host buffer and returns; hashing, storing and pruning happen behind
the training thread's back. While the buffer is being stored a publication is skipped and counted. What goes wrong is an
incident. A publication that the store did not take is tried again after growing pauses, until it is stored or newer
weights take its place.
"""

from __future__ import annotations

import functools
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Optional

from torch import Tensor

from codistill.config import CodistillConfig
from codistill.exchange.errors import ExchangeError, Refused
from codistill.exchange.heartbeat import Heartbeat
from codistill.exchange.manifest import RETAINED, Manifest, Reference
from codistill.exchange.membership import Identity, Membership
from codistill.exchange.protocol import OnCopy
from codistill.exchange.snapshot import HostBuffer
from codistill.exchange.store import RunStore
from codistill.meters import Incidents, logger

RETRY_SECONDS = 1.0  # the first pause; each next one is twice as long
RETRY_SECONDS_MOST = 60.0
SWEPT = 16  # earlier starts of this peer, at most, whose remains are looked for


@dataclass
class _Job:
    """One publication; the manifest is there from the first attempt on, so that every attempt writes the same."""

    update: int
    epoch: int
    final: bool
    metrics: Mapping[str, float]
    manifest: Optional[Manifest] = None


def digest(payload: memoryview) -> str:
    """The sha256 of a snapshot, hex."""
    return hashlib.sha256(payload).hexdigest()


class Publisher:
    """Worker 0's writing half of the exchange.

    Attributes:
        sent: bytes of snapshots put on the store so far.
        skipped: publications skipped because the buffer was busy.
    """

    def __init__(
        self,
        store: RunStore,
        membership: Membership,
        config: CodistillConfig,
        identity: Identity,
        incidents: Incidents,
        lowest_floor: Callable[[], int],
        on_copy: OnCopy = lambda update, views: {},
    ) -> None:
        """Nothing starts before `start`.

        Args:
            store: where snapshots go.
            membership: this process's place in the run, joined or still to be joined.
            config: the run's options.
            identity: goes into every manifest.
            incidents: told of every fault.
            lowest_floor: the lowest update any peer could restart from; nothing from there on is pruned in sync mode.
            on_copy: called in the background with the buffer's tensors, whatever the store does; what it gives goes
                into the manifest.
        """
        self._store, self._membership, self._config = store, membership, config
        self._identity, self._incidents, self._lowest_floor = identity, incidents, lowest_floor
        self._on_copy = on_copy
        self._word = Heartbeat(store, membership, config, incidents, self._stop)
        self._buffer: Optional[HostBuffer] = None
        self._job: Optional[_Job] = None
        self._storing = False  # an attempt to store the buffer is under way
        self._changed = threading.Condition()  # guards `_job`, `_storing`, `_patient` and `_stopping`
        self._patient = True  # whether a failed attempt is followed by another
        self._stopping = threading.Event()
        self._dropped: list[Reference] = []  # snapshots to be deleted
        self._abandoned: list[Manifest] = []  # publications of which parts may be on the store, to be deleted too
        self._thread = threading.Thread(target=self._loop, name="codistill_publisher", daemon=True)
        self._sequence = 0
        self.sent = 0
        self.skipped = 0

    def start(self, floor: int) -> None:
        """Begin the heartbeat and wait for publications.

        Args:
            floor: the update this process starts from.
        """
        self._thread.start()
        self._word.start(floor)

    def publish(
        self,
        state: Mapping[str, Tensor],
        *,
        update: int,
        epoch: int,
        metrics: Mapping[str, float],
        final: bool = False,
        patience: float = 0.0,
    ) -> bool:
        """Copy `state` and have it published.

        Args:
            state: our weights.
            update: updates done so far.
            epoch: the host's epoch.
            metrics: numbers for the manifest.
            final: training has ended with these weights.
            patience: seconds to wait for a publication that is being stored right now.

        Returns:
            False when there still was one, the copy failed, or nothing is published any more: this one is left out.
        """
        with self._changed:
            free = self._changed.wait_for(lambda: not self._storing, patience)
            if self._stopping.is_set():
                return False
            if not free:
                self.skipped += 1
                return False
            if self._job is not None and self._job.update == update:  # the same weights wait for another attempt
                self._job.final |= final
                self._changed.notify_all()
                return True
            self._job = None  # one that waits for its next attempt makes room for newer weights
        try:
            if self._buffer is None:
                self._buffer = HostBuffer(state, self._config.dtype)
            self._buffer.fill(state)
        except Exception as error:  # no room for the buffer, say
            self._incidents.report("copy", f"the weights could not be copied: {type(error).__name__}: {error}")
            return False
        with self._changed:
            if self._stopping.is_set():
                return False
            self._job = _Job(update, epoch, final, dict(metrics))
            self._changed.notify_all()
        return True

    @property
    def stopped(self) -> bool:
        """Whether nothing is published any more."""
        return self._stopping.is_set()

    def flush(self, seconds: float) -> bool:
        """Wait until everything is stored or given up; False if it took longer than `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._job is None, seconds)

    def set_floor(self, update: int) -> None:
        """From now on this peer can restart from `update`; told to the others with the next heartbeat."""
        self._word.set_floor(update)

    def close(self, seconds: float, *, ended: bool) -> None:
        """Let what is under way finish, for at most `seconds`, then stop.

        Args:
            seconds: the bound.
            ended: training ended normally: `latest.json` says so.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            self._patient = ended
            self._changed.notify_all()
        ended = self.flush(seconds) and ended
        self._stop()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._word.close(deadline - time.monotonic(), ended=ended, busy=self._thread.is_alive())

    def _loop(self) -> None:
        while (job := self._next_job()) is not None:
            self._store_patiently(job)

    def _next_job(self) -> Optional[_Job]:
        """Wait for a publication and lay hands on the buffer; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._job is not None or self._stopping.is_set())
            self._storing = self._job is not None
            return self._job

    def _store_patiently(self, job: _Job) -> None:
        """Try to store the buffer until that is settled; between two attempts the buffer is free for newer weights."""
        self._word.attempt(functools.partial(self._show_copy, job))
        pause = RETRY_SECONDS
        while True:
            settled = self._word.attempt(functools.partial(self._store_snapshot, job))
            with self._changed:
                self._storing = False
                if settled:  # at once: whoever waits must not find it still to be done
                    self._drop(job)
                    return
                self._changed.notify_all()
                if not self._worth_another(job, pause):
                    break
                self._storing = True
            pause = min(2 * pause, RETRY_SECONDS_MOST)
        if job.manifest is not None and not self._word.names(job.manifest.reference):
            self._abandoned.append(job.manifest)
        with self._changed:
            self._drop(job)

    def _drop(self, job: _Job) -> None:
        if self._job is job:
            self._job = None
        self._changed.notify_all()

    def _worth_another(self, job: _Job, pause: float) -> bool:
        """After a pause, whether `job` is still what is to be stored."""
        self._changed.wait_for(lambda: self._job is not job or self._stopping.is_set() or not self._patient, pause)
        return self._job is job and not self._stopping.is_set() and self._patient

    def _stop(self) -> None:
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()

    def _show_copy(self, job: _Job) -> None:
        if self._buffer is not None:
            job.metrics = {**job.metrics, **self._on_copy(job.update, self._buffer.tensors())}

    def _store_snapshot(self, job: _Job) -> None:
        latest = self._word.latest()
        newest = latest.manifest
        if self._word.retired or self._buffer is None:
            return
        if newest is None or (newest.incarnation, newest.update) != (latest.incarnation, job.update):
            newest = self._put(job, self._buffer)
        self._word.say(manifest=replace(newest, final=newest.final or job.final))
        if not self._word.retired:  # else what we would delete is not ours any more
            self._word.attempt(self._clean_up)

    def _put(self, job: _Job, buffer: HostBuffer) -> Manifest:
        """Store the buffer and make it what our next word names."""
        payload = buffer.view()
        manifest = job.manifest
        if manifest is None:
            manifest = self._describe(job, payload)
            if self._config.sync:
                self._compare_with_earlier(self._word.latest().retained, job.update, manifest.sha256)
            job.manifest = manifest
        self._store.put_snapshot(manifest, payload)
        kept, dropped = self._split((*self._word.latest().retained, manifest.reference))
        self._word.name(manifest, kept)
        self._dropped += dropped
        self.sent += len(payload)
        return manifest

    def _clean_up(self) -> None:
        """Delete what nobody needs; what the store does not delete now waits for the next time."""
        while self._dropped:
            self._store.delete(self._config.peer, self._dropped[:1])
            del self._dropped[0]
        while self._abandoned:
            self._store.discard(self._abandoned[0])
            del self._abandoned[0]
        if self._membership.before is not None:
            self._membership.before = None
            self._sweep()

    def _sweep(self) -> None:
        """Delete what killed predecessors left half-written: tried once, and no incident where a store cannot list."""
        earlier = range(max(1, self._membership.incarnation - SWEPT), self._membership.incarnation)
        try:
            self._store.sweep(self._config.peer, earlier, self._word.latest().retained)
        except ExchangeError as error:
            logger.info("codistill: what earlier starts left half-written was not swept: %s", error)

    def _describe(self, job: _Job, payload: memoryview) -> Manifest:
        self._sequence += 1
        return Manifest(
            run=self._config.run_id,
            peer=self._config.peer,
            incarnation=self._membership.incarnation,
            sequence=self._sequence,
            update=job.update,
            epoch=job.epoch,
            final=job.final,
            payload=f"{job.update}-{secrets.token_hex(8)}.safetensors",
            bytes=len(payload),
            sha256=digest(payload),
            dtype=self._config.dtype,
            fingerprint=self._identity.fingerprint,
            init_hash=self._identity.init_hash,
            metrics=job.metrics,
            architecture=self._identity.architecture,
        )

    def _compare_with_earlier(self, retained: tuple[Reference, ...], update: int, digest: str) -> None:
        """In sync mode a restarted peer must come to the same weights again."""
        for reference in retained:
            if reference.update == update:
                try:
                    earlier = self._store.manifest(self._config.peer, reference)
                except Refused as error:  # spoilt: nothing to compare with, and no reason to keep ours back
                    self._incidents.report(error.cause, str(error))
                    continue
                if earlier is not None and earlier.sha256 != digest:
                    self._incidents.report(
                        "not-reproduced",
                        f"update {update} came out differently than before the restart; "
                        "with --codistill-sync the others may have used the earlier weights",
                    )

    def _split(self, retained: tuple[Reference, ...]) -> tuple[tuple[Reference, ...], tuple[Reference, ...]]:
        """What stays on the store and what goes: never the newest `keep`; in sync mode nothing that a restart needs."""
        needed_from = self._lowest_floor() if self._config.sync else None
        newest = set(retained[-self._config.keep :])
        kept = [r for r in retained if r in newest or (needed_from is not None and r.update >= needed_from)][-RETAINED:]
        stays = set(kept)
        return tuple(kept), tuple(r for r in retained if r not in stays)

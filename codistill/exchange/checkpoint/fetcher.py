"""Fetching and verifying peers' snapshots from a background thread, once per machine.

A verified snapshot is a file named by its sha256 in a private folder of this machine, which the machine's workers map.
Nothing unverified ever carries such a name. A refusal is an incident and that snapshot is not tried again; any other
trouble is an incident too, and tried again after growing pauses. Only the peers that are wished for are polled; of the
others one at a time is looked at, at a low rate, to notice who comes and goes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from codistill.exchange.checkpoint.architectures import Architecture
from codistill.exchange.checkpoint.meeting import Proposal
from codistill.exchange.checkpoint.presence import Presence
from codistill.exchange.errors import ExchangeError, Refused, StorageError, same_start
from codistill.exchange.manifest import Latest, Manifest, Reference
from codistill.exchange.membership import Identity
from codistill.exchange.snapshot import Template
from codistill.exchange.store import RunStore
from codistill.meters import Incidents

POLL_SECONDS = 0.5
HURRIED_SECONDS = 0.02
PATIENCE = 60  # longest pause after trouble with a peer, in polls; the first is one poll, each next one twice as long
SILENCE = 60  # polls without a heartbeat after which a peer is absent: half a minute, six heartbeats
SCOUTING = 2  # polls between two looks at peers that are not wished for
FILES_PER_PEER = 3


@dataclass(frozen=True)
class Wish:
    """Which of a peer's snapshots is wanted: the one at `update`, or exactly `reference`; neither: the newest.

    With `sha256` only one of that digest will do.
    """

    update: Optional[int] = None
    reference: Optional[Reference] = None
    sha256: Optional[str] = None

    @classmethod
    def of(cls, proposal: Proposal) -> Wish:
        """For exactly that snapshot."""
        return cls(reference=proposal.reference, sha256=proposal.sha256)


NEWEST = Wish()


def snapshot_file(folder: Path, sha256: str) -> Path:
    """Where a verified snapshot lies on a machine."""
    return folder / f"{sha256}.safetensors"


def read_architecture(snapshot: Path) -> Optional[Architecture]:
    """Of which model a verified snapshot is; None: like ours."""
    document: Optional[Architecture] = json.loads(snapshot.with_suffix(".json").read_bytes())
    return document


def _write_architecture(snapshot: Path, architecture: Optional[Architecture]) -> None:
    document = None if architecture is None else dict(architecture)
    snapshot.with_suffix(".json").write_text(json.dumps(document), encoding="utf-8")


def _remove(snapshot: Path) -> None:
    snapshot.unlink(missing_ok=True)
    snapshot.with_suffix(".json").unlink(missing_ok=True)


class Fetcher:
    """Reads for every worker on this machine.

    Attributes:
        received: bytes of snapshots fetched so far.
        presence: what the peers' words tell of who is there.
    """

    def __init__(
        self,
        store: RunStore,
        folder: Path,
        readers: Sequence[int],
        template_of: Callable[[Optional[Architecture]], Template],
        dtype: str,
        identity: Identity,
        incidents: Incidents,
        scouted: Sequence[int] = (),
    ) -> None:
        """Nothing is read before `start`, and no peer before it is wished for, or its turn has come to be scouted.

        Args:
            store: where the snapshots are.
            folder: private folder of this machine; its files belong to this object.
            readers: the peers that may read our snapshots, whose floors count.
            template_of: what a snapshot of an architecture must look like; raises `Refused`.
            dtype: wire dtype that the run agreed on.
            identity: of this peer; a snapshot needs the same output space and other initial weights.
            incidents: told of every refusal and fault.
            scouted: the peers to be looked at now and then while they are not wished for, in turn.
        """
        self._store, self._folder, self._readers = store, folder, readers
        self._template_of, self._dtype = template_of, dtype
        self._identity, self._incidents = identity, incidents
        self._wishes: dict[int, Wish] = {}
        self._found: dict[int, Manifest] = {}
        self._hopeless: set[int] = set()
        self._kept: Optional[frozenset[int]] = None  # whose files stay; None: everybody's
        self._highest: dict[int, tuple[int, int]] = {}
        # Snapshots, and places of those older than the newest accepted; the latest, should somebody bring many.
        self._refused: deque[str] = deque(maxlen=1000)
        self._files: dict[int, deque[Path]] = {}
        self._scouted = deque(scouted)
        self._next_scouting = 0.0  # by our monotonic clock
        self._pauses: dict[int, float] = {}  # seconds, by peer, while there is trouble
        self._not_before: dict[int, float] = {}  # by our monotonic clock
        # Guards `_wishes`, `_found`, `_hopeless`, `_kept`, `_hurried` and `_stopping`.
        self._changed = threading.Condition()
        self._hurried = False
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="codistill-fetch", daemon=True)
        self.received = 0
        self.presence = Presence(SILENCE * POLL_SECONDS)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Stop; a transfer under way is given `seconds`, then left to the daemon thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def wish(self, peer: int, wish: Wish) -> None:
        """From now on look for this snapshot of `peer`."""
        with self._changed:
            if self._wishes.get(peer) == wish:
                return
            self._wishes[peer] = wish
            self._found.pop(peer, None)
            self._hopeless.discard(peer)
            self._pauses.pop(peer, None)  # the trouble was with something else
            self._not_before.pop(peer, None)
            self._changed.notify_all()

    def attend(self, peers: Collection[int], keep: Collection[int]) -> None:
        """From now on look for no other peers' snapshots; no files but theirs and those of `keep` stay here."""
        with self._changed:
            self._kept = frozenset(peers) | frozenset(keep)
            for peer in self._wishes.keys() - set(peers):
                del self._wishes[peer]
                self._found.pop(peer, None)
                self._hopeless.discard(peer)

    def remember(self, peer: int, reference: Reference) -> None:
        """Take nothing older than `reference` for the newest of `peer`; before `start`, or before it is wished for."""
        self._highest[peer] = max(self._highest.get(peer, (0, 0)), (reference.incarnation, reference.sequence))

    def found(self, peer: int) -> Optional[Manifest]:
        """The verified snapshot that fulfils the wish, if it is here already."""
        with self._changed:
            return self._found.get(peer)

    def hopeless(self, peer: int) -> bool:
        """Whether the wish cannot be fulfilled: the snapshot is gone, or was refused."""
        with self._changed:
            return peer in self._hopeless

    def wait(self, seconds: float) -> None:
        """Look without pause until every wish is fulfilled or hopeless, or `seconds` have passed."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: all(p in self._found or p in self._hopeless for p in self._wishes), seconds)
            self._hurried = False

    def lacks(self, peer: int, update: int) -> bool:
        """Ask the store now: whether `peer` is past `update` and its snapshot of then was deleted. False if unknown.

        The oldest go first: with an older one there, that of `update` has never come to be stored.
        """
        try:
            latest = self._store.latest(peer)
        except ExchangeError:
            return False
        if latest is None or latest.manifest is None:
            return False
        return latest.manifest.update >= update and all(kept.update > update for kept in latest.retained)

    def lowest_floor(self) -> int:
        """The lowest update that any of our readers could restart from; 0 while one has not been heard of."""
        return self.presence.lowest_floor(self._readers)

    def _loop(self) -> None:
        while True:
            with self._changed:
                wishes = dict(self._wishes)
            for peer in sorted(wishes):
                self._look(peer)
            self._scout()
            self._sweep()
            with self._changed:
                if self._stopping:
                    return
                pause = HURRIED_SECONDS if self._hurried else POLL_SECONDS
                self._changed.wait_for(functools.partial(self._called, wishes), pause)

    def _called(self, wishes: dict[int, Wish]) -> bool:
        return self._stopping or self._wishes != wishes

    def _look(self, peer: int) -> None:
        with self._changed:
            wish = self._wishes.get(peer)
            fulfilled = peer in self._found
        if wish is not None and not self._stopping:
            self._attempt(peer, wish, lambda: self._try_to_fulfil(peer, wish, fulfilled))

    def _scout(self) -> None:
        """Hear the next one of those that are not polled anyway."""
        with self._changed:
            strangers = [peer for peer in self._scouted if peer not in self._wishes]
        if not strangers or self._stopping or time.monotonic() < self._next_scouting:
            return
        self._next_scouting = time.monotonic() + SCOUTING * POLL_SECONDS
        self._scouted.rotate(-1 - self._scouted.index(strangers[0]))
        self._attempt(strangers[0], None, lambda: self._hear(strangers[0]))

    def _sweep(self) -> None:
        """Delete the files of those who are not attended to any more; workers that mapped one keep it."""
        with self._changed:
            strangers = [] if self._kept is None else list(self._files.keys() - self._kept)
        for peer in strangers:
            for path in self._files.pop(peer):
                with contextlib.suppress(OSError):
                    _remove(path)

    def _attempt(self, peer: int, wish: Optional[Wish], action: Callable[[], object]) -> None:
        """Do it, unless `peer` made trouble with this wish just now; whatever fails is an incident."""
        if time.monotonic() < self._not_before.get(peer, 0.0):
            return
        try:
            action()
            self._pauses.pop(peer, None)
            return
        except ExchangeError as error:
            cause, message = error.cause, str(error)
        except OSError as error:
            cause, message = "disk", f"{self._folder}: {error.strerror}"
        except Exception as error:  # a fault of ours must not end the run either
            cause, message = "internal", f"fetching failed: {type(error).__name__}: {error}"
        self._incidents.report(cause, f"peer {peer}: {message}", about=str(peer))
        pause = min(2 * self._pauses.get(peer, POLL_SECONDS / 2), PATIENCE * POLL_SECONDS)
        with self._changed:
            if self._wishes.get(peer) == wish:
                self._pauses[peer], self._not_before[peer] = pause, time.monotonic() + pause

    def _hear(self, peer: int) -> Optional[Latest]:
        """The peer's newest word, which also tells whether it is there."""
        try:
            latest = self._store.latest(peer)
        except StorageError:
            self.presence.unreadable(peer)
            raise
        except Refused:
            self.presence.heard(peer, None)
            raise
        self.presence.heard(peer, latest)
        return latest

    def _try_to_fulfil(self, peer: int, wish: Wish, fulfilled: bool) -> None:
        manifest = self._resolve(peer, wish, fulfilled)
        if manifest is None:
            return
        # Not by its digest alone: a peer could then have another's snapshot refused, or its own, published once more.
        snapshot = f"peer {peer}, {manifest.reference}, {manifest.sha256}"
        if snapshot in self._refused:
            self._give_up(peer, wish)
            return
        try:
            self._check_identity(manifest)  # of one whose file is here already, too
            if not snapshot_file(self._folder, manifest.sha256).exists():
                self._fetch(peer, manifest)
        except Refused:
            self._refused.append(snapshot)
            self.presence.refused(peer, manifest.reference)
            self._give_up(peer, wish)
            raise
        if wish == NEWEST:  # only now: one that is refused must not make the honest ones after it look old
            self.remember(peer, manifest.reference)
        self._settle(peer, wish, manifest)

    def _resolve(self, peer: int, wish: Wish, fulfilled: bool) -> Optional[Manifest]:
        """The manifest that the wish means right now, or None while there is none (new)."""
        if fulfilled and wish != NEWEST:
            return None
        latest = self._hear(peer)
        if latest is None:
            return None
        if wish.reference is not None:
            return self._exactly(peer, wish, wish.reference)
        if wish.update is not None:
            at_update = [r for r in latest.retained if r.update == wish.update]
            if at_update:
                return self._exactly(peer, wish, at_update[-1])
            finished = latest.closed and latest.manifest is not None and latest.manifest.final
            return latest.manifest if finished else None
        return self._newer(peer, latest.manifest)

    def _exactly(self, peer: int, wish: Wish, reference: Reference) -> Optional[Manifest]:
        try:
            manifest = self._store.manifest(peer, reference)
        except Refused:  # written once: it will not get better, as latest.json does
            self._give_up(peer, wish)
            raise
        if manifest is None or wish.sha256 not in (None, manifest.sha256):  # pruned, or another is there
            self._give_up(peer, wish)
            return None
        return manifest

    def _newer(self, peer: int, manifest: Optional[Manifest]) -> Optional[Manifest]:
        if manifest is None:
            return None
        at, highest = (manifest.incarnation, manifest.sequence), self._highest.get(peer, (0, 0))
        if at < highest:
            older = f"peer {peer}, {at}"
            if older in self._refused:
                return None
            self._refused.append(older)
            raise Refused("rollback", f"snapshot {at} (incarnation, sequence) is older than {highest}, seen before")
        return None if self.found(peer) == manifest else manifest

    def _fetch(self, peer: int, manifest: Manifest) -> None:
        """Bring the payload here and verify it: bytes, sha256, header, names, shapes, dtypes, finiteness."""
        part = self._folder / f"{manifest.sha256}.part"
        try:
            template = self._template_of(manifest.architecture)
            limit = template.limit
            if manifest.bytes > limit:
                raise Refused("size", f"{manifest.bytes} bytes, but a snapshot of this model has at most {limit}")
            if not self._store.download(manifest, part):
                raise ExchangeError("pruned", f"update {manifest.update} was pruned before it was read")
            self.received += manifest.bytes
            template.open(part)
            self._remember(peer, snapshot_file(self._folder, manifest.sha256))
            _write_architecture(snapshot_file(self._folder, manifest.sha256), manifest.architecture)
            part.replace(snapshot_file(self._folder, manifest.sha256))
        finally:
            part.unlink(missing_ok=True)

    def _check_identity(self, manifest: Manifest) -> None:
        if manifest.fingerprint != self._identity.fingerprint:
            raise Refused("fingerprint", "its dictionary or class list differs from ours")
        if manifest.dtype != self._dtype:
            raise Refused("dtype", f"its weights travel as {manifest.dtype}, the run agreed on {self._dtype}")
        if manifest.init_hash == self._identity.init_hash:
            raise same_start()

    def _remember(self, peer: int, path: Path) -> None:
        files = self._files.setdefault(peer, deque())
        files.append(path)
        while len(files) > FILES_PER_PEER:
            _remove(files.popleft())  # workers that mapped it keep it

    def _settle(self, peer: int, wish: Wish, manifest: Manifest) -> None:
        with self._changed:
            if self._wishes.get(peer) == wish:
                self._found[peer] = manifest
                self._changed.notify_all()

    def _give_up(self, peer: int, wish: Wish) -> None:
        with self._changed:
            if self._wishes.get(peer) == wish and wish != NEWEST:
                self._hopeless.add(peer)
                self._changed.notify_all()

"""Taking up peers' snapshots: the workers meet, and swap to what lies verified on the machines of all of them.

What one worker cannot open is taken up by none. A swap that fails goes back to the snapshot that was in use before.
Only a failed meeting is an exception (`WorkersLost`): the workers cannot agree on anything any more.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from torch import Tensor

from codistill.config import CodistillConfig
from codistill.exchange.checkpoint.architectures import Architecture, Architectures
from codistill.exchange.checkpoint.fetcher import (
    HURRIED_SECONDS,
    NEWEST,
    Fetcher,
    Wish,
    read_architecture,
    snapshot_file,
)
from codistill.exchange.checkpoint.meeting import Proposal, Readiness, meet
from codistill.exchange.checkpoint.peer_modules import PeerModules
from codistill.exchange.errors import Refused
from codistill.meters import Incidents
from codistill.workers import Workers


class Uptake:
    """One worker's part in it."""

    def __init__(
        self,
        config: CodistillConfig,
        workers: Workers,
        places: int,
        modules: PeerModules,
        architectures: Architectures,
        incidents: Incidents,
    ) -> None:
        """Nothing is taken up before `reads_from`.

        Args:
            config: the run's options.
            workers: of this peer.
            places: neighbours at a time, at most.
            modules: where snapshots are taken up.
            architectures: what peers' models may be.
            incidents: told of what cannot be opened.
        """
        self._config, self._workers, self._places = config, workers, places
        self._modules, self._architectures, self._incidents = modules, architectures, incidents
        self._folder = Path()
        self._fetcher: Optional[Fetcher] = None
        self._pending: dict[int, Proposal] = {}
        self._opened: dict[int, tuple[Optional[Architecture], dict[str, Tensor]]] = {}

    def reads_from(self, folder: Path, fetcher: Optional[Fetcher]) -> None:
        """The files are in `folder`; `fetcher` brings them there, on the worker that fetches."""
        self._folder, self._fetcher = folder, fetcher

    def take_up(self, neighbours: Sequence[int], update: int, *, patient: bool) -> None:
        """Let the workers meet, and swap to what all of them have.

        Args:
            neighbours: worker 0's word on whom to learn from; the others hear it here.
            update: updates done so far.
            patient: until nothing is pending, for at most `timeout` seconds.

        Raises:
            WorkersLost: a worker did not come.
        """
        deadline = time.monotonic() + self._config.timeout
        self._propose(neighbours)
        while True:
            proposals = {peer: self._pending.get(peer) for peer in neighbours}
            agreed = meet(self._workers, self._places, proposals, self._readiness)
            self._modules.neighbours = tuple(agreed)
            for proposal, answer in agreed.values():
                if proposal is not None:
                    self._settle(proposal, answer, update)
            self._opened.clear()
            if not self._workers.first and self._fetcher is not None:
                self._fetcher.attend(agreed, keep=self._modules.peers)
            if not patient or all(answer is not Readiness.PENDING for _, answer in agreed.values()):
                return
            if time.monotonic() > deadline:
                self._pending.clear()  # worker 0's word: the next meeting, with nothing proposed, is the last
            time.sleep(HURRIED_SECONDS)

    def _propose(self, neighbours: Sequence[int]) -> None:
        """Worker 0: name what is new, sticking to what is still pending until every worker has answered for it."""
        if not self._workers.first or self._fetcher is None:
            return
        self._pending = {peer: proposal for peer, proposal in self._pending.items() if peer in neighbours}
        for peer in neighbours:
            manifest = self._fetcher.found(peer)
            if manifest is not None and Proposal.of(manifest) not in self._modules.tried(peer):
                self._pending.setdefault(peer, Proposal.of(manifest))

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
        self._fetcher.wish(proposal.peer, Wish.of(proposal))
        return Readiness.REFUSED if self._fetcher.hopeless(proposal.peer) else Readiness.PENDING

    def _settle(self, proposal: Proposal, answer: Readiness, update: int) -> None:
        """Do what the workers agreed on."""
        if answer is Readiness.READY:
            self._swap(proposal, update)
        if answer is not Readiness.PENDING:
            self._pending.pop(proposal.peer, None)
            if self._workers.first and self._fetcher is not None and not self._config.sync:
                self._fetcher.wish(proposal.peer, NEWEST)  # a file that had vanished was wished for exactly

    def _swap(self, proposal: Proposal, update: int) -> None:
        """Take up a snapshot that is open; should that fail, go back to the one before, whose file is still here."""
        before = self._modules.held(proposal.peer) or self._modules.make_room(proposal.peer)
        if self._modules.swap(proposal, *self._opened[proposal.peer], update) or before is None:
            return
        with contextlib.suppress(OSError, RuntimeError, Refused):
            self._modules.make_room(before.proposal.peer)
            self._modules.swap(before.proposal, *self._open_snapshot(before.proposal), before.accepted)

    def _open_snapshot(self, proposal: Proposal) -> tuple[Optional[Architecture], dict[str, Tensor]]:
        """What a verified snapshot is of, and its tensors."""
        path = snapshot_file(self._folder, proposal.sha256)
        architecture = read_architecture(path)
        return architecture, self._architectures.template(architecture).open(path, verified=True)

"""How a peer's workers come into a run: the key, the token, the store, then the publisher and the fetchers.

Before the first update a user can still put things right, so what cannot work is a `ConfigError`, one line, on all
workers together. A store that does not answer is an incident: joining is tried again in the background.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

from codistill.config import CodistillConfig, ConfigError, flag
from codistill.exchange.checkpoint.architectures import Architectures
from codistill.exchange.checkpoint.fetcher import Fetcher
from codistill.exchange.checkpoint.private_folder import PrivateFolder
from codistill.exchange.errors import ExchangeError, StorageError
from codistill.exchange.membership import Identity, Membership, owner_token
from codistill.exchange.objects import Objects, without_credentials
from codistill.exchange.protocol import OnCopy
from codistill.exchange.publisher import Publisher
from codistill.exchange.signing import KEY, signing_key
from codistill.exchange.store import RunStore
from codistill.meters import Incidents, logger
from codistill.topology import Topology
from codistill.workers import Workers


class Joining:
    """One worker's way into the run.

    Attributes:
        folder: for the files of this machine's fetcher.
    """

    def __init__(self, config: CodistillConfig, workers: Workers, save_dir: Path, incidents: Incidents) -> None:
        """Look at the environment, the save dir and the dir; nothing is written to the store yet.

        Raises:
            ConfigError: one of them is unusable, on this worker or another.
        """
        self._config, self._workers, self._save_dir, self._incidents = config, workers, save_dir, incidents
        self._key: Optional[bytes] = None
        self._token = ""
        self._opened: Optional[RunStore] = None
        workers.together(self._prepare)
        owner, start = workers.share([int(self._token[:15] or "0", 16), secrets.randbits(60)])
        self.folder = PrivateFolder(owner, workers.fetcher, start)

    def publisher(
        self,
        identity: Identity,
        terms: Mapping[str, Any],
        floor: int,
        lowest_floor: Callable[[], int],
        on_copy: OnCopy,
        *,
        anew: bool,
    ) -> Publisher:
        """Worker 0: join the run and begin the heartbeat.

        Args:
            identity: goes into every manifest.
            terms: what all peers must agree on.
            floor: the update a restart would need.
            lowest_floor: of the peers that may read us.
            on_copy: called in the background with every snapshot of ours.
            anew: no update has been done yet.

        Raises:
            ConfigError: the run has other terms, or the number is taken.
        """
        agreed = {**terms, KEY: "set"} if self._key is not None else terms
        membership = Membership(self._store, self._config.peer, self._token, agreed, self._save_dir)
        try:
            membership.join()
        except ExchangeError as error:  # tried again with every heartbeat
            self._incidents.report(error.cause, str(error))
        if anew and membership.before is not None and membership.before.closed:
            logger.warning(
                "codistill: peer %d of run %s has ended its training before; a new training needs a new %s, "
                "or its peers begin by learning from what the old one left",
                *(self._config.peer, self._config.run_id, flag("run-id")),
            )
        publisher = Publisher(self._store, membership, self._config, identity, self._incidents, lowest_floor, on_copy)
        publisher.start(floor)
        return publisher

    def fetcher(self, identity: Identity, architectures: Architectures, topology: Topology) -> Fetcher:
        """Workers that fetch: begin to look. Worker 0 also watches those that it may come to need.

        Raises:
            ConfigError: there is no writable folder.
        """
        try:
            self.folder.make()
        except OSError as error:
            raise ConfigError(f"{self.folder.path}: {error.strerror}; name a writable folder with TMPDIR") from None
        watches = self._workers.first and not topology.reads_all
        fetcher = Fetcher(
            self._store,
            self.folder.path,
            topology.readers,
            architectures.template,
            self._config.dtype,
            identity,
            self._incidents,
            scouted=(topology.readers if self._config.sync else topology.others) if watches else (),
        )
        fetcher.start()
        return fetcher

    def _prepare(self) -> None:
        """What can go wrong on this worker alone."""
        self._key = signing_key()
        if self._workers.first:
            self._token = owner_token(self._save_dir, self._config.peer)
        if self._workers.fetches:
            self._opened = RunStore(self._open(), self._config.run_id, self._key)

    def _open(self) -> Objects:
        try:
            return Objects(str(self._config.dir))
        except StorageError as error:
            place = without_credentials(str(self._config.dir))
            raise ConfigError(f"{flag('dir')} {place}: cannot be opened: {error}") from None

    @property
    def _store(self) -> RunStore:
        assert self._opened is not None, "only workers that publish or fetch open the store"
        return self._opened

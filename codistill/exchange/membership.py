"""Being one peer of a run: the terms all agree on, the number this process owns, the incarnation it is.

A token in the save dir owns a peer number; every start claims the next incarnation, create-once. A second owner is
turned away while the first one's heartbeat advances by our own monotonic clock (no two machines' clocks are compared);
an older process that finds a higher incarnation has been replaced and stops publishing. The save dir remembers the last
incarnation, so that a store that lost everything does not make readers take a restarted peer for an old one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from codistill.config import ConfigError, flag
from codistill.exchange.errors import Refused
from codistill.exchange.manifest import Latest
from codistill.exchange.store import RunStore

TOKEN_FILE = "codistill-token"
INCARNATION_FILE = "codistill-incarnation"
HEARTBEAT_SECONDS = 5.0


@dataclass(frozen=True)
class Identity:
    """What every manifest of this peer says of it.

    Attributes:
        fingerprint: sha256 (hex) of the output space.
        init_hash: sha256 (hex) of the weights it started from.
        architecture: registry name and JSON arguments of its model, if known.
    """

    fingerprint: str
    init_hash: str
    architecture: Optional[Mapping[str, Any]] = None


def owner_token(save_dir: Path, peer: int) -> str:
    """The public half of the token in `save_dir` (its sha256, hex); made on first use, for one peer number.

    Raises:
        ConfigError: if the save dir cannot hold it, or holds another peer's.
    """
    path = save_dir / TOKEN_FILE
    try:
        if not path.exists():
            save_dir.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{TOKEN_FILE}.{os.getpid()}")
            unfinished.touch(mode=0o600)
            unfinished.write_text(f"{secrets.token_hex(32)} {peer}\n", encoding="ascii")
            os.replace(unfinished, path)
        secret, _, owner = path.read_text(encoding="ascii").strip().partition(" ")
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; the save dir must be writable, since it holds the token that owns a peer number"
        ) from None
    if owner != str(peer):
        raise ConfigError(
            f"{flag('peer')} {peer}: {save_dir} is the save dir of peer {owner}; give each peer a save dir of its own"
        )
    return hashlib.sha256(secret.encode()).hexdigest()


class Membership:
    """This process's place in the run.

    Attributes:
        incarnation: the number claimed by `join`, from 1.
        before: what the previous incarnation left in `latest.json`, or None.
    """

    def __init__(self, store: RunStore, peer: int, token: str, terms: Mapping[str, Any], save_dir: Path) -> None:
        """Nothing is read or written before `join`; `save_dir` remembers the last incarnation."""
        self._store = store
        self._peer = peer
        self._terms = terms
        self._memory = save_dir / INCARNATION_FILE
        self.token = token
        self.incarnation = 0
        self.before: Optional[Latest] = None

    def join(self, watch_seconds: float = 3 * HEARTBEAT_SECONDS) -> None:
        """Agree to the run's terms and claim the next incarnation of the peer number.

        Args:
            watch_seconds: how long another owner's heartbeat is watched before its number is taken over.

        Raises:
            ConfigError: other terms, or a number that a running process owns.
            StorageError: the store did not answer; `join` may be tried again.
        """
        try:
            self._store.agree(self._terms)
        except Refused as error:
            if error.cause != "terms":  # spoilt, not different: it may be read well the next time
                raise
            raise ConfigError(f"{error}; give all peers of a run the same options, or a new {flag('run-id')}") from None
        self.before = self._previous()
        if self._owned_by_another() and self._heart_beats(watch_seconds):
            raise ConfigError(
                f"{flag('peer')} {self._peer}: a running process with another save dir has this number; "
                f"give each peer of the run its own {flag('peer')}"
            )
        incarnation = self._store.claim(self._peer, self.token, above=self._remembered())
        self.before = self._previous()  # again: a predecessor may have published until now
        self.incarnation = incarnation
        with contextlib.suppress(OSError):  # it matters only should the store forget
            self._memory.write_text(f"{self.incarnation}\n", encoding="ascii")

    def superseded(self) -> bool:
        """Whether a later start has claimed this peer number."""
        return self._store.newest_claim(self._peer, self.incarnation) > self.incarnation

    def _remembered(self) -> int:
        try:
            return int(self._memory.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0

    def _previous(self) -> Optional[Latest]:
        try:
            return self._store.latest(self._peer)
        except Refused:
            return None  # unreadable: overwritten by our first heartbeat

    def _owned_by_another(self) -> bool:
        return self.before is not None and not self.before.closed and self.before.token != self.token

    def _heart_beats(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(0.2, seconds / 10))
            now = self._previous()
            if now is not None and self.before is not None and now.heartbeat != self.before.heartbeat:
                return not now.closed
        return False

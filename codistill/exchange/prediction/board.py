"""Where the jobs of a run that exchanges predictions find each other: each posts one document and reads the others'.

The board is the run's store, or a TCPStore that peer 0 hosts. Documents come from strangers and are judged by whoever
reads them; the store's are read up to a limit, a TCPStore's whole, since it does not tell how long one is. What fails
is a `StorageError` and may work later: a connection that broke is made again at the next call. A board is for one
background thread; of all this only `start` may make training wait, and not for long.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional, Protocol, TypeVar

import torch.distributed as dist

from codistill.config import CodistillConfig, ConfigError, flag
from codistill.exchange import strict_json
from codistill.exchange.errors import ExchangeError, Refused, StorageError
from codistill.exchange.heartbeat import Heartbeat
from codistill.exchange.membership import Membership, owner_token
from codistill.exchange.objects import Objects, without_credentials
from codistill.exchange.prediction.forks import kept_from_children
from codistill.exchange.signing import KEY, signing_key
from codistill.exchange.store import RunStore, compare_terms
from codistill.meters import Incidents, logger
from codistill.text import first_line

HOST = 0  # the peer that holds the TCPStore
CONNECT_SECONDS = 5.0  # for one attempt to reach a TCPStore
STORE_SECONDS = 10.0  # for one request to the store, with all its retries
BIND_SECONDS = 15.0  # a predecessor that was killed may hold the port a little longer
_SIOCGIFADDR = 0x8915  # Linux's request for the IPv4 address of an interface

T = TypeVar("T")


class Board(Protocol):
    """One peer's access to what all peers of a run post."""

    @property
    def incarnation(self) -> int:
        """Which start of this peer we are; 0 before the run was joined."""

    @property
    def hosting(self) -> bool:
        """Whether the board ends with this process."""

    @property
    def elsewhere(self) -> bool:
        """Whether the board ends with another peer's process."""

    def join(self) -> bool:
        """Whether we are one of the run: its terms are ours, and the peer's number belongs to us."""

    def superseded(self) -> bool:
        """Whether a later start has taken this peer's number."""

    def post(self, document: bytes) -> None:
        """Overwrite what we said."""

    def read(self, peer: int) -> Optional[bytes]:
        """What a peer said last."""

    def close(self) -> None:
        """Let go."""


class StoreBoard:
    """The board on the run's store; joining and heartbeats there are the `Heartbeat`'s business."""

    hosting = elsewhere = False

    def __init__(self, store: RunStore, membership: Membership, peer: int) -> None:
        self._store, self._membership, self._peer = store, membership, peer

    @property
    def incarnation(self) -> int:
        """As the membership claimed it."""
        return self._membership.incarnation

    def join(self) -> bool:
        """Whether the membership has."""
        return self._membership.incarnation > 0

    def superseded(self) -> bool:
        """Whether a later start has claimed this peer's number."""
        return self._membership.superseded()

    def post(self, document: bytes) -> None:
        """Overwrite our meeting.json."""
        self._store.put_meeting(self._peer, document)

    def read(self, peer: int) -> Optional[bytes]:
        """A peer's meeting.json."""
        return self._store.meeting(peer)

    def close(self) -> None:
        """Nothing to let go of."""


class TcpBoard:
    """The board on a TCPStore, which peer 0 hosts.

    Whoever starts last with a number has it. When the host ends the board is gone until it is started again; groups
    that stand do not need it.
    """

    def __init__(self, address: str, run: str, peer: int, terms: Mapping[str, Any]) -> None:
        """Nothing is opened before `start`.

        Args:
            address: tcp://HOST:PORT, as options are judged.
            run: identifier of the run.
            peer: our number; `HOST` hosts.
            terms: what all peers must agree on.
        """
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self._address, self._host, self._port = address, host, int(port)
        self._run, self._peer, self._terms = run, peer, terms
        self._server: Optional[dist.TCPStore] = None
        self._client: Optional[dist.TCPStore] = None
        self._joining = threading.Lock()  # the start may not have waited for it
        self.incarnation = 0
        self.hosting = peer == HOST
        self.elsewhere = not self.hosting

    def start(self) -> None:
        """Peer 0: listen.

        Raises:
            ConfigError: the port is not free.
        """
        if not self.hosting:
            return
        end = time.monotonic() + BIND_SECONDS
        while self._server is None:
            try:
                self._server = serve(self._port)
            except RuntimeError:
                if time.monotonic() > end:
                    raise ConfigError(
                        f"{flag('rendezvous')} {self._address}: port {self._port} is not free on this machine; "
                        "name another one, the same for all peers"
                    ) from None
                time.sleep(0.5)

    def join(self) -> bool:
        """Agree to the terms and take our number, again after every broken connection.

        Raises:
            ConfigError: the run has other terms.
            StorageError: the board is out of reach.
        """
        with self._joining:
            if self._client is None:
                self._client = reach("localhost" if self._server else self._host, self._port, CONNECT_SECONDS)
                self._agree()
                self.incarnation = self._call(lambda client: client.add(self._claims, 1))
        return True

    def _agree(self) -> None:
        mine = strict_json.dumps(self._terms)
        found = self._call(lambda client: client.compare_set(f"{self._run}/terms", "", mine.decode()))
        try:
            compare_terms(self._run, strict_json.loads(found), strict_json.loads(mine))
        except Refused as error:
            self._client = None
            if error.cause != "terms":  # spoilt, not different
                raise StorageError("storage", f"the rendezvous at {self._address} has no terms: {error}") from None
            raise ConfigError(f"{error}; give all peers of a run the same options, or a new {flag('run-id')}") from None

    def superseded(self) -> bool:
        """Whether somebody has come with our number since."""
        return self._call(lambda client: client.add(self._claims, 0)) > self.incarnation

    def post(self, document: bytes) -> None:
        """Overwrite our document."""
        self._call(lambda client: client.set(self._key(self._peer), document.decode()))

    def read(self, peer: int) -> Optional[bytes]:
        """A peer's document."""
        key = self._key(peer)
        return self._call(lambda client: client.get(key) if client.check([key]) else None)

    def close(self) -> None:
        """Close the connection, and the port if it is ours."""
        self._client = self._server = None

    @property
    def _claims(self) -> str:
        return f"{self._run}/peers/{self._peer}/claims"

    def _key(self, peer: int) -> str:
        return f"{self._run}/peers/{peer}/meeting"

    def _call(self, function: Callable[[dist.TCPStore], T]) -> T:
        if self._client is None:
            raise StorageError("storage", f"no connection to the rendezvous at {self._address}")
        try:
            return function(self._client)
        except RuntimeError as error:
            self._client = None
            raise StorageError("storage", f"the rendezvous at {self._address} broke off: {first_line(error)}") from None


def open_board(
    config: CodistillConfig, terms: Mapping[str, Any], save_dir: Path, incidents: Incidents
) -> tuple[Board, Optional[Heartbeat]]:
    """Open the board that the options name, and join the run there.

    Args:
        config: validated options; `dir` or `rendezvous` is set.
        terms: what all peers must agree on.
        save_dir: holds the token that owns the peer number.
        incidents: told when the store does not answer; peers of a rendezvous start apart.

    Returns:
        The board and, on the run's store, the heartbeat that tells `codistill status`, and a second owner, of us.

    Raises:
        ConfigError: it cannot be opened, the run has other terms, or the number is taken.
    """
    if signing_key() is not None:
        logger.info(
            "codistill: %s is set, but predictions travel neither signed nor encrypted: on a trusted network only", KEY
        )
    if config.rendezvous is not None:
        board = TcpBoard(config.rendezvous, config.run_id, config.peer, terms)
        board.start()
        _join_soon(board)
        return board, None
    place = str(config.dir)
    try:
        store = RunStore(Objects(place, timeout=STORE_SECONDS), config.run_id)
    except StorageError as error:
        raise ConfigError(f"{flag('dir')} {without_credentials(place)}: cannot be opened: {error}") from None
    membership = Membership(store, config.peer, owner_token(save_dir, config.peer), terms, save_dir)
    try:
        membership.join()
    except ExchangeError as error:  # tried again with every heartbeat
        incidents.report(error.cause, str(error))
    heartbeat = Heartbeat(store, membership, config, incidents)
    heartbeat.start(floor=0)
    return StoreBoard(store, membership, config.peer), heartbeat


def _join_soon(board: TcpBoard) -> None:
    """Join for a short time: what listens there may be stopped, or something else, and never answer.

    Raises:
        ConfigError: the run has other terms.
    """
    failed: list[Exception] = []

    def join() -> None:
        try:
            board.join()
        except StorageError:
            pass  # tried again in the background
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=join, name="codistill-joining", daemon=True)
    thread.start()
    thread.join(2 * CONNECT_SECONDS)
    for error in failed:
        raise error


def serve(port: int = 0) -> dist.TCPStore:
    """A TCPStore that listens on `port` (0: a free one) until it is forgotten; RuntimeError if it cannot."""
    with kept_from_children():
        return dist.TCPStore(
            "localhost", port, None, True, timeout=timedelta(seconds=CONNECT_SECONDS), wait_for_workers=False
        )


def reach(host: str, port: int, seconds: float) -> dist.TCPStore:
    """A connection to somebody's TCPStore.

    Raises:
        StorageError: nobody answers.
    """
    try:
        # torch would tell every refused connection on standard error, at length.
        socket.create_connection((host, port), seconds).close()
        with kept_from_children():
            return dist.TCPStore(host, port, None, False, timeout=timedelta(seconds=seconds), wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        raise StorageError("storage", f"nobody answers at {host}:{port}: {first_line(error)}") from None


def own_address() -> str:
    """The address at which the other peers reach this machine: as gloo has it.

    That of the interface in GLOO_SOCKET_IFNAME, else what the host name resolves to, else loopback.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", interface[:15].encode()))
            return socket.inet_ntoa(answer[20:24])
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return "127.0.0.1"

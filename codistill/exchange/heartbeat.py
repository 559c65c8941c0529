"""This peer's `latest.json`: that it lives, which snapshot is its newest, and where a restart would begin.

A background thread overwrites it every few seconds. A process that has been replaced by a later start, or that learns
late that its run has other terms, *retires*: it never writes again. What goes wrong is an incident.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Optional

from codistill.config import CodistillConfig, ConfigError
from codistill.exchange.errors import ExchangeError, StorageError
from codistill.exchange.manifest import Latest, Manifest, Reference
from codistill.exchange.membership import HEARTBEAT_SECONDS, Membership
from codistill.exchange.store import RunStore
from codistill.meters import Incidents


class Heartbeat:
    """Worker 0's word to the other peers, and to whoever looks at the run.

    Attributes:
        retired: nothing is written any more.
    """

    def __init__(
        self,
        store: RunStore,
        membership: Membership,
        config: CodistillConfig,
        incidents: Incidents,
        on_retiring: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is written before `start`.

        Args:
            store: where the word goes.
            membership: this process's place in the run, joined or still to be joined.
            config: the run's options.
            incidents: told of every fault.
            on_retiring: called once, from whichever thread finds out.
        """
        self._store, self._membership, self._config = store, membership, config
        self._incidents, self._on_retiring = incidents, on_retiring
        self.retired = False
        self._latest: Optional[Latest] = None
        self._lock = threading.RLock()  # of `_latest` and its overwriting
        self._floor = 0
        self._stopping = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._loop, name="codistill_heartbeat", daemon=True)

    def start(self, floor: int) -> None:
        """Begin; a restart would begin from update `floor`."""
        self._floor = floor
        self._thread.start()

    def set_floor(self, update: int) -> None:
        """From now on a restart would begin from `update`; told with the next heartbeat."""
        self._floor = update

    def close(self, seconds: float, *, ended: bool, busy: bool = False) -> None:
        """Stop, for at most `seconds`.

        Args:
            seconds: the bound.
            ended: training ended normally: the last word says so.
            busy: something else of ours was not stored in time.
        """
        self._ended = ended
        self._stopping.set()
        self._thread.join(max(0.0, seconds))
        if busy or self._thread.is_alive():
            self._incidents.report("storage", "the store was still busy at the end, which is left untold")

    def latest(self) -> Latest:
        """The word as it is now; joins the run if the store did not answer before, and takes over what was left there.

        Raises:
            ExchangeError, ConfigError: it cannot be joined now, or never.
        """
        with self._lock:
            if self._latest is not None:
                return self._latest
            if self._membership.incarnation == 0:
                self._membership.join()
            before = self._membership.before
            self._latest = Latest(
                run=self._config.run_id,
                peer=self._config.peer,
                incarnation=self._membership.incarnation,
                token=self._membership.token,
                heartbeat=0,
                resume_floor=self._floor,
                closed=False,
                manifest=before.manifest if before else None,
                retained=before.retained if before else (),
            )
            return self._latest

    def names(self, reference: Reference) -> bool:
        """Whether the word names this snapshot, as of those on the store."""
        return self._latest is not None and reference in self._latest.retained

    def name(self, manifest: Manifest, retained: tuple[Reference, ...]) -> None:
        """From here on the word names these, whether or not the store takes it the first time."""
        with self._lock:
            self._latest = replace(self.latest(), manifest=manifest, retained=retained)

    def say(self, **changes: Any) -> None:
        """Write it, with `changes`, unless somebody else has become this peer since: then never again.

        Raises:
            ExchangeError, ConfigError: the store did not take it, or the run cannot be joined.
        """
        with self._lock:
            before = self.latest()
            if self._membership.superseded():
                self._retire(
                    "superseded",
                    f"peer {self._config.peer} was started again elsewhere; this process publishes no more",
                )
            if self.retired:
                return
            latest = replace(before, heartbeat=before.heartbeat + 1, resume_floor=self._floor, **changes)
            self._store.put_latest(latest)
            self._latest = latest

    def attempt(self, action: Callable[[], None]) -> bool:
        """Do it; whether another attempt could bring nothing else."""
        try:
            action()
        except StorageError as error:
            self._incidents.report(error.cause, str(error))
            return False
        except ExchangeError as error:
            self._incidents.report(error.cause, str(error))
        except ConfigError as error:
            self._retire("terms", str(error))
        except Exception as error:  # a fault of ours must not end the run either
            self._incidents.report("internal", f"publishing failed: {type(error).__name__}: {error}")
        return True

    def _loop(self) -> None:
        while True:
            self.attempt(self.say)
            if self._stopping.wait(HEARTBEAT_SECONDS):
                break
        if self._ended and self._latest is not None and not self.retired:
            self.attempt(lambda: self.say(closed=True))

    def _retire(self, cause: str, message: str) -> None:
        with self._lock:
            if self.retired:  # the other thread has found out, too
                return
            self.retired = True
        self._stopping.set()
        self._on_retiring()
        self._incidents.report(cause, message)

"""Looking at a run from outside: what its peers say on the store, and whether their heartbeats advance meanwhile.

Nothing is written and no weights are downloaded; the peers are 0..N-1 of run.json, not what a listing shows. A
heartbeat counts when it advances while we watch, by our own monotonic clock. A store that hangs, lies or holds rubbish
costs a bounded time; it becomes what is wrong with a peer, or one `ExchangeError` when nothing can be said of any.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, Optional
from urllib.parse import unquote, urlsplit

from codistill.config import MAX_PEERS, RUN_ID, SCHEMES, WIRE_DTYPES, ConfigError
from codistill.exchange.errors import ExchangeError, Refused, StorageError
from codistill.exchange.manifest import Latest, Manifest
from codistill.exchange.membership import HEARTBEAT_SECONDS
from codistill.exchange.objects import Objects
from codistill.exchange.store import RunStore

PATIENCE = 3 * HEARTBEAT_SECONDS
POLL_SECONDS = 0.5
STORE_SECONDS = 10.0  # one request, with all its retries
HANGING_SECONDS = 15.0  # when the store's own limit is not kept: a network folder whose server is gone, say
READERS = 32  # requests at a time
RUNS = 20  # most runs named where the one asked for is not
NAME = 40  # most characters kept of a name
WAITING = 5  # most peers named while waiting


class Survey:
    """Looks at a run again and again, and remembers the heartbeats.

    Args:
        url: what the peers were given as --codistill-dir.
        run_id: which run there.
        patience: seconds without a new heartbeat after which a peer is late.
        key: what the run's manifests are signed with; None: signatures are not checked.

    Attributes:
        place: the URL, without credentials.
        run, patience: as given.
        verified: whether signatures are checked.

    Raises:
        ConfigError: a URL or run id that cannot be one.
    """

    def __init__(
        self, url: str, run_id: str = "default", *, patience: float = PATIENCE, key: Optional[bytes] = None
    ) -> None:
        scheme, separator, _ = url.partition("://")
        if not url.strip() or (separator and scheme not in SCHEMES):
            schemes = ", ".join(f"{known}://" for known in SCHEMES)
            raise ConfigError(f"URL {scheme + separator!r}: must be a folder or start with one of {schemes}")
        if not RUN_ID.fullmatch(run_id):
            raise ConfigError(
                f"--run-id {run_id!r}: must be 1 to 128 letters, digits, dots, dashes or underscores, "
                "the first a letter or digit"
            )
        self._url, self.run, self.patience, self._key = url, run_id, patience, key
        self.verified = key is not None
        self._folder = _local_folder(url)
        self.place = url if self._folder is not None else f"{scheme}://"  # until opened: it may hold credentials
        self._objects: Optional[Objects] = None
        self._seen: dict[int, Seen] = {}
        self._asked: dict[int, Future[Word]] = {}

    def look(self, tell: Callable[[str], None] = lambda line: None) -> Sight:
        """Look until waiting tells no more: at most `patience` after the first look, and what the store takes.

        Args:
            tell: told what is being waited for, in one line.

        Raises:
            ExchangeError: there is no such run, or no store, or a run.json that no peer can join.
        """
        tell(f"reading run {self.run}")
        store = RunStore(self._opened(), self.run, self._key)
        terms = self._terms(store)
        now = self._look_at_peers(store, terms)
        while waiting := [peer for peer, seen in self._seen.items() if seen.pending(now, self.patience)]:
            tell(f"waiting for {_peers(waiting)}: a heartbeat is due every {HEARTBEAT_SECONDS:g} s")
            time.sleep(POLL_SECONDS)
            now = self._look_at_peers(store, terms)
        return Sight(terms, dict(self._seen), now)

    def _opened(self) -> Objects:
        if self._objects is None:
            if self._folder is not None and not _bounded(os.path.isdir, self._folder):  # opening would make it
                raise StorageError("storage", f"{self.place} is no folder; give what --codistill-dir was given")
            self._objects = Objects(self._url, timeout=STORE_SECONDS)
            self.place = self._objects.url
        return self._objects

    def _terms(self, store: RunStore) -> Terms:
        try:
            terms: Optional[Terms] = _bounded(_read_terms, store)
        except Refused as error:
            raise Refused(error.cause, f"{self.place} holds a run {self.run} that no peer can join: {error}") from None
        if terms is None:
            raise ExchangeError("absent", f"{self.place} holds no run {self.run}; {_other_runs(store.objects)}")
        return terms

    def _look_at_peers(self, store: RunStore, terms: Terms) -> float:
        """Look at every peer once, several at a time; one whose last look still hangs is not asked again."""
        peers = range(terms.peers)
        free = [peer for peer in peers if peer not in self._asked or self._asked[peer].done()]
        self._asked.update(_ask(lambda peer: _word(store, terms, peer), free))
        now = time.monotonic()
        self._seen = {peer: follow(self._seen.get(peer), _heard(self._asked[peer]), now) for peer in peers}
        return now


@dataclass(frozen=True)
class Terms:
    """What all peers of the run agreed on.

    Attributes:
        peers: how many there are.
        dtype: in which weights travel.
        output: fingerprint of the output space.
        everything: the terms as run.json has them.
    """

    peers: int
    dtype: str
    output: str
    everything: Mapping[str, Any]

    @classmethod
    def parse(cls, terms: Mapping[str, Any]) -> Terms:
        """Check what run.json says, or raise `Refused` ("format")."""
        peers, dtype, output = (terms.get(name) for name in ("peers", "dtype", "output"))
        if type(peers) is not int or not 1 <= peers <= MAX_PEERS:
            raise Refused("format", f"run.json: peers: 1 to {MAX_PEERS} are possible, not {peers!r:.40}")
        if dtype not in WIRE_DTYPES or not isinstance(output, str):
            raise Refused("format", "run.json: dtype and output: a dtype and a fingerprint are expected")
        return cls(peers, dtype, output, terms)


# What one look at a peer found (None: it has not spoken, or cannot be read), and what is wrong with that.
Word = tuple[Optional[Latest], Optional[ExchangeError]]


@dataclass(frozen=True)
class Seen:
    """What was seen of one peer so far.

    Attributes:
        latest: its newest word; None while it has not spoken, or cannot be read.
        refusal: why the others do not use what it says.
        since: when, by our monotonic clock, we looked first, or saw its heartbeat advance last.
        beating: whether we saw its heartbeat advance.
    """

    latest: Optional[Latest]
    refusal: Optional[ExchangeError]
    since: float
    beating: bool = False

    def pending(self, now: float, patience: float) -> bool:
        """Whether waiting may tell more: a heartbeat is due, or the store may come back."""
        if now - self.since >= patience:
            return False
        if self.refusal is not None:
            return isinstance(self.refusal, StorageError)
        return self.latest is not None and not self.latest.closed and not self.beating


@dataclass(frozen=True)
class Sight:
    """What there is to judge.

    Attributes:
        terms: of the run.
        seen: by peer, for all peers.
        now: our monotonic clock after the last look.
    """

    terms: Terms
    seen: Mapping[int, Seen]
    now: float


def follow(before: Optional[Seen], word: Word, now: float) -> Seen:
    """Add one look at a peer to what was seen of it before.

    Args:
        before: None at the first look, which alone tells nothing of a heartbeat.
        word: what the look found.
        now: our monotonic clock after it.
    """
    latest, refusal = word
    if before is None or latest is None:
        if before is not None and isinstance(refusal, StorageError):
            return replace(before, refusal=refusal)
        return Seen(latest, refusal, now)
    if before.latest is None:
        spoke = not isinstance(before.refusal, StorageError)  # or else this is the first look that tells anything
        return Seen(latest, refusal, now, beating=spoke)
    at, highest = _position(latest), _position(before.latest)
    if at is not None and highest is not None and at < highest:
        older = f"snapshot {at} (incarnation, sequence) is older than {highest}, seen before"
        return replace(before, refusal=Refused("rollback", older))
    if (latest.incarnation, latest.heartbeat) > (before.latest.incarnation, before.latest.heartbeat):
        return Seen(latest, refusal, now, beating=True)
    return replace(before, latest=latest, refusal=refusal)


def _position(latest: Latest) -> Optional[tuple[int, int]]:
    return None if latest.manifest is None else (latest.manifest.incarnation, latest.manifest.sequence)


def _peers(numbers: list[int]) -> str:
    few = ", ".join(map(str, numbers[:WAITING])) + (", ..." if len(numbers) > WAITING else "")
    return f"peer{'s' if len(numbers) > 1 else ''} {few}"


def _read_terms(store: RunStore) -> Optional[Terms]:
    terms = store.terms()
    return None if terms is None else Terms.parse(terms)


def _word(store: RunStore, terms: Terms, peer: int) -> Word:
    """Read a peer's latest.json as the other peers do; a payload that is gone may have been pruned meanwhile."""
    for _ in range(2):
        latest = store.latest(peer)
        refusal = None if latest is None or latest.manifest is None else _refusal(store, terms, latest.manifest)
        if refusal is None or refusal.cause != "pruned":
            break
    return None if latest is None else _reduced(latest), refusal


def _refusal(store: RunStore, terms: Terms, manifest: Manifest) -> Optional[ExchangeError]:
    """Why no other peer would take up this snapshot, as far as can be told without reading it."""
    if manifest.fingerprint != terms.output:
        return Refused("fingerprint", "its dictionary or class list differs from the run's")
    if manifest.dtype != terms.dtype:
        return Refused("dtype", f"its weights travel as {manifest.dtype}, the run agreed on {terms.dtype}")
    size = store.size(manifest)
    if size is None:
        return ExchangeError("pruned", f"the weights of update {manifest.update} are not on the store")
    if size != manifest.bytes:
        return Refused("size", f"the weights of update {manifest.update} have {size} bytes, not {manifest.bytes}")
    return None


def _reduced(latest: Latest) -> Latest:
    """Without what is not shown: a thousand peers' documents may have half a megabyte each."""
    manifest = latest.manifest
    if manifest is not None:
        name = (manifest.architecture or {}).get("name")
        manifest = replace(
            manifest,
            metrics={name[:NAME]: value for name, value in manifest.metrics.items()},
            architecture={"name": name[:NAME]} if isinstance(name, str) else None,
        )
    return replace(latest, manifest=manifest, retained=())


def _local_folder(url: str) -> Optional[Path]:
    """The folder that a URL means; None for a bucket."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        return Path(os.path.expanduser(url))
    return Path(unquote(urlsplit(url).path)) if scheme == "file" else None


def _other_runs(objects: Objects) -> str:
    """What to do when a run is not there, naming some that are, as far as the store can list."""
    try:
        runs = _bounded(_runs, objects)
    except Exception:  # an extra, which a store need not allow
        runs = []
    return f"there are {', '.join(runs)}: choose with --run-id" if runs else "its first peer will make it"


def _runs(objects: Objects) -> list[str]:
    names = [name for name in objects.folders() if RUN_ID.fullmatch(name)][: 5 * RUNS]
    return [name for name in names if objects.exists(f"{name}/run.json")][:RUNS]


def _ask(function: Callable[[Any], Any], items: Iterable[Any]) -> dict[Any, Future[Any]]:
    """Call `function` for every item, several at a time, and wait, but not for ever, for the answers.

    The threads are daemons, as a pool's are not: a store that hangs must not keep this process from ending.
    """
    answers: dict[Any, Future[Any]] = {item: Future() for item in items}
    todo = deque(answers)
    for _ in range(min(READERS, len(answers))):
        Thread(target=_answer_all, args=(function, todo, answers), name="codistill-survey", daemon=True).start()
    wait(answers.values(), HANGING_SECONDS + len(answers) / 10)
    for answer in answers.values():
        answer.cancel()  # those not begun
    return answers


def _answer_all(function: Callable[[Any], Any], todo: deque[Any], answers: Mapping[Any, Future[Any]]) -> None:
    while todo:
        try:
            item = todo.popleft()
        except IndexError:  # another thread was quicker
            return
        if answers[item].set_running_or_notify_cancel():
            try:
                answers[item].set_result(function(item))
            except BaseException as error:
                answers[item].set_exception(error)


def _bounded(function: Callable[[Any], Any], item: Any) -> Any:
    """`function(item)`, or StorageError when it hangs."""
    return _answer(_ask(function, [item])[item])


def _answer(answer: Future[Any]) -> Any:
    if answer.cancelled() or not answer.done():
        raise StorageError("storage", f"the store gave no answer in {HANGING_SECONDS:g} s")
    return answer.result()


def _heard(answer: Future[Word]) -> Word:
    try:
        word: Word = _answer(answer)
        return word
    except ExchangeError as error:
        return None, error

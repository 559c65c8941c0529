"""Objects by key in a folder or a bucket; the only module that knows obstore.

A put is atomic: nobody ever reads half an object. Sizes are known before a byte is read. Whatever the store does
wrong, from a refused connection to a panic inside its library, comes out as one `StorageError` whose line names the
place and the key, and no credentials; by then obstore has retried, with back-off, for about `timeout` seconds. Nothing
has to be opened again when the trouble is over. In a local folder nothing but plain files in plain folders is touched:
a pipe would hold the reader for ever, a link would lead elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional
from urllib.parse import quote, unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore, MemoryStore, from_url

from codistill.config import SCHEMES
from codistill.exchange.errors import ExchangeError, Refused, StorageError

logger = logging.getLogger("codistill")

# One request's worth, one request at a time: each has its own timeout, so that the slowest line that is fast enough
# (5 Mbit/s at 30 s a request) does not depend on an object's size.
CHUNK = 16 * 1024 * 1024
_ENVIRONMENT = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_SWITCHES = ("allow_http", "allow_invalid_certificates")
_TEXTS = ("proxy_url", "proxy_ca_certificate", "proxy_excludes")
# Environment variables whose values no message shows.
_SECRET = re.compile(
    r"((AWS|GOOGLE|AZURE)_.*|CODISTILL_)(KEY|SECRET|TOKEN|PASSWORD|SAS|CREDENTIAL|CONNECTION_STRING)(_ID|_BASE64)?"
)
# The second form is a password with a slash in it: what follows the colon is no port.
_USER = re.compile(r"//([^/\s]*@|[^/\s@]*:(?!\d*([/\s]|$))\S*@)")
_SIGNED = re.compile(r"\b(sig|[\w-]*(signature|credential|token|secret|password))=[^\s&]+", re.IGNORECASE)
_REPLY = re.compile(r"<[?!a-zA-Z].*")  # a server's XML or HTML, which may quote the request with its headers
_UNCONDITIONAL = re.compile(
    r"status code: (405|501)|<Code>(Invalid(Argument|Request)|Not(Implemented|Supported))|not yet implemented"
)
_FORBIDDEN = re.compile(r"status code: 403 Forbidden:( AccessDenied|$)")  # with no other reason
_NO_BUCKET = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)<")
_KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}


class _Rejected(StorageError):
    """The server does not know what it was asked for, a conditional put for instance."""


class Objects:
    """Objects under one URL, by keys relative to it.

    Args:
        url: A folder, or a URL of one of `codistill.config.SCHEMES`; a local folder is made when missing. Buckets take
            their options from the usual environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_ALLOW_HTTP, ...).
        timeout: Seconds that one request may take, with all its retries.

    Raises:
        StorageError: When the place cannot be opened.
    """

    def __init__(self, url: str, *, timeout: float = 60.0) -> None:
        self.url = without_credentials(url)
        with self._failing("opening"):
            self._over(_open(url, timeout))

    @classmethod
    def over(cls, store: Any) -> Objects:
        """Wrap a ready obstore store, such as a `MemoryStore`."""
        objects = cls.__new__(cls)
        objects.url = type(store).__name__
        objects._over(store)
        return objects

    def _over(self, store: Any) -> None:
        self._store = store
        # Resolved once, as obstore does: it goes on with the folder that a link led to when it was opened.
        self._root = Path(store.prefix).resolve() if isinstance(store, LocalStore) and store.prefix else None
        # Whether a conditional put is one here: known of what runs in this process, to be seen of a server.
        self._conditional: Optional[bool] = True if isinstance(store, (LocalStore, MemoryStore)) else None

    def get(self, key: str, *, limit: int) -> Optional[bytes]:
        """Return an object's bytes; Refused("size") beyond `limit`, without reading it.

        None when it is absent. A bucket that is absent is a StorageError where the store tells the difference.
        """
        with suppress(FileNotFoundError), self._failing("reading", key):
            found = obstore.get(self._store, key)
            if found.meta["size"] > limit:
                raise Refused("size", f"{key}: {found.meta['size']} bytes, {limit} are allowed")
            return bytes(found.bytes())
        return None

    def exists(self, key: str) -> bool:
        """Say whether there is an object of that name."""
        return self.size(key) is not None

    def size(self, key: str) -> Optional[int]:
        """Return how many bytes an object has, or None when it is absent."""
        with suppress(FileNotFoundError), self._failing("reading", key):
            return obstore.head(self._store, key)["size"]
        return None

    def folders(self) -> list[str]:
        """Return the first segments of the keys that have several, sorted; in a local folder, its real folders."""
        with self._failing("listing", absent=True):
            if self._root is not None:
                return sorted(entry.name for entry in os.scandir(self._root) if entry.is_dir(follow_symlinks=False))
            return sorted(obstore.list_with_delimiter(self._store)["common_prefixes"])

    def download(self, key: str, path: Path, *, size: int) -> Optional[str]:
        """Stream an object into a file.

        Returns:
            The sha256 of what was written, hex; None when the object is absent, or vanishes on the way.

        Raises:
            Refused: "size" unless the object has exactly `size` bytes; nothing is read then.
            StorageError: When the store fails. No file is left behind, nor after an OSError.
            OSError: When the file cannot be written.
        """
        there = self.size(key)
        if there is None:
            return None
        if there != size:
            raise Refused("size", f"{key}: {there} bytes, not {size}")
        digest = hashlib.sha256()
        with path.open("wb") as file:
            whole = False
            try:
                for start in range(0, size, CHUNK):
                    chunk = self._range(key, start, min(CHUNK, size - start))
                    if chunk is None:
                        return None
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                whole = True
            finally:
                if not whole and path.is_file():  # never a device or a pipe that somebody named
                    path.unlink()
        return digest.hexdigest()

    def put(self, key: str, data: Any) -> None:
        """Write an object of any bytes-like `data`, atomically, over what was there."""
        data = self._own(data)
        with self._failing("writing", key, absent=True):
            size = memoryview(data).nbytes
            # 10,000 parts are the most that S3 takes.
            chunk = max(CHUNK, size // 9_000)
            obstore.put(self._store, key, data, use_multipart=size > chunk, chunk_size=chunk, max_concurrency=1)

    def create(self, key: str, data: Any) -> bool:
        """Write an object unless one of that name exists; False when it does.

        Up to `CHUNK` bytes, of several that try at once exactly one succeeds. A larger object goes in parts, for
        which stores have no such promise: give it a name that nobody else uses. Nor has a server without conditional
        puts: there we look before we write, which the log tells once.
        """
        data = self._own(data)
        conditional = False if memoryview(data).nbytes > CHUNK else self._conditional  # once: another thread may learn
        if conditional:
            return self._create(key, data)
        if self.exists(key):
            return False
        if conditional is None:
            return self._create_and_learn(key, data)
        self.put(key, data)
        return True

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; absent ones are fine."""
        for key in keys:
            with suppress(FileNotFoundError), self._failing("deleting", key):
                obstore.delete(self._store, key)

    def sweep(self, folder: str, keep: Collection[str]) -> int:
        """Delete what is below the key prefix `folder`; only for a folder that nobody writes to any more.

        In a local folder that includes what obstore calls a file while it writes it (`NAME#1`); links, pipes, devices
        and names that cannot be part of a key stay. Out of reach are a server's unfinished multipart uploads: they are
        for a lifecycle rule of the bucket.

        Args:
            folder: Key prefix, whole segments.
            keep: Keys of the objects to leave.

        Returns:
            How many were deleted. One that cannot be is left; the others still go.

        Raises:
            StorageError: When the folder cannot be listed.
        """
        if self._root is not None:
            with self._failing("sweeping", folder, final=stat.S_ISDIR):
                return _sweep_folder(self._root, folder, keep)
        with self._failing("sweeping", folder):
            keys = [found["path"] for page in obstore.list(self._store, folder) for found in page]
        deleted = 0
        for key in keys:
            if key not in keep:
                with suppress(ExchangeError):
                    self.delete([key])
                    deleted += 1
        return deleted

    def _create(self, key: str, data: Any) -> bool:
        with self._failing("writing", key, absent=True):
            try:
                obstore.put(self._store, key, data, mode="create")
            except AlreadyExistsError:
                return False
            return True

    def _create_and_learn(self, key: str, data: Any) -> bool:
        """Create an object that is not there, and see whether the server keeps, ignores or rejects the condition."""
        try:
            created = self._create(key, data)
            # The second time it must be turned away; where it is not, the same is there as before.
            conditional = not created or not self._create(key, data)
        except _Rejected:
            self.put(key, data)  # if that fails too, the condition was not the reason, and nothing is learnt
            created, conditional = True, False
        if not conditional and self._conditional is None:
            logger.warning(
                "codistill: %s knows no conditional puts: if two jobs have the same --codistill-peer, or two peers "
                "with different options start at the same moment, that may go unnoticed",
                self.url,
            )
        self._conditional = conditional
        return created

    def _range(self, key: str, start: int, length: int) -> Any:
        """Return exactly `length` bytes from `start`, or None when the object has vanished."""
        with suppress(FileNotFoundError), self._failing("reading", key):
            chunk = obstore.get_range(self._store, key, start=start, length=length)
            if len(chunk) != length:
                raise Refused("size", f"{key}: ends before the size it had")
            return chunk
        return None

    def _own(self, data: Any) -> Any:
        """Copy for a store in memory, which would keep the caller's buffer itself and change with it."""
        return bytes(data) if isinstance(self._store, MemoryStore) else data

    @contextmanager
    def _failing(
        self, doing: str, key: str = "", *, absent: bool = False, final: Callable[[int], bool] = stat.S_ISREG
    ) -> Iterator[None]:
        """Turn what the store raises into StorageError; FileNotFoundError passes, unless `absent` is a failure too.

        In a local folder, Refused("format") when something odd is in the way of `key`, of which `final` takes the mode.
        """
        try:
            if key and self._root is not None:
                _check_way(self._root, key, final)
            yield
        except ExchangeError:
            raise
        except BaseException as error:
            if isinstance(error, FileNotFoundError) and not absent and not _NO_BUCKET.search(str(error)):
                raise
            # A panic of obstore's derives from BaseException, as KeyboardInterrupt does.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            place = f"{self.url.rstrip('/')}/{key}" if key else self.url
            kind = _Rejected if _UNCONDITIONAL.search(str(error)) else StorageError
            reason = _one_line(error)
            if doing == "reading" and _FORBIDDEN.search(reason):
                reason += " (so S3 answers for an absent object, too, without the permission s3:ListBucket)"
            raise kind("storage", f"{doing} {place} failed: {reason}") from None


def _open(url: str, timeout: float) -> Any:
    scheme, separator, _ = url.partition("://")
    if not separator:
        return LocalStore(Path(url).expanduser().absolute(), mkdir=True)
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise ValueError("a file URL has three slashes: file:///folder")
        return LocalStore(Path(unquote(parts.path)), mkdir=True)
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme; known are a folder and {', '.join(SCHEMES)}")
    # A retry may start until the first half is over, and then take the second.
    half = timedelta(seconds=timeout / 2)
    client: Any = {"timeout": half, "connect_timeout": min(half, timedelta(seconds=10)), **_client_options(scheme)}
    backoff: Any = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2}
    retry: Any = {"max_retries": 10, "retry_timeout": half, "backoff": backoff}
    return from_url(url, client_options=client, retry_config=retry)


def _client_options(scheme: str) -> dict[str, Any]:
    """Read the client's options from the environment, where obstore ignores them once any is given."""
    found: dict[str, Any] = {}
    for name in _SWITCHES + _TEXTS:
        value = os.environ.get(f"{_ENVIRONMENT[scheme]}{name.upper()}")
        if value:
            found[name] = value.lower() in ("1", "true", "yes", "on") if name in _SWITCHES else value
    return found


def _check_way(root: Path, key: str, final: Callable[[int], bool]) -> None:
    """Refuse a key with anything but folders on its way and a `final` kind of thing at its end; absent is fine.

    That is how it is right now: no help against somebody who changes it before it is opened.
    """
    parts = key.strip("/").split("/")
    if ".." in parts:
        raise ValueError("a key does not lead upwards")
    for depth in range(1, len(parts) + 1):
        path = root.joinpath(*parts[:depth])
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
        wanted = final if depth == len(parts) else stat.S_ISDIR
        if not wanted(mode):
            kind = "a file" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a device")
            place = "a folder" if wanted is stat.S_ISDIR else "a file"
            raise Refused("format", f"{path}: {kind} where {place} belongs; remove it")


def _sweep_folder(root: Path, folder: str, keep: Collection[str]) -> int:
    """Do it by hand: obstore's list follows links, sees no unfinished file, and fails whole on one odd name."""
    deleted = 0
    with suppress(FileNotFoundError):
        for place, _, names, descriptor in os.fwalk(root / folder):
            for name in names:
                key = (Path(place) / name).relative_to(root).as_posix()
                if key in keep or not name.isprintable():
                    continue
                with suppress(OSError):
                    if stat.S_ISREG(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
                        os.unlink(name, dir_fd=descriptor)
                        deleted += 1
    return deleted


def without_credentials(text: str) -> str:
    """Return a URL, or a text with URLs in it, without user names, passwords, queries and signatures."""
    text = re.sub(r"\?[^\s\"'<>)]*", "", _USER.sub("//", text))
    return _SIGNED.sub(r"\1=***", text)


def _one_line(error: BaseException) -> str:
    """Return the start of an error's text on one line, without queries, user names or secrets from the environment."""
    text = str(error).split("Debug source:")[0]  # obstore repeats itself there, at length
    text = _REPLY.sub(_gist, " ".join(text.split()) or type(error).__name__)
    for secret in _secrets():
        text = text.replace(secret, "***")
    return without_credentials(text)[:300]


def _gist(reply: re.Match[str]) -> str:
    """Return code and message of an error in XML, nothing of any other page."""
    return ": ".join(re.findall(r"<(?:Code|Message)>([^<]*)<", reply[0]))


def _secrets() -> Iterator[str]:
    """The secrets in the environment, in each form in which a library may show them."""
    for name, value in os.environ.items():
        if len(value) > 3 and _SECRET.fullmatch(name):
            yield from (" ".join(value.split()), quote(value, safe=""), base64.b64encode(value.encode()).decode())

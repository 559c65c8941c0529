"""Objects by key in a folder or a bucket; the only module that knows obstore.

A put is atomic: nobody ever reads half an object. Sizes are known before a byte is read. Whatever the store does
wrong, from a refused connection to a panic inside its library, comes out as one `StorageError` whose line names the
place and the key, and no credentials; by then obstore has retried, with back-off, for about `timeout` seconds.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore, MemoryStore, from_url

from codistill.exchange.errors import ExchangeError, Refused, StorageError

SCHEMES = ("file", "s3", "gs", "az")
CHUNK = 16 * 1024 * 1024  # one request's worth: each gets its own timeout, so no object is too large for a slow line
_ENVIRONMENT = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_SWITCHES = ("allow_http", "allow_invalid_certificates")
_TEXTS = ("proxy_url", "proxy_ca_certificate", "proxy_excludes")
_SECRET = re.compile(r"(AWS|GOOGLE|AZURE)_.*(KEY|SECRET|TOKEN|PASSWORD|SAS|CREDENTIAL)")


class Objects:
    """Objects under one URL, by keys relative to it.

    Args:
        url: A folder, or a URL of one of `SCHEMES`; a local folder is made when missing. Buckets take their options
            from the usual environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_ALLOW_HTTP, ...).
        timeout: Seconds that one request may take, with all its retries.

    Raises:
        StorageError: When the place cannot be opened.
    """

    def __init__(self, url: str, *, timeout: float = 60.0) -> None:
        self.url = _without_credentials(url)
        with self._failing("opening"):
            self._store: Any = _open(url, timeout)

    @classmethod
    def over(cls, store: Any) -> Objects:
        """Wrap a ready obstore store, such as a `MemoryStore`."""
        objects = cls.__new__(cls)
        objects.url = type(store).__name__
        objects._store = store
        return objects

    def get(self, key: str, *, limit: int) -> Optional[bytes]:
        """Return an object's bytes; Refused("size") beyond `limit`, without reading it.

        None when it is absent; some stores answer the same for a bucket that is.
        """
        with suppress(FileNotFoundError), self._failing("reading", key):
            found = obstore.get(self._store, key)
            if found.meta["size"] > limit:
                raise Refused("size", f"{key}: {found.meta['size']} bytes, {limit} are allowed")
            return bytes(found.bytes())
        return None

    def exists(self, key: str) -> bool:
        """Say whether there is an object of that name."""
        return self._size(key) is not None

    def download(self, key: str, path: Path, *, size: int) -> Optional[str]:
        """Stream an object into a file.

        Returns:
            The sha256 of what was written, hex; None when the object is absent, or vanishes on the way.

        Raises:
            Refused: "size" unless the object has exactly `size` bytes; nothing is read then.
            StorageError: When the store, or writing the file, fails. No file is left behind.
        """
        there = self._size(key)
        if there is None:
            return None
        if there != size:
            raise Refused("size", f"{key}: {there} bytes, not {size}")
        digest = hashlib.sha256()
        with self._failing("downloading", key, absent=True), path.open("wb") as file:
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
            obstore.put(self._store, key, data, use_multipart=size > chunk, chunk_size=chunk, max_concurrency=4)

    def create(self, key: str, data: Any) -> bool:
        """Write an object unless one of that name exists; False when it does.

        Up to `CHUNK` bytes, of several that try at once exactly one succeeds. A larger object goes in parts, for
        which stores have no such promise: give it a name that nobody else uses.
        """
        data = self._own(data)
        if memoryview(data).nbytes > CHUNK:
            if self.exists(key):
                return False
            self.put(key, data)
            return True
        with self._failing("writing", key, absent=True):
            try:
                obstore.put(self._store, key, data, mode="create")
            except AlreadyExistsError:
                return False
            return True

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; absent ones are fine."""
        for key in keys:
            with suppress(FileNotFoundError), self._failing("deleting", key):
                obstore.delete(self._store, key)

    def close(self) -> None:
        """Let the store go; every later call is a StorageError."""
        self._store = None

    def _size(self, key: str) -> Optional[int]:
        with suppress(FileNotFoundError), self._failing("reading", key):
            return obstore.head(self._store, key)["size"]
        return None

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
    def _failing(self, doing: str, key: str = "", *, absent: bool = False) -> Iterator[None]:
        """Turn what the store raises into StorageError; FileNotFoundError passes, unless `absent` is a failure too."""
        try:
            yield
        except ExchangeError:
            raise
        except BaseException as error:
            if isinstance(error, FileNotFoundError) and not absent:
                raise
            # A panic of obstore's derives from BaseException, as KeyboardInterrupt does.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            place = f"{self.url.rstrip('/')}/{key}" if key else self.url
            raise StorageError("storage", f"{doing} {place} failed: {_one_line(error)}") from None


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


def _without_credentials(text: str) -> str:
    text = re.sub(r"//[^/@\s]*@", "//", text)
    return re.sub(r"\?[^\s\"'<>)]*", "", text)


def _one_line(error: BaseException) -> str:
    """Return the start of an error's text on one line, without queries, user names or secrets from the environment."""
    text = str(error).split("Debug source:")[0]  # obstore repeats itself there, at length
    text = _without_credentials(" ".join(text.split()) or type(error).__name__)
    for name, value in os.environ.items():
        if value and _SECRET.fullmatch(name):
            text = text.replace(value, "***")
    return text[:300]

"""Stores to test against: a folder, memory, S3 (moto's server on loopback), and one that fails on purpose.

Import the fixtures that a test file needs by name. `s3_url` sets the usual AWS_* environment, which processes started
by the test inherit. `S3Server.trouble` makes the server misbehave for a while; what it does is one of the functions
from `refuse` to `ignore_condition`.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from obstore.store import MemoryStore
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from codistill.exchange.errors import StorageError
from codistill.exchange.manifest import Latest, Manifest
from codistill.exchange.objects import Objects

OPERATIONS = ("get", "exists", "size", "folders", "download", "put", "create", "delete", "sweep")
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "loopback-access-key", "AWS_SECRET_ACCESS_KEY": "loopback-secret-key"}


class FailingObjects(Objects):
    """Objects that pass everything on, and make the nth call of a named operation from now on fail.

    `fired` lists what failed so far: a test asserts it, so that a fault which never happened cannot pass for survival.
    """

    def __init__(self, inner: Objects) -> None:
        self.inner = inner
        self.url = inner.url
        self.calls: Counter[str] = Counter()
        self.fired: list[str] = []
        self._faults: dict[tuple[str, int], tuple[Exception, bool]] = {}

    def fail_at(
        self, operation: str, nth: int = 1, *, error: Exception | None = None, answer_lost: bool = False
    ) -> None:
        """Arm a fault; with `answer_lost` the operation takes effect first, as when a connection breaks too late."""
        assert operation in OPERATIONS
        error = error or StorageError("storage", f"{operation} fails on purpose")
        self._faults[operation, self.calls[operation] + nth] = (error, answer_lost)

    def _pass(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        self.calls[operation] += 1
        error, answer_lost = self._faults.pop((operation, self.calls[operation]), (None, False))
        if error is None:
            return getattr(self.inner, operation)(*args, **kwargs)
        self.fired.append(operation)
        if answer_lost:
            getattr(self.inner, operation)(*args, **kwargs)
        raise error

    def get(self, *args: Any, **kwargs: Any) -> Any:
        return self._pass("get", *args, **kwargs)

    def exists(self, *args: Any) -> Any:
        return self._pass("exists", *args)

    def size(self, *args: Any) -> Any:
        return self._pass("size", *args)

    def folders(self) -> Any:
        return self._pass("folders")

    def download(self, *args: Any, **kwargs: Any) -> Any:
        return self._pass("download", *args, **kwargs)

    def put(self, *args: Any) -> Any:
        return self._pass("put", *args)

    def create(self, *args: Any) -> Any:
        return self._pass("create", *args)

    def delete(self, *args: Any) -> Any:
        return self._pass("delete", *args)

    def sweep(self, *args: Any) -> Any:
        return self._pass("sweep", *args)


Honest = Callable[[], Response]  # asks moto


@dataclass
class Trouble:
    """What is wrong with the server for the time being.

    Attributes:
        act: answers a request in place of moto, which it may ask.
        where: tells which requests it concerns.
        times: how many of them.
        fired: how many it has answered so far.
        over: set when it ends; what hangs goes on then.
    """

    act: Callable[[Trouble, Request, Honest], Response]
    where: Callable[[Request], bool]
    times: float
    fired: int = 0
    over: threading.Event = field(default_factory=threading.Event)


def refuse(status: str, code: str = "", **headers: str) -> Callable[..., Response]:
    """Answer with an error as S3 spells it, such as refuse("503 Slow Down", "SlowDown", Retry_After="1")."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>On purpose.</Message></Error>'

    def act(trouble: Trouble, request: Request, honest: Honest) -> Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return Response(body if code else b"", status, names, content_type="application/xml")

    return act


def hang(trouble: Trouble, request: Request, honest: Honest) -> Response:
    """Say nothing until the trouble is over, then drop the connection."""
    trouble.over.wait()
    request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


def cut_short(trouble: Trouble, request: Request, honest: Honest) -> Response:
    """Announce the whole body, and send the first half of it."""
    response = honest()
    length = response.headers["Content-Length"]
    response.set_data(response.get_data()[: int(length) // 2])
    response.headers["Content-Length"] = length
    return response


def reset_in_the_middle(trouble: Trouble, request: Request, honest: Honest) -> Response:
    """Send the first half of the body, then reset the connection."""
    response = cut_short(trouble, request, honest)
    half = response.get_data()

    def body() -> Iterator[bytes]:
        yield half
        connection = request.environ["werkzeug.socket"]
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()  # with a reset, once the handler lets go of it
        raise ConnectionResetError

    response.response = body()
    return response


def answer_with(body: bytes) -> Callable[..., Response]:
    """Answer a read with another body than the one that is there, one from earlier for instance."""

    def act(trouble: Trouble, request: Request, honest: Honest) -> Response:
        response = honest()
        response.set_data(body)
        return response

    return act


def ignore_condition(trouble: Trouble, request: Request, honest: Honest) -> Response:
    """Write whatever is there already, as servers do that do not know If-None-Match."""
    del request.environ["HTTP_IF_NONE_MATCH"]
    return honest()


def reading(part: str = "") -> Callable[[Request], bool]:
    """Requests that read an object with `part` in its key."""
    return lambda request: request.method in ("GET", "HEAD") and part in request.path


def writing(part: str = "") -> Callable[[Request], bool]:
    """Requests that write an object with `part` in its key."""
    return lambda request: request.method in ("PUT", "POST") and part in request.path


def conditional(request: Request) -> bool:
    """Writes that are to happen only if nothing is there."""
    return "If-None-Match" in request.headers


class S3Server:
    """moto's S3 on a free port, one request at a time, as S3's conditional puts are atomic and moto's not."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self._address = address
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()  # of moto
        self._troubles: list[Trouble] = []
        self._choosing = threading.Lock()  # of `_troubles`, and what is in them
        self._next = Trouble(refuse(""), lambda request: True, 0)
        self._server = make_server(address, 0, self._serve, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://{address}:{self._server.server_port}"

    @contextmanager
    def trouble(
        self,
        act: Callable[[Trouble, Request, Honest], Response],
        where: Callable[[Request], bool] = lambda request: True,
        times: float = float("inf"),
    ) -> Iterator[Trouble]:
        """Let `act` answer requests while the context lasts; of several that concern a request, the latest does."""
        trouble = Trouble(act, where, times)
        with self._choosing:
            self._troubles.insert(0, trouble)
        try:
            yield trouble
        finally:
            with self._choosing:
                self._troubles.remove(trouble)
            trouble.over.set()

    def fail_next(self, count: int, status: str = "503 Slow Down") -> None:
        """Answer the next `count` requests with an error; `failed` counts those that were."""
        self._next = Trouble(refuse(status), lambda request: True, count)

    @property
    def failed(self) -> int:
        return self._next.fired

    def client(self) -> Any:
        keys = {"aws_access_key_id": "loopback-access-key", "aws_secret_access_key": "loopback-secret-key"}
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", config=Config(proxies={}), **keys)

    def environment(self) -> dict[str, str]:
        """What a process needs to reach it."""
        place = {"AWS_ENDPOINT_URL": self.url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
        return {**place, **CREDENTIALS, "NO_PROXY": self._address, "no_proxy": self._address}

    def bucket(self) -> str:
        """The name of a new bucket."""
        name = f"bucket-{uuid.uuid4().hex}"
        self.client().create_bucket(Bucket=name)
        return name

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        request = Request(environ)
        environ["wsgi.input"] = BytesIO(request.get_data())  # so that a trouble may look at it, and moto too
        trouble = self._concerning(request)
        response = (
            self._honest(environ) if trouble is None else trouble.act(trouble, request, lambda: self._honest(environ))
        )
        return response(environ, start_response)

    def _honest(self, environ: dict[str, Any]) -> Response:
        with self._lock:
            return Response.from_app(self._app, environ, buffered=True)

    def _concerning(self, request: Request) -> Trouble | None:
        with self._choosing:
            for trouble in (self._next, *self._troubles):
                if trouble.fired < trouble.times and trouble.where(request):
                    trouble.fired += 1
                    return trouble
        return None


class _Quiet(WSGIRequestHandler):
    def log(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket's URL, with the environment that reaches it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket()}/some/prefix"


@pytest.fixture
def folder_objects(tmp_path: Path) -> Objects:
    return Objects(str(tmp_path / "store"))


@pytest.fixture
def memory_objects() -> Objects:
    return Objects.over(MemoryStore())


@pytest.fixture
def s3_objects(s3_url: str) -> Objects:
    return Objects(s3_url, timeout=10)


@pytest.fixture
def failing_objects(memory_objects: Objects) -> FailingObjects:
    return FailingObjects(memory_objects)


@pytest.fixture(params=["folder", "memory", "s3", "failing"])
def objects(request: pytest.FixtureRequest) -> Objects:
    """Each store in turn; the failing one with no fault armed."""
    return request.getfixturevalue(f"{request.param}_objects")


def make_manifest(data: bytes = b"payload", /, **changes: Any) -> Manifest:
    """A valid manifest of the payload `data`, with changes."""
    update = changes.get("update", 100)
    manifest = Manifest(
        run="run",
        peer=0,
        incarnation=1,
        sequence=1,
        update=update,
        epoch=2,
        final=False,
        payload=f"{update}-a1b2c3d4.safetensors",
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        dtype="float32",
        fingerprint="f" * 64,
        init_hash="0" * 64,
        metrics={"loss": 1.5},
        architecture={"name": "linear", "arguments": {"width": 3}},
    )
    return replace(manifest, **changes)


def make_latest(manifest: Manifest | None = None, **changes: Any) -> Latest:
    """A valid latest.json, with changes."""
    latest = Latest(
        peer=0,
        run="run",
        incarnation=1,
        token="a" * 64,
        heartbeat=7,
        resume_floor=50,
        closed=False,
        manifest=manifest,
        retained=(),
    )
    return replace(latest, **changes)

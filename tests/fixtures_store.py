"""Stores to test against: a folder, memory, S3 (moto's server on loopback), and one that fails on purpose.

Import the fixtures that a test file needs by name. `s3_url` sets the usual AWS_* environment, which processes started
by the test inherit.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from obstore.store import MemoryStore
from werkzeug.serving import WSGIRequestHandler, make_server

from codistill.exchange.errors import StorageError
from codistill.exchange.manifest import Latest, Manifest
from codistill.exchange.objects import Objects

OPERATIONS = ("get", "exists", "download", "put", "create", "delete")
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

    def download(self, *args: Any, **kwargs: Any) -> Any:
        return self._pass("download", *args, **kwargs)

    def put(self, *args: Any) -> Any:
        return self._pass("put", *args)

    def create(self, *args: Any) -> Any:
        return self._pass("create", *args)

    def delete(self, *args: Any) -> Any:
        return self._pass("delete", *args)

    def close(self) -> None:
        self.inner.close()


class S3Server:
    """moto's S3 on a free loopback port, one request at a time, as S3's conditional puts are atomic and moto's not."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._failures: list[str] = []
        self.failed = 0
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fail_next(self, count: int, status: str = "503 Slow Down") -> None:
        """Answer the next `count` requests with an error; `failed` counts those that were."""
        self._failures = [status] * count
        self.failed = 0

    def client(self) -> Any:
        keys = {"aws_access_key_id": "loopback-access-key", "aws_secret_access_key": "loopback-secret-key"}
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", config=Config(proxies={}), **keys)

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        with self._lock:
            if self._failures:
                self.failed += 1
                start_response(self._failures.pop(), [("Content-Length", "0")])
                return [b""]
            return list(self._app(environ, start_response))


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
    environment = {"AWS_ENDPOINT_URL": s3_server.url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    for name, value in {**environment, **CREDENTIALS, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex}"
    s3_server.client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/prefix"


@pytest.fixture
def folder_objects(tmp_path: Path) -> Iterator[Objects]:
    objects = Objects(str(tmp_path / "store"))
    yield objects
    objects.close()


@pytest.fixture
def memory_objects() -> Iterator[Objects]:
    objects = Objects.over(MemoryStore())
    yield objects
    objects.close()


@pytest.fixture
def s3_objects(s3_url: str) -> Iterator[Objects]:
    objects = Objects(s3_url, timeout=10)
    yield objects
    objects.close()


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

"""Faults at named steps of the exchange, armed by a test and fired in the process that takes the step.

`Faults` wraps the product's own functions by name while it is entered: the product knows nothing of it. A fault is told
of in a log before it acts, so that even a process which it kills has told of it; a test asserts that it fired.

Kinds: fail (raise what would really be raised there), lose (do it, then say that it failed), stall, kill (SIGKILL to
this process), stale (do nothing and answer as the last time: a read sees what was there before, a write or a delete is
acknowledged and lost), truncate and flip (damage what is written, or what was read).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codistill.exchange import publisher
from codistill.exchange.checkpoint import peer_modules
from codistill.exchange.errors import StorageError
from codistill.exchange.objects import Objects
from codistill.exchange.snapshot import HostBuffer, Template
from codistill.workers import Workers, WorkersLost

FLIPS = 3
_WRITE = ("fail", "lose", "stall", "truncate", "flip", "stale", "kill")
_READ = ("fail", "stall", "truncate", "flip", "stale", "kill")
KINDS: Mapping[str, tuple[str, ...]] = {
    "claim": (
        "fail",
        "stall",
        "truncate",
        "flip",
        "kill",
    ),  # being one peer of a run: terms, claims, our own latest.json
    # publishing, in its order
    "copy": ("fail", "stall", "flip", "kill"),
    "hash": ("fail", "stall", "flip", "stale", "kill"),
    "payload put": _WRITE,
    "manifest put": _WRITE,
    "latest put": _WRITE,
    "prune": ("fail", "lose", "stall", "stale", "kill"),
    # fetching, in its order
    "latest get": _READ,
    "manifest get": _READ,
    "payload get": _READ,
    "verify": ("fail", "stall", "truncate", "flip", "kill"),
    "meeting": ("fail", "stall", "kill"),
    "map": ("fail", "stall", "kill"),
    "swap": ("fail", "stall", "flip", "kill"),
}
PUBLISHING = tuple(KINDS)[:7]


@dataclass(frozen=True)
class Fault:
    """What shall happen to the calls number `nth` to `nth + times - 1` of a point; `seconds` is how long to stall."""

    point: str
    kind: str
    nth: int = 1
    times: float = 1
    seconds: float = 0.3


class _Inside(threading.local):
    """Whether this thread is inside a step."""

    step = False


class Faults:
    """Faults of this process.

    Attributes:
        update: what the log says of when a fault fired; set by whoever trains.
    """

    def __init__(self, log: Path, *, peer: int = 0, faults: Iterable[Fault] = (), counting: bool = True) -> None:
        """Nothing is wrapped before it is entered.

        Args:
            log: where fired faults are told, a line each.
            peer: our own number; looking at our own documents is not fetching.
            faults: what is armed.
            counting: whether calls count, and faults fire, from the beginning; otherwise from `begin` on.
        """
        self.update = 0
        self._log, self._peer, self._counting = log, peer, counting
        self._armed: dict[str, list[Fault]] = {}
        self._calls: Counter[str] = Counter()
        self._last: dict[tuple[str, str], Any] = {}  # what a point answered last, for each peer's documents
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._inside = _Inside()
        self._unwrap: list[Callable[[], None]] = []
        for fault in faults:
            self.arm(fault)

    def at(self, point: str, kind: str, nth: int = 1, times: float = 1, seconds: float = 0.3) -> None:
        """Arm a fault: see `Fault`; calls are counted from the start, each point's on its own."""
        self.arm(Fault(point, kind, nth, times, seconds))

    def arm(self, fault: Fault) -> None:
        """Arm a fault."""
        assert fault.kind in KINDS[fault.point], fault
        with self._lock:
            self._armed.setdefault(fault.point, []).append(fault)

    def begin(self) -> None:
        """Count calls from now on."""
        self._counting = True

    def release(self) -> None:
        """End every stall, now and later."""
        self._released.set()

    def fired(self) -> list[tuple[str, str]]:
        """Point and kind of every fault that fired, in this process or another one with our log."""
        return [(line["point"], line["kind"]) for line in read_log(self._log)]

    def __enter__(self) -> Faults:
        for owner, name, step in _STEPS:
            original = getattr(owner, name)
            setattr(owner, name, self._wrapped(original, step))
            self._unwrap.append(lambda owner=owner, name=name, original=original: setattr(owner, name, original))
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
        while self._unwrap:
            self._unwrap.pop()()

    def _wrapped(self, original: Callable[..., Any], step: Callable[..., str | None]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            point = step(self._peer, *args, **kwargs)
            if point is None or self._inside.step:
                return original(*args, **kwargs)
            self._inside.step = True  # what it calls itself, such as a look before a write, is part of it
            try:
                about = (point, _whose(args))
                answer = self._step(point, about, original, args, kwargs)
                self._last[about] = _kept(point, answer, args)
                return answer
            finally:
                self._inside.step = False

        return call

    def _step(self, point: str, about: tuple[str, str], original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        fault = self._due(point, about in self._last)
        if fault is None:
            return original(*args, **kwargs)
        if fault.kind == "stale":
            return _again(point, self._last[about], args)
        return self._act(fault, original, args, kwargs)

    def _due(self, point: str, answered: bool) -> Fault | None:
        """The fault that this call of `point` meets, if any, told of; `answered`: there is a last answer to give."""
        with self._lock:
            if not self._counting:
                return None
            self._calls[point] += 1
            call = self._calls[point]
            for fault in self._armed.get(point, ()):
                if fault.nth <= call < fault.nth + fault.times and (answered or fault.kind != "stale"):
                    self._tell(fault, call)
                    return fault
        return None

    def _tell(self, fault: Fault, call: int) -> None:
        line = {"point": fault.point, "kind": fault.kind, "call": call, "update": self.update, "time": time.time()}
        with open(self._log, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _act(self, fault: Fault, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if fault.kind == "fail":
            raise _error(fault.point)
        if fault.kind == "lose":
            original(*args, **kwargs)
            raise _error(fault.point)
        if fault.kind == "stall":
            self._released.wait(fault.seconds)
            return original(*args, **kwargs)
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        damage = _Damage(fault.kind, f"{fault.point} {self._calls[fault.point]}")
        return _DAMAGED[fault.point](damage, original, *args, **kwargs)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The faults that fired, as they were told: point, kind, call, update, time."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class _Damage:
    """Truncates bytes, or flips some of their bits; the same places for the same `seed`."""

    def __init__(self, kind: str, seed: str) -> None:
        self._kind, self._random = kind, random.Random(seed)

    def __call__(self, data: bytes, first: int | None = None) -> bytes:
        """`data` damaged; with `first`, within that many bytes of it."""
        if self._kind == "truncate":
            return data[: self._random.randrange(len(data))] if data else data
        spoilt = bytearray(data)
        for place in self._random.sample(range(min(len(spoilt), first or len(spoilt))), FLIPS):
            spoilt[place] ^= 1 << self._random.randrange(8)
        return bytes(spoilt)


def _error(point: str) -> Exception:
    """What is raised where `point` really fails."""
    if point in ("copy", "map", "swap"):
        return RuntimeError(f"out of memory at {point}, on purpose")
    if point == "hash":
        return MemoryError(f"out of memory at {point}, on purpose")
    if point == "verify":
        return OSError(5, f"input/output error at {point}, on purpose")
    if point == "meeting":
        return WorkersLost("the workers of this peer could not meet: on purpose")
    return StorageError("storage", f"{point} failed on purpose")


_PEER = re.compile(r".*/peers/\d+/")
_LATEST = re.compile(r".*/peers/(\d+)/latest\.json")
_MANIFEST = re.compile(r".*/peers/(\d+)/\d+/\d+\.json")


def _put(peer: int, objects: Objects, key: str, data: Any) -> str:
    if key.endswith(".safetensors"):
        return "payload put"
    if _LATEST.fullmatch(key):
        return "latest put"
    return "manifest put" if _MANIFEST.fullmatch(key) else "claim"


def _get(peer: int, objects: Objects, key: str, *, limit: int) -> str:
    for point, pattern in (("latest get", _LATEST), ("manifest get", _MANIFEST)):
        found = pattern.fullmatch(key)
        if found and int(found[1]) != peer:
            return point
    return "claim"


def _open(peer: int, template: Template, path: Path, *, verified: bool = False) -> str:
    return "map" if verified else "verify"


def _meet(peer: int, workers: Workers, values: Any) -> str | None:
    return "meeting" if workers.size > 1 else None


# Where each step is wrapped, and which point a call of it is, if any.
_STEPS: tuple[tuple[Any, str, Callable[..., str | None]], ...] = (
    (HostBuffer, "fill", lambda *args: "copy"),
    (publisher, "digest", lambda *args: "hash"),
    (Objects, "create", _put),
    (Objects, "put", _put),
    (Objects, "delete", lambda *args: "prune"),
    (Objects, "sweep", lambda *args: "prune"),
    (Objects, "exists", lambda *args: "claim"),
    (Objects, "get", _get),
    (Objects, "download", lambda *args, size: "payload get"),
    (Template, "open", _open),
    (Workers, "share", _meet),
    (Workers, "minimum", _meet),
    (peer_modules, "load", lambda *args: "swap"),
)


def _whose(args: tuple[Any, ...]) -> str:
    """Whose documents a call of the store's is about."""
    found = _PEER.match(args[1]) if len(args) > 1 and isinstance(args[1], str) else None
    return found[0] if found else ""


def _kept(point: str, answer: Any, args: tuple[Any, ...]) -> Any:
    """What it takes to give `answer` again: a download's is a file."""
    if point == "payload get" and answer is not None:
        return answer, args[2].read_bytes()
    return None if point == "verify" else answer


def _again(point: str, kept: Any, args: tuple[Any, ...]) -> Any:
    if point == "payload get" and kept is not None:
        args[2].write_bytes(kept[1])
        return kept[0]
    return kept


def _damaged_copy(damage: _Damage, fill: Any, buffer: HostBuffer, state: Mapping[str, Tensor]) -> None:
    fill(buffer, state)
    _damage_tensors(damage, buffer.tensors())


def _damaged_hash(damage: _Damage, digest: Any, payload: memoryview) -> str:
    return digest(memoryview(damage(bytes(payload))))


def _damaged_put(damage: _Damage, put: Any, objects: Objects, key: str, data: Any) -> Any:
    return put(objects, key, damage(bytes(data)))


def _damaged_claim(damage: _Damage, call: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs:
        return _damaged_get(damage, call, *args, **kwargs)
    return _damaged_put(damage, call, *args) if len(args) == 3 else call(*args)


def _damaged_get(damage: _Damage, get: Any, objects: Objects, key: str, *, limit: int) -> bytes | None:
    data = get(objects, key, limit=limit)
    return None if data is None else damage(data)


def _damaged_download(damage: _Damage, download: Any, objects: Objects, key: str, path: Path, *, size: int) -> Any:
    if download(objects, key, path, size=size) is None:
        return None
    data = damage(path.read_bytes())
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _damaged_open(damage: _Damage, open_: Any, template: Template, path: Path, **kwargs: Any) -> Any:
    """In the header: damage to a number on this machine's disk, after the hash was compared, is for nobody to see."""
    data = path.read_bytes()
    path.write_bytes(damage(data, first=8 + int.from_bytes(data[:8], "little")))
    return open_(template, path, **kwargs)


def _damaged_load(damage: _Damage, load: Any, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    load(state, tensors)
    _damage_tensors(damage, state)


def _damage_tensors(damage: _Damage, tensors: Mapping[str, Tensor]) -> None:
    """In the exponents, where it matters: weights become huge, infinite or NaN."""
    largest = max((t for t in tensors.values() if t.dtype == torch.float32), key=lambda tensor: tensor.numel())
    with torch.no_grad():
        for bits in largest.view(torch.int32).flatten().split(largest.numel() // FLIPS):
            bits[:1] ^= 1 << 30


_DAMAGED: Mapping[str, Callable[..., Any]] = {
    "claim": _damaged_claim,
    "copy": _damaged_copy,
    "hash": _damaged_hash,
    "payload put": _damaged_put,
    "manifest put": _damaged_put,
    "latest put": _damaged_put,
    "latest get": _damaged_get,
    "manifest get": _damaged_get,
    "payload get": _damaged_download,
    "verify": _damaged_open,
    "swap": _damaged_load,
}

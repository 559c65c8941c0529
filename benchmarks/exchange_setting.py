"""What the question `exchange` trains and whom it exchanges with.

One peer is real, a `Codistiller` around a Transformer of a given size. The other is made of snapshots that were put on
the store beforehand: one small put announces the next of them, so that nothing but the measured peer's own work runs
while something is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codistill import CodistillConfig, Codistiller, fingerprint
from codistill.exchange.manifest import Latest, Manifest, Reference
from codistill.exchange.objects import Objects
from codistill.exchange.publisher import digest
from codistill.exchange.snapshot import HostBuffer
from codistill.exchange.store import RunStore

INTERVAL = 100
WAIT_SECONDS = 120.0
KEPT = 2  # announced snapshots that stay on the store
OUTPUT = fingerprint(1)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Transformer encoder; 12 tensors a layer, from a bias of `width` values to a matrix of 4 `width`²."""

    megabytes: int
    width: int
    layers: int

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(self.width, 8, 4 * self.width, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, self.layers, enable_nested_tensor=False)


SHAPES = {
    shape.megabytes: shape
    for shape in (Shape(10, 256, 3), Shape(100, 512, 8), Shape(300, 1024, 6), Shape(1000, 1024, 20))
}


class Elsewhere:
    """Peer 1: snapshots on the store, announced one by one; `announced` counts them."""

    def __init__(self, url: str, run_id: str, state: dict[str, torch.Tensor]) -> None:
        self._store, self._state = RunStore(Objects(url), run_id), state
        self._buffer = HostBuffer(state, "float32")
        self._buffer.fill(state)
        self._prepared: deque[Manifest] = deque()
        self._announced: deque[Reference] = deque()
        self._sequence = self.announced = 0

    def prepare(self, count: int = 1) -> None:
        """Put further snapshots on the store, each a little different, and forget old ones."""
        for _ in range(count):
            self._sequence += 1
            next(iter(self._buffer.tensors().values())).add_(1)
            payload = self._buffer.view()
            manifest = Manifest(
                run=self._store.run,
                peer=1,
                incarnation=1,
                sequence=self._sequence,
                update=self._sequence,
                epoch=1,
                final=False,
                payload=f"{self._sequence}-0000.safetensors",
                bytes=len(payload),
                sha256=digest(payload),
                dtype="float32",
                fingerprint=OUTPUT,
                init_hash="0" * 64,
                metrics={},
                architecture=None,
            )
            self._store.put_snapshot(manifest, payload)
            self._prepared.append(manifest)
        while len(self._announced) > KEPT:
            self._store.delete(1, [self._announced.popleft()])

    def announce(self) -> None:
        """Name the next prepared snapshot as the newest."""
        manifest = self._prepared.popleft()
        self.announced += 1
        self._announced.append(manifest.reference)
        self._store.put_latest(
            Latest(
                peer=1,
                run=self._store.run,
                incarnation=1,
                token="0" * 64,
                heartbeat=manifest.sequence,
                resume_floor=0,
                closed=False,
                manifest=manifest,
                retained=tuple(self._announced),
            )
        )


class Scene:
    """The measured peer: its model and codistiller, at the boundaries' updates."""

    def __init__(self, shape: Shape, device: str, folder: Path) -> None:
        self.folder = folder
        self.model = shape.build(seed=1).to(device)
        self.codistiller = Codistiller(
            CodistillConfig(dir=f"{folder}/exchange", peer=0, interval=INTERVAL),
            model=self.model,
            build_peer=lambda: shape.build(seed=0).to(device),
            fingerprint=OUTPUT,
            save_dir=folder / "0",
        )
        self.other = shape.build(seed=2).to(device)
        self.elsewhere = Elsewhere(f"{folder}/exchange", self.codistiller.config.run_id, self.other.state_dict())
        self.nbytes = HostBuffer(self.model.state_dict(), "float32").nbytes
        self.update = self._boundaries = 0
        self.codistiller.begin_update(0, epoch=1)

    def exchange(self) -> None:
        """Begin the next update at a boundary."""
        self._boundaries += 1
        self.update += INTERVAL - self.update % INTERVAL
        self.codistiller.begin_update(self.update, epoch=1)

    def go_on(self) -> None:
        """Begin the next update."""
        self.update += 1
        self.codistiller.begin_update(self.update, epoch=1)

    def fetched(self, action: Callable[[], object]) -> float:
        """Do what makes a snapshot come, and wait until it lies verified here; CPU seconds that took."""
        return self._awaited("received", action)

    def published(self, action: Callable[[], object]) -> float:
        """Do what makes a snapshot go, and wait until it is stored; CPU seconds that took behind `action`'s back."""
        return self._awaited("sent", action)

    def rest(self) -> None:
        """Wait until what was published is stored, what was announced is here, and nothing else is going on."""
        self._wait(
            lambda now: (
                now["sent"] == (self._boundaries - now["skipped"]) * self.nbytes
                and now["received"] == self.elsewhere.announced * self.nbytes
            )
        )

    def require_uptake(self) -> None:
        """At the last boundary a new snapshot was taken up."""
        now = self.codistiller.metrics()
        if now["peers"] != 1 or now["staleness"] or now["incidents"] or now["skipped"]:
            raise RuntimeError(f"this was no exchange: {now}")

    def _awaited(self, counter: str, action: Callable[[], object]) -> float:
        before = self.codistiller.metrics()[counter]
        action()
        began = time.process_time()
        self._wait(lambda now: now[counter] > before)
        return time.process_time() - began

    def _wait(self, done: Callable[[dict[str, float]], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not done(self.codistiller.metrics()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"this takes longer than {WAIT_SECONDS:.0f} s: {self.codistiller.metrics()}")
            time.sleep(0.05)
        _rest()


@contextlib.contextmanager
def scene(shape: Shape, device: str) -> Iterator[Scene]:
    """A peer that has published once and taken up one snapshot."""
    with tempfile.TemporaryDirectory() as folder:
        found = Scene(shape, device, Path(folder))
        try:
            found.elsewhere.prepare()
            found.fetched(found.elsewhere.announce)
            found.published(found.exchange)
            found.require_uptake()
            yield found
        finally:
            found.codistiller.close()


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _rest() -> None:
    """Wait until no thread of this process has anything to do, but for a poll now and then."""
    busy = True
    while busy:
        before = time.process_time()
        time.sleep(0.25)
        busy = time.process_time() - before > 0.02


@contextlib.contextmanager
def timed(owner: Any, name: str) -> Iterator[list[float]]:
    """Seconds of each call of a method."""
    original, found = getattr(owner, name), []

    def method(*args: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*args, **named)
        finally:
            found.append(time.perf_counter() - began)

    setattr(owner, name, method)
    try:
        yield found
    finally:
        setattr(owner, name, original)

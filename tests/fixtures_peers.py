"""Peers of a run, several of them in one process: tiny modules, their codistillers, and parts of an exchange.

Import the fixtures that a test file needs by name. `quick_exchange` shortens the pauses of the background threads and
gives snapshots on this machine a folder of the test's own; it fails a test that leaves threads or files behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codistill import CodistillConfig, Codistiller
from codistill.exchange import heartbeat, membership, publisher
from codistill.exchange.checkpoint import fetcher
from codistill.exchange.manifest import Latest, Manifest, Reference
from codistill.exchange.membership import Identity, Membership
from codistill.exchange.objects import Objects
from codistill.exchange.publisher import Publisher
from codistill.exchange.snapshot import HostBuffer, Template
from codistill.exchange.store import RunStore
from codistill.meters import Incidents
from tests.fixtures_store import make_latest, make_manifest

CLASSES = 5
NOWHERE = Path("/nowhere")  # a save dir that remembers nothing
FINGERPRINT = "f" * 64
RUN = "run"


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What `condition` gives once it is true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.005)
    return found


def codistill_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("codistill")}


@pytest.fixture
def quick_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Short pauses, and a temporary folder of the test's own, which it returns."""
    folder = tmp_path / "machine"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(fetcher, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(publisher, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(membership.Membership.join, "__defaults__", (0.5,))
    before = codistill_threads()
    yield folder
    until(lambda: codistill_threads() <= before, 5)
    assert list(folder.iterdir()) == []


def options(**changes: Any) -> CodistillConfig:
    """A valid config of two peers, with changes."""
    return CodistillConfig(**{"dir": "unused", "run_id": RUN, "interval": 2, "timeout": 10.0, **changes})


def identity(start: int = 0) -> Identity:
    """An output space, and initial weights that differ by `start`."""
    return Identity(FINGERPRINT, f"{start:064x}")


def like(template: Template) -> Callable[[Any], Template]:
    """What a fetcher is told when every peer's snapshot must look like `template`, whatever its manifest says."""
    return lambda architecture: template


class Tiny(nn.Module):
    """Parameters, a tied one, a buffer that training changes, and dropout that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(6, CLASSES)
        self.also_out = self.out

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.also_out(self.dropout(self.norm(self.embed(inputs))))
        return logits


class Peer:
    """One training job: a module, plain SGD on random batches, and a codistiller."""

    def __init__(
        self,
        folder: Path,
        peer: int = 0,
        *,
        seed: int | None = None,
        fingerprint: str = FINGERPRINT,
        save_dir: str | None = None,
        model: nn.Module | None = None,
        architecture: Mapping[str, Any] | None = None,
        build_unlike: Callable[[str, Mapping[str, Any]], nn.Module] | None = None,
        **changes: Any,
    ) -> None:
        self.save_dir = folder / (save_dir or f"peer{peer}")
        self.save_dir.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(peer if seed is None else seed)
        self.model = model or Tiny()
        self.data = torch.Generator().manual_seed(100 + peer)
        self.update = 0
        self.built = 0
        self.losses: list[float] = []
        config = options(**{"dir": str(folder / "store"), "peer": peer, **changes})
        self.codistiller = Codistiller(
            config,
            model=self.model,
            build_peer=self.build_peer,
            fingerprint=fingerprint,
            save_dir=self.save_dir,
            architecture=architecture,
            build_unlike=build_unlike,
        )

    def build_peer(self) -> nn.Module:
        self.built += 1
        return Tiny()

    def step(self, times: int = 1) -> None:
        """Train for `times` updates."""
        for _ in range(times):
            inputs = torch.randn(8, 4, generator=self.data)
            target = torch.randint(CLASSES, (8,), generator=self.data)
            self.codistiller.begin_update(self.update, epoch=1)
            logits = self.model(inputs)
            loss = nn.functional.cross_entropy(logits, target)
            if self.codistiller.active:
                found = self.codistiller.penalty(logits, lambda peer, inputs=inputs: peer(inputs))
                loss = loss + self.codistiller.alpha * found.loss / len(inputs)
            self.model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter -= 0.05 * parameter.grad
            self.losses.append(loss.item())
            self.update += 1

    def step_until(self, condition: Callable[[], Any], limit: int = 2000) -> None:
        """Train until something has happened, a little slower than the background works."""
        for _ in range(limit):
            if condition():
                return
            self.step()
            time.sleep(0.01)
        raise AssertionError("what was waited for did not happen")

    def metrics(self) -> dict[str, float]:
        return self.codistiller.metrics()

    def causes(self) -> dict[str, int]:
        return dict(self.codistiller._incidents.counts)


def train_side_by_side(peers: Sequence[Peer], updates: Sequence[int]) -> None:
    """Bring each peer to its number of updates, each in a thread of its own; raises what the first to fail raised."""
    failed: list[BaseException] = []

    def run(peer: Peer, goal: int) -> None:
        try:
            peer.step(goal - peer.update)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(peers, updates, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.fixture
def peers(tmp_path: Path, quick_exchange: Path) -> Iterator[Callable[..., Peer]]:
    """Makes `Peer`s over one folder, and closes them at the end."""
    made: list[Peer] = []

    def make(peer: int = 0, **changes: Any) -> Peer:
        made.append(Peer(tmp_path, peer, **changes))
        return made[-1]

    yield make
    for peer in made:
        peer.codistiller.close()


def weights(seed: int, **changes: Tensor) -> dict[str, Tensor]:
    """A small state dict."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        "a": torch.randn(3, 4, generator=generator),
        "b": torch.arange(5),
        "c": torch.randn(7, generator=generator),
    }
    return {**state, **changes}


@dataclass
class Writer:
    """A hand-driven peer on the store: writes snapshots and `latest.json`, honest or not."""

    store: RunStore
    peer: int = 1
    incarnation: int = 1
    heartbeat: int = 0
    sequence: int = 0
    retained: tuple[Reference, ...] = ()

    def snapshot(
        self, state: Mapping[str, Tensor], update: int, *, payload: bytes | None = None, **changes: Any
    ) -> Manifest:
        """Store a snapshot; `payload` instead of the true bytes, `changes` to the manifest."""
        buffer = HostBuffer(state, "float32")
        buffer.fill(state)
        honest = bytes(buffer.view())
        self.sequence += 1
        manifest = make_manifest(
            honest,
            **{
                "run": RUN,
                "peer": self.peer,
                "incarnation": self.incarnation,
                "sequence": self.sequence,
                "update": update,
                "init_hash": identity(1).init_hash,
                **changes,
            },
        )
        self.store.put_snapshot(manifest, honest if payload is None else payload)
        self.retained += (Reference(manifest.incarnation, manifest.update, manifest.sequence),)
        return manifest

    def announce(self, manifest: Manifest | None, **changes: Any) -> Latest:
        """Overwrite `latest.json`."""
        self.heartbeat += 1
        latest = make_latest(
            manifest,
            **{
                "run": RUN,
                "peer": self.peer,
                "incarnation": self.incarnation,
                "heartbeat": self.heartbeat,
                "retained": self.retained,
                "resume_floor": 0,
                **changes,
            },
        )
        self.store.put_latest(latest)
        return latest

    def publish(self, state: Mapping[str, Tensor], update: int, **changes: Any) -> Manifest:
        """An honest publication, unless `changes` say otherwise."""
        manifest = self.snapshot(state, update, **changes)
        self.announce(manifest)
        return manifest


@pytest.fixture
def publishers(memory_objects: Objects, quick_exchange: Path) -> Iterator[Callable[..., Publisher]]:
    """Makes started publishers of peer 0 over `memory_objects`, and closes them at the end."""
    made: list[Publisher] = []

    save_dir = quick_exchange.parent / "publisher"
    save_dir.mkdir(exist_ok=True)

    def make(objects: Objects = memory_objects, *, floor: int = 0, token: str = "a" * 64, **wanted: Any) -> Publisher:
        store = RunStore(objects, RUN)
        on_copy = wanted.pop("on_copy", lambda update, views: {})
        lowest_floor = wanted.pop("lowest_floor", lambda: 0)
        incidents = wanted.pop("incidents", None) or Incidents(fatal=False)
        config = options(**wanted)
        member = Membership(store, 0, token, {}, save_dir)
        made.append(Publisher(store, member, config, identity(), incidents, lowest_floor, on_copy))
        made[-1].start(floor)
        return made[-1]

    yield make
    for one in made:
        one.close(5, ended=False)


_WORKER = """
import json, os, sys
from datetime import timedelta
import torch.distributed as dist
rank, size, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + rendezvous, rank=rank, world_size=size,
                        timeout=timedelta(seconds=60))
answer = {}
exec(compile(sys.stdin.read(), "worker", "exec"))
print(json.dumps(answer), flush=True)
os._exit(0)  # a group with a lost worker could make an orderly end wait
"""


def data_parallel(
    tmp_path: Path, code: str, size: int = 2, *, environments: Sequence[Mapping[str, str]] = (), seconds: float = 120
) -> list[Any]:
    """Run `code` in `size` real processes joined by gloo; what each leaves in the dict `answer`, by rank.

    Args:
        tmp_path: for the file through which the processes find each other.
        code: Python; knows `rank`, `size` and `dist`.
        size: number of workers.
        environments: by rank, what its environment has in addition.
        seconds: the bound on all of it.
    """
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-W", "ignore", "-c", _WORKER]
    processes = []
    try:
        for rank in range(size):
            own = environments[rank] if environments else {}
            process = subprocess.Popen(
                [*command, str(rank), str(size), str(tmp_path / "rendezvous")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **own},
            )
            processes.append(process)
            assert process.stdin is not None
            process.stdin.write(code)
            process.stdin.close()
            process.stdin = None  # communicate() would close it again
        outcomes = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, outcomes, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in outcomes]

"""What do n peers ask of the store, and how stale are they?

Rows: a peer's requests in an interval, as a multiple of those on a ring of two; docs/scaling.md has the rest.

A simulation on the real code: tiny models, each with its codistiller, publisher and fetcher, in one process, over one
temporary folder. Every request to the folder is counted where it leaves for obstore, and takes as long as one to a
store nearby does. Time is stretched or compressed, all pauses alike, so that this machine keeps up; how well it did is
in the table as the share of time that it was late.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import obstore
import torch
from torch import nn

from benchmarks import many_peers_plot
from benchmarks.record import Row
from codistill import CodistillConfig, Codistiller, fingerprint
from codistill.exchange import heartbeat, objects
from codistill.exchange.checkpoint import fetcher

PEERS = (2, 4, 8, 16, 32, 64)
TOPOLOGIES = ("ring", "random-2", "all")
INTERVAL = 20  # updates
INTERVAL_SECONDS = 20.0
REQUEST_SECONDS = 0.02
WARM_UP, MEASURED = 3, 2  # intervals
MOST_REQUESTS = 700.0  # a second, that this machine is asked to serve
MOST_COMPRESSED = 0.1
PAUSES = ((fetcher, "POLL_SECONDS"), (fetcher, "HURRIED_SECONDS"), (heartbeat, "HEARTBEAT_SECONDS"))
TOLERANCE = 0.25


class Counted:
    """Stands where `objects` knows obstore: passes everything on, a little later, and counts it."""

    def __init__(self, request_seconds: float) -> None:
        self._seconds = request_seconds
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(obstore, name)

    def _count(self, kind: str, **more: int) -> None:
        time.sleep(self._seconds)
        with self._lock:
            self.counts.update({kind: 1, **more})

    def get(self, store: Any, key: str) -> Any:
        self._count("get", polls=key.endswith("/latest.json"))
        found = obstore.get(store, key)
        self._add(read=found.meta["size"])
        return found

    def get_range(self, store: Any, key: str, **where: int) -> Any:
        self._count("get", read=where["length"], snapshots=where["length"])
        return obstore.get_range(store, key, **where)

    def head(self, store: Any, key: str) -> Any:
        self._count("head")
        return obstore.head(store, key)

    def put(self, store: Any, key: str, data: Any, **how: Any) -> Any:
        self._count("put", written=memoryview(data).nbytes)
        return obstore.put(store, key, data, **how)

    def delete(self, store: Any, key: str) -> Any:
        self._count("delete")
        return obstore.delete(store, key)

    def _add(self, **more: int) -> None:
        with self._lock:
            self.counts.update(more)

    def so_far(self) -> Counter[str]:
        with self._lock:
            return self.counts.copy()


@dataclasses.dataclass
class Measurement:
    """Of one topology and number of peers; requests and bytes are a peer's in an interval, staleness in intervals."""

    topology: str
    peers: int
    in_use: float
    scale: float
    late: float
    polls: float
    get: float
    head: float
    put: float
    delete: float
    read: float
    written: float
    snapshots: float
    staleness_mean: float
    staleness_max: float
    age_mean: float
    age_max: float
    incidents: int

    @property
    def requests(self) -> float:
        return self.get + self.head + self.put + self.delete


def reads(topology: str, peers: int) -> int:
    return min(peers - 1, {"all": peers - 1, "ring": 1}.get(topology, 2))


def polls_due(neighbours: int) -> float:
    """Polls a second: after each round through the neighbours comes the pause."""
    return neighbours / (0.5 + neighbours * REQUEST_SECONDS)


def tiny(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))


@contextlib.contextmanager
def stretched(scale: float) -> Iterator[Counted]:
    """All pauses, and what a request takes, `scale` times as long."""
    counted = Counted(scale * REQUEST_SECONDS)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(objects, "obstore", counted))
        for module, name in PAUSES:
            stack.enter_context(mock.patch.object(module, name, scale * getattr(module, name)))
        yield counted


class Simulation:
    """Peers whose boundaries are spread over the interval, as those of jobs that started at different times are."""

    def __init__(self, folder: Path, topology: str, peers: int) -> None:
        self.models = [tiny(seed) for seed in range(peers)]
        self.offsets = [peer * INTERVAL // peers for peer in range(peers)]
        random.Random(peers).shuffle(self.offsets)  # neighbours are not next to each other in time
        self.codistillers = [
            Codistiller(
                CodistillConfig(dir=f"{folder}/store", peer=peer, peers=peers, interval=INTERVAL, topology=topology),
                model=model,
                build_peer=lambda: tiny(0),
                fingerprint=fingerprint(10),
                save_dir=folder / str(peer),
            )
            for peer, model in enumerate(self.models)
        ]

    def tick(self, number: int) -> None:
        """One update of every peer that has started."""
        for model, offset, codistiller in zip(self.models, self.offsets, self.codistillers, strict=True):
            if number >= offset:
                with torch.no_grad():
                    model[0].bias += 0.001  # snapshots differ
                codistiller.begin_update(number - offset, epoch=1)

    def in_use(self, number: int) -> list[tuple[int, int]]:
        """Staleness and age, in updates, of every peer that another one uses."""
        found = []
        for offset, codistiller in zip(self.offsets, self.codistillers, strict=True):
            update = number - offset
            for peer, used in codistiller._exchange.in_use(update).items():
                found.append((used.staleness(update), used.gap(update) + offset - self.offsets[peer]))
        return found

    def close(self) -> None:
        threads = [threading.Thread(target=codistiller.close) for codistiller in self.codistillers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def run(simulation: Simulation, counted: Counted, scale: float) -> tuple[list[tuple[int, int]], Counter[str], float]:
    """Staleness and age in every measured update, what was asked of the store meanwhile, and how late that was."""
    samples, before, at = [], Counter[str](), 0.0
    began, update_seconds = time.monotonic(), scale * INTERVAL_SECONDS / INTERVAL
    for number in range((WARM_UP + MEASURED) * INTERVAL + 1):
        time.sleep(max(0.0, began + number * update_seconds - time.monotonic()))
        simulation.tick(number)
        if number == WARM_UP * INTERVAL:
            before, at = counted.so_far(), time.monotonic()
        if number >= WARM_UP * INTERVAL:
            samples += simulation.in_use(number)
    late = (time.monotonic() - at) / (update_seconds * MEASURED * INTERVAL) - 1
    return samples, counted.so_far() - before, late


def simulate(topology: str, peers: int) -> Measurement:
    scale = max(MOST_COMPRESSED, peers * polls_due(reads(topology, peers)) / MOST_REQUESTS)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(tempfile, "tempdir", folder))  # where peers keep what they fetched
        counted = stack.enter_context(stretched(scale))
        simulation = Simulation(Path(folder), topology, peers)
        stack.callback(simulation.close)
        samples, counts, late = run(simulation, counted, scale)
        incidents = sum(codistiller.metrics()["incidents"] for codistiller in simulation.codistillers)
    stale, ages = ([pair[which] / INTERVAL for pair in samples] or [float("nan")] for which in (0, 1))
    kinds = ("polls", "get", "head", "put", "delete", "read", "written", "snapshots")
    return Measurement(
        topology=topology,
        peers=peers,
        in_use=len(samples) / (peers * (MEASURED * INTERVAL + 1)),
        scale=scale,
        late=late,
        staleness_mean=statistics.fmean(stale),
        staleness_max=max(stale),
        age_mean=statistics.fmean(ages),
        age_max=max(ages),
        incidents=int(incidents),
        **{kind: counts[kind] / (peers * MEASURED) for kind in kinds},
    )


def measure(device: str) -> Iterator[Row]:
    torch.set_num_threads(1)
    alone = None
    for topology, peers in itertools.product(TOPOLOGIES, PEERS):
        found = simulate(topology, peers)
        alone = alone or found.requests
        ratio = found.requests / alone
        yield Row(f"{topology}, {peers} peers", ratio, ratio, ratio, details=dataclasses.asdict(found))


def draw(rows: Sequence[Row], folder: Path) -> None:
    many_peers_plot.draw([Measurement(**row.details) for row in rows], INTERVAL_SECONDS, folder / "peers.png")

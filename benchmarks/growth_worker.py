"""What `growth` measures in processes of their own: the memory of a peer, the workers of one, bytes in a namespace.

`python -m benchmarks.growth_worker KIND JSON-ARGUMENTS` prints what it found as JSON on its last line. A peer that does
not hear of the others within `PATIENCE` seconds ends with an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.loopback import carried, switch_on
from codistill import CodistillConfig, Codistiller, fingerprint
from codistill.exchange.checkpoint.meeting import Readiness, meet
from codistill.exchange.snapshot import HostBuffer
from codistill.workers import Workers

PATIENCE = 120.0
QUIET_SECONDS = 10.0  # two heartbeats
MEETINGS = 100
NEXT = "next\n"  # what a process says when the other peers are to publish again


@dataclasses.dataclass(frozen=True)
class Layers:
    """A network of so many megabytes in 16 equal layers: an exchange does not care what it carries."""

    megabytes: float

    @property
    def width(self) -> int:
        return max(8, round((self.megabytes * 1e6 / 4 / 16) ** 0.5))

    @property
    def nbytes(self) -> int:
        """Of a model."""
        return 4 * 16 * self.width * (self.width + 1)

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [part for _ in range(16) for part in (nn.Linear(self.width, self.width), nn.ReLU())]
        return nn.Sequential(*layers[:-1])


class Learner:
    """One of `Layers` with a loss and SGD. `workloads.Training` would bring timm and fairseq into each process."""

    def __init__(self, layers: Layers, seed: int, device: str = "cpu") -> None:
        self.layers, self.device = layers, device
        self.model = layers.build(seed).to(device)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self._inputs = torch.randn(8, layers.width, device=device)

    def joins(self, url: str, folder: Path, number: int, peers: int, **options: Any) -> Codistiller:
        """Become peer `number`; every update is a boundary, unless `options` say otherwise."""
        return Codistiller(
            CodistillConfig(dir=url, peer=number, peers=peers, **{"interval": 1, **options}),
            model=self.model,
            build_peer=lambda: self.layers.build(seed=0).to(self.device),
            fingerprint=fingerprint(self.layers.width),
            save_dir=folder / f"peer{number}",
        )

    def update(self, codistiller: Optional[Codistiller] = None) -> None:
        self._optimizer.zero_grad()
        logits = self.model(self._inputs)
        loss = logits.square().mean()
        if codistiller is not None and codistiller.active:
            loss = loss + codistiller.penalty(logits, lambda peer: peer(self._inputs)).loss / len(logits)
        loss.backward()
        self._optimizer.step()

    def nudge(self) -> None:
        """Make the next snapshot another one, as an update would."""
        with torch.no_grad():
            next(self.model.parameters()).mul_(0.999)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.02)


@contextlib.contextmanager
def others(
    layers: Layers, peers: int, url: str, folder: Path, device: str = "cpu"
) -> Iterator[tuple[list[Codistiller], Callable[[], None]]]:
    """Peers 1 and up, in this process; and what has all of them publish new weights and take up what there is."""
    learners = [Learner(layers, 1 + number, device) for number in range(1, peers)]
    codistillers = [learner.joins(url, folder, number, peers) for number, learner in enumerate(learners, 1)]
    updates = itertools.count()

    def publish() -> None:
        update = next(updates)
        for learner, codistiller in zip(learners, codistillers, strict=True):
            learner.nudge()
            codistiller.begin_update(update, epoch=1)

    try:
        publish()
        yield codistillers, publish
    finally:
        for codistiller in codistillers:
            codistiller.close()


def run(kind: str, arguments: Sequence[Sequence[Any]], on_next: Callable[[], None]) -> Any:
    """Start a process for each of `arguments`; what the first one found. `on_next` is called whenever it asks."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.growth_worker", kind]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([*command, json.dumps(each)], stdout=subprocess.PIPE, text=True, env=environment)
        for each in arguments
    ]
    try:
        found = ""
        for line in processes[0].stdout or ():
            if line == NEXT:
                on_next()
            else:
                found = line
        for process in processes:
            if process.wait(PATIENCE):
                raise RuntimeError(f"{kind} {arguments} ended with status {process.returncode}")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return json.loads(found)


# Bytes, in a network namespace


def exchange_bytes(megabytes: float, peers: int, dtype: str, exchanges: int) -> dict[str, Any]:
    """What `lo` carries in an exchange of all peers, the seconds that takes, and what it carries in silence."""
    layers = Layers(megabytes)
    size = HostBuffer(layers.build(0).state_dict(), dtype).nbytes
    with tempfile.TemporaryDirectory() as folder, _s3() as url, contextlib.ExitStack() as stack:
        learners = [Learner(layers, seed=1 + number) for number in range(peers)]
        codistillers = [
            learner.joins(url, Path(folder), number, peers, dtype=dtype) for number, learner in enumerate(learners)
        ]
        for codistiller in codistillers:
            stack.callback(codistiller.close)
        marks = []
        for number in range(2 + exchanges):
            for learner, codistiller in zip(learners, codistillers, strict=True):
                learner.nudge()
                codistiller.begin_update(number, epoch=1)
            until(lambda number=number: _have_exchanged(codistillers, number * size))
            marks.append((carried(), time.monotonic()))
        return {"size": size, "marks": marks[1:], "quiet": _silence()}


def _have_exchanged(codistillers: Sequence[Codistiller], sent: int) -> bool:
    """Whether every peer has put so many bytes on the store, and brought so many of each other peer here."""
    found = [each.metrics() for each in codistillers]
    return all(now["sent"] >= sent and now["received"] >= sent * (len(found) - 1) for now in found)


def interval_bytes(megabytes: float, interval: int, update_seconds: float, intervals: int) -> dict[str, Any]:
    """What `lo` carries from one boundary of two peers to the next, at the pace of a training, but nothing trained."""
    layers = Layers(megabytes)
    with tempfile.TemporaryDirectory() as folder, _s3() as url, contextlib.ExitStack() as stack:
        learners = [Learner(layers, seed=1 + number) for number in (0, 1)]
        codistillers = [
            learner.joins(url, Path(folder), number, 2, interval=interval) for number, learner in enumerate(learners)
        ]
        for codistiller in codistillers:
            stack.callback(codistiller.close)
        marks, began = [], time.monotonic()
        for update in range((1 + intervals) * interval + 1):
            time.sleep(max(0.0, began + update * update_seconds - time.monotonic()))
            if update and update % interval == 0:
                marks.append((carried(), time.monotonic()))
                for learner in learners:
                    learner.nudge()
            for codistiller in codistillers:
                codistiller.begin_update(update, epoch=1)
        return {"size": _snapshot_bytes(layers), "marks": marks, "quiet": _silence()}


def worker_bytes(megabytes: float, workers: int, exchanges: int) -> dict[str, Any]:
    """What `lo` carries from one exchange to the next of a peer with so many workers and a peer with one.

    Polls and heartbeats are left out of what is expected: it is for the snapshots that they are counted.
    """
    marks = []
    with _s3() as url:
        found = of_workers(megabytes, workers, exchanges, url, lambda: marks.append((carried(), time.monotonic())))
    return {**found, "size": _snapshot_bytes(Layers(megabytes)), "marks": marks[1:], "quiet": 0.0}


def of_workers(
    megabytes: float, workers: int, exchanges: int, url: Optional[str] = None, before: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """What worker 0 finds; the other peer is in this process. `before` is called before that one publishes."""
    with tempfile.TemporaryDirectory() as folder:
        url = url or f"{folder}/store"
        with others(Layers(megabytes), 2, url, Path(folder)) as ([other], publish):
            received: list[float] = []

            def on_next() -> None:
                if received:  # else nothing has been published by the workers yet
                    until(lambda: other.metrics()["received"] > received[-1])
                received.append(other.metrics()["received"])
                before()
                publish()

            arguments = [[rank, workers, megabytes, url, folder, exchanges] for rank in range(workers)]
            return run("worker", arguments, on_next)


def _snapshot_bytes(layers: Layers) -> int:
    return HostBuffer(layers.build(0).state_dict(), "float32").nbytes


def _silence() -> float:
    """Bytes a second that `lo` carries while nobody publishes: polls and heartbeats."""
    time.sleep(1)
    before = carried()
    time.sleep(QUIET_SECONDS)
    return (carried() - before) / QUIET_SECONDS


@contextlib.contextmanager
def _s3() -> Iterator[str]:
    from tests.fixtures_store import S3Server

    switch_on()
    server = S3Server()
    os.environ.update(server.environment())
    try:
        yield f"s3://{server.bucket()}/exchange"
    finally:
        server.stop()


# Memory, in a process that is nothing but one peer


def memory(megabytes: float, peers: int, url: str, folder: str, exchanges: int) -> dict[str, Any]:
    """Most bytes resident in plain updates, and in each whole exchange in which all peers' snapshots are taken up."""
    layers = Layers(megabytes)
    learner = Learner(layers, seed=1)
    for _ in range(3):
        _forget_peak()
        learner.update()
    plain, peaks = _peak(), []
    codistiller = learner.joins(url, Path(folder), 0, peers)
    update, received = 0, 0.0
    while len(peaks) < 1 + exchanges:
        codistiller.begin_update(update, epoch=1)
        learner.update(codistiller)
        now = codistiller.metrics()
        if now["peers"] == peers - 1 and now["staleness"] == 0:
            peaks.append(_peak())
        _forget_peak()
        update += 1
        print(NEXT, end="", flush=True)
        wanted = received + (peers - 1) * layers.nbytes
        until(lambda wanted=wanted: codistiller.metrics()["received"] >= wanted)
        received = codistiller.metrics()["received"]
        time.sleep(settling(layers))
    codistiller.close()
    return {"plain": plain, "peaks": peaks[1:], "model": layers.nbytes}


def settling(layers: Layers) -> float:
    """Seconds after which what has been fetched is verified, too."""
    return 0.3 + layers.nbytes / 5e8


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# Workers, one process each


def worker(rank: int, workers: int, megabytes: float, url: str, folder: str, exchanges: int) -> dict[str, Any]:
    """Seconds of a hop, of a meeting, and of the boundaries at which a snapshot is taken up, by this worker's clock."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    layers = Layers(megabytes)
    learner = Learner(layers, seed=1)
    codistiller = learner.joins(url, Path(folder), 0, 2)
    codistiller.begin_update(0, epoch=1)
    group = Workers(timeout=PATIENCE)
    hops = [_hop(rank) for _ in range(MEETINGS)] if workers > 1 else []
    meetings = [_at_once(lambda: meet(group, 1, {1: None}, lambda _: Readiness.READY)) for _ in range(MEETINGS)]
    held: list[float] = []
    for update in itertools.count(1):
        if group.share([len(held) > exchanges])[0]:
            break
        learner.nudge()
        if rank == 0:
            print(NEXT, end="", flush=True)
            received = codistiller.metrics()["received"]
            until(lambda received=received: codistiller.metrics()["received"] > received)
            time.sleep(settling(layers))
        seconds = _at_once(lambda update=update: codistiller.begin_update(update, epoch=1))
        now = codistiller.metrics()
        if now["peers"] and now["staleness"] == 0:
            held.append(seconds)
    codistiller.close()
    group.close()
    dist.destroy_process_group()
    return {"hops": hops, "meetings": meetings, "held": held[1:]}


def _at_once(action: Callable[[], object]) -> float:
    """Seconds it takes when all workers begin at the same time."""
    dist.barrier()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _hop(rank: int) -> float:
    """Half of the way of a few integers from worker 0 to worker 1 and back."""
    word = torch.zeros(9, dtype=torch.int64)
    dist.barrier()
    began = time.perf_counter()
    for sender in (0, 1):
        if rank == sender:
            dist.send(word, 1 - sender)
        elif rank == 1 - sender:
            dist.recv(word, sender)
    return (time.perf_counter() - began) / 2


KINDS = {found.__name__: found for found in (exchange_bytes, interval_bytes, worker_bytes, memory, worker)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(KINDS[sys.argv[1]](*json.loads(sys.argv[2]))), flush=True)

"""How do time, bytes and memory grow with the number of peers, the size of the model, the interval and the workers?

Each row is what was measured over what is expected: 1 where the model of the costs below is right. Everything expected
is put together from pieces measured in the same run (an update, a peer's forward pass, a copy, a hop between two
workers) or from sizes; `expected_…` say how. Bytes are counted on the loopback interface of a network namespace, with a
real S3 server (moto); memory is the peak of a process that is nothing but one peer; workers are processes with gloo.
Networks of 16 equal layers stand for models of every size, except where an update's time matters: resnet18, 8 images.
Bounds: time with one thread; four workers and all peers' background work share the machine's cores.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import growth_plot
from benchmarks.growth_worker import Layers, Learner, of_workers, others, run, settling, until
from benchmarks.loopback import Unavailable, alone
from benchmarks.record import Row, available_memory
from benchmarks.workloads import Training, Vision, exchanging, logits_of, side_by_side
from codistill.exchange import objects
from codistill.exchange.checkpoint.fetcher import POLL_SECONDS
from codistill.exchange.snapshot import HostBuffer, load
from codistill.losses import distill

TOLERANCE = 0.3
PEERS = (2, 3, 4, 6)
MEGABYTES = (1, 10, 100, 300)
LARGE, LARGE_NEEDS = 1000, 14e9  # megabytes, and the bytes of memory that must be free
INTERVALS = {5: 12, 20: 4, 100: 2, 500: 1}  # how many of them are trained
UPDATE_SECONDS = 0.1  # where bytes are counted and nothing trains
COUNTED_SECONDS = 101.0
WORKERS = (1, 2, 4)
NOTHING = 0.01  # megabytes: what is left is the constant
TRAINED = Vision(images=8)
ROUNDS = 12
EXCHANGES = 5
SCALES = {"ms": 1e-3, "%": 0.01, "MB": 1e6, "kB": 1e3}
UNITS = {"peers": "peers {}", "size": "{:g} MB", "interval": "interval {}", "workers": "workers {}"}


def point(
    axis: str,
    what: str,
    unit: str,
    at: float,
    measured: Sequence[float],
    expected: Sequence[float],
    series: str = "",
    **more: Any,
) -> Row:
    """One point of a curve, with the line that is expected; `unit` is a key of `SCALES`."""
    ratios = [found / due for found, due in zip(measured, expected, strict=True)]
    middle = {"measured": statistics.median(measured), "expected": statistics.median(expected)}
    details = {f"{name} {unit}": _digits(value / SCALES[unit]) for name, value in middle.items()}
    name = ", ".join(filter(None, (what, UNITS[axis].format(at), series)))
    return Row.of(name, ratios, details={"point": [axis, what, unit, at, series], **details, **more})


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def draw(rows: Sequence[Row], folder: Path) -> None:
    growth_plot.draw(rows, folder)


def measure(device: str) -> Iterator[Row]:
    torch.set_num_threads(1)
    for peers in (1, *PEERS):
        yield update_time(peers, device)
    beyond = statistics.median(held - copies for held, copies in held_and_copies(NOTHING, device))
    for megabytes in sizes():
        yield held_time(megabytes, beyond, device)
    for interval in INTERVALS:
        yield share_of_time(interval, beyond, device)
    if device != "cpu":
        return  # what follows is of the host, whatever trains
    with ThreadPoolExecutor(len(INTERVALS)) as pool:  # what counts bytes sleeps most of the time
        counting = [pool.submit(interval_bytes, interval) for interval in INTERVALS]
        counting += [pool.submit(exchange_bytes, *place) for place in exchange_points()]
        try:
            yield from memory_rows()
            yield from (each.result() for each in counting)
        except Unavailable as error:
            print(f"  bytes are not counted: {error}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)  # after trouble, or Ctrl-C, no more are begun
    yield from worker_rows()


def sizes() -> Iterator[float]:
    yield from MEGABYTES
    if available_memory() >= LARGE_NEEDS:
        yield LARGE
    else:
        print(f"  {LARGE} MB not measured: less than {LARGE_NEEDS / 1e9:g} GB of memory are free", flush=True)


# Time


def expected_update(plain: float, forward: float, distance: float, learnt_from: int) -> float:
    """Seconds of an update: the plain one, each peer's forward pass, and D from all of them with its gradient."""
    return plain + learnt_from * forward + distance


def update_time(peers: int, device: str) -> Row:
    """Of a peer that learns from all others, in turn with all that it is expected to be made of."""
    with exchanging(TRAINED, interval=10**6, peers=peers, device=device) as ((training, codistiller), *elsewhere):
        for _, other in elsewhere:
            other.close()
        plain, module = Training(TRAINED, seed=9, device=device), TRAINED.build(seed=8).to(device).eval()
        logits = [torch.randn(TRAINED.logits, device=device) for _ in range(peers)]
        updates = itertools.count(int(codistiller.state_dict()["update"]) + 1)

        def codistilled() -> None:
            codistiller.begin_update(next(updates), epoch=1)
            training.update(codistiller)

        def distance() -> None:
            if peers > 1:
                distill(logits[0].requires_grad_(), logits[1:], loss="kl").loss.backward()

        @torch.no_grad()
        def forward() -> None:
            logits_of(module, plain.batch.inputs)

        actions = {"plain": plain.update, "codistilled": codistilled, "forward": forward, "distance": distance}
        found = side_by_side({name: _waiting(action, device) for name, action in actions.items()}, ROUNDS)
        assert codistiller.metrics()["peers"] == peers - 1
    parts = zip(found["plain"], found["forward"], found["distance"], strict=True)
    expected = [expected_update(*each, peers - 1) for each in parts]
    ms = {f"{name} ms": _digits(1000 * statistics.median(found[name])) for name in ("plain", "forward", "distance")}
    return point("peers", "time of an update", "ms", peers, found["codistilled"], expected, **ms)


def _waiting(action: Callable[[], object], device: str) -> Callable[[], None]:
    def whole() -> None:
        action()
        if device == "cuda":
            torch.cuda.synchronize()

    return whole


def _seconds(action: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    _waiting(action, device)()
    return time.perf_counter() - began


def expected_held(copies: float, beyond: float) -> float:
    """Seconds that an exchange holds the training thread: a copy out, one in for each peer, and what is constant."""
    return copies + beyond


def held_and_copies(megabytes: float, device: str) -> Iterator[tuple[float, float]]:
    """Of exchanges that took up a snapshot, seconds that they held the training thread, and those of the copies."""
    layers = Layers(megabytes)
    with tempfile.TemporaryDirectory() as folder:
        url = f"{folder}/store"
        with others(layers, 2, url, Path(folder), device) as (_, publish):
            learner = Learner(layers, 1, device)
            codistiller = learner.joins(url, Path(folder), 0, 2)
            copies = Copies(learner.model, layers.build(3).to(device), device)
            codistiller.begin_update(0, epoch=1)
            try:
                for update in range(1, 2 + EXCHANGES):
                    learner.nudge()
                    publish()
                    received = codistiller.metrics()["received"]
                    until(lambda received=received: codistiller.metrics()["received"] > received)
                    time.sleep(settling(layers))
                    due = copies.seconds()
                    held = _seconds(lambda update=update: codistiller.begin_update(update, epoch=1), device)
                    now = codistiller.metrics()
                    if update > 1 and now["peers"] and now["staleness"] == 0:  # the first one builds the module
                        yield held, due
            finally:
                codistiller.close()


class Copies:
    """The copies of an exchange with one peer, on their own: out of a model and into another, through host memory."""

    def __init__(self, model: torch.nn.Module, peer: torch.nn.Module, device: str) -> None:
        self._state, self._peer, self._device = model.state_dict(), peer.state_dict(), device
        self._buffer = HostBuffer(self._state, "float32")
        self._both()  # the first touch of memory is no copy's

    def seconds(self) -> float:
        return _seconds(self._both, self._device)

    def _both(self) -> None:
        self._buffer.fill(self._state)
        load(self._peer, self._buffer.tensors())


def held_time(megabytes: float, beyond: float, device: str) -> Row:
    held, copies = zip(*held_and_copies(megabytes, device), strict=True)
    more = {
        "copies GB/s": _digits(2 * megabytes / 1000 / statistics.median(copies)),
        "constant ms": _digits(1e3 * beyond),
    }
    expected = [expected_held(each, beyond) for each in copies]
    return point("size", "held at an exchange", "ms", megabytes, held, expected, **more)


def share_of_time(interval: int, beyond: float, device: str) -> Row:
    """The share of a real training's time in exchanges, interval by interval."""
    with exchanging(TRAINED, interval, device=device) as ((training, codistiller), (elsewhere, other)):
        copies = Copies(training.model, TRAINED.build(3).to(device), device)
        due = expected_held(statistics.median(copies.seconds() for _ in range(5)), beyond)
        start = (int(codistiller.state_dict()["update"]) // interval + 1) * interval
        measured, expected = [], []
        for boundary in range(start, start + interval * INTERVALS[interval], interval):
            with torch.no_grad():
                next(elsewhere.model.parameters()).mul_(0.999)
            other.begin_update(boundary, epoch=1)
            before = codistiller.metrics()["seconds"]
            updates = []
            for update in range(boundary, boundary + interval):
                codistiller.begin_update(update, epoch=1)
                updates.append(_seconds(lambda: training.update(codistiller), device))
            held = codistiller.metrics()["seconds"] - before
            measured.append(held / (held + sum(updates)))
            expected.append(due / (due + interval * statistics.median(updates)))
        update_ms = _digits(1000 * statistics.median(updates))
    return point(
        "interval", "share of time in exchanges", "%", interval, measured, expected, **{"update ms": update_ms}
    )


# Memory


def expected_memory(model: int, learnt_from: int, beyond: float) -> float:
    """Bytes that a peer adds to the plain peak.

    Its own: the host buffer, a module a peer, the parts that are on their way to the store and from it. Mapped files,
    which the kernel can take back: the initial weights, and at the swap each peer's snapshot.
    """
    own = (1 + learnt_from) * model + min(model, 4 * objects.CHUNK)
    mapped = (1 + learnt_from) * model
    return own + mapped + beyond


def memory_at(megabytes: float, peers: int, exchanges: int = EXCHANGES) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        url = f"{folder}/store"
        with others(Layers(megabytes), peers, url, Path(folder)) as (_, publish):
            found: dict[str, Any] = run("memory", [[megabytes, peers, url, folder, exchanges]], publish)
    return found


def memory_rows() -> Iterator[Row]:
    what = "memory over plain"
    nothing = memory_at(NOTHING, 2)
    beyond = statistics.median(nothing["peaks"]) - nothing["plain"]
    points = [("peers", peers, 50.0, peers) for peers in PEERS] + [("size", mb, mb, 2) for mb in MEGABYTES]
    for axis, at, megabytes, peers in points:
        found = memory_at(megabytes, peers)
        measured = [peak - found["plain"] for peak in found["peaks"]]
        expected = [expected_memory(found["model"], peers - 1, beyond)] * len(measured)
        models = _digits(statistics.median(measured) / found["model"])
        yield point(axis, what, "MB", at, measured, expected, models=models, **{"constant MB": _digits(beyond / 1e6)})


# Bytes


def expected_bytes(size: int, learnt_from: int, quiet: float, interval_seconds: float = math.inf) -> float:
    """Of a peer between two boundaries: a put, a fetch of each other peer's snapshot, and what there is in silence.

    A snapshot is fetched when a poll sees it: of an interval shorter than the pause between two polls, some are not.
    """
    return size * (1 + learnt_from * min(1.0, interval_seconds / POLL_SECONDS)) + quiet


def counted(found: dict[str, Any], peers: int, interval_seconds: float = math.inf) -> tuple[list[float], list[float]]:
    """Bytes of a peer between marks, measured and expected."""
    spans = list(itertools.pairwise(found["marks"]))
    measured = [(after - before) / peers for (before, _), (after, _) in spans]
    quiet = [found["quiet"] / peers * (ended - began) for (_, began), (_, ended) in spans]
    return measured, [expected_bytes(found["size"], peers - 1, each, interval_seconds) for each in quiet]


def exchange_points() -> Iterator[tuple[str, float, float, int, str]]:
    yield from (("peers", peers, 4, peers, "float32") for peers in PEERS)
    yield from (("size", mb, mb, 2, dtype) for mb in MEGABYTES if mb <= 100 for dtype in ("float32", "bfloat16"))


def exchange_bytes(axis: str, at: float, megabytes: float, peers: int, dtype: str) -> Row:
    """Of an exchange, which takes as long as it takes: about one poll."""
    found = _counted_in_a_namespace("exchange_bytes", megabytes, peers, dtype, EXCHANGES)
    more = {"quiet bytes/s": _digits(found["quiet"] / peers)}
    return point(axis, "bytes of an exchange", "MB", at, *counted(found, peers), dtype, **more)


def interval_bytes(interval: int) -> Row:
    intervals = max(2, int(COUNTED_SECONDS / UPDATE_SECONDS / interval))
    found = _counted_in_a_namespace("interval_bytes", 1, interval, UPDATE_SECONDS, intervals)
    measured, expected = counted(found, 2, interval * UPDATE_SECONDS)
    per_update = [[each / interval for each in values] for values in (measured, expected)]
    more = {"quiet bytes/s": _digits(found["quiet"] / 2)}
    return point("interval", "bytes of an update", "kB", interval, *per_update, **more)


def _counted_in_a_namespace(kind: str, *arguments: Any) -> Any:
    return alone("benchmarks.growth_worker", kind, json.dumps(arguments))


# Workers


def expected_meeting(hop: float, workers: int) -> float:
    """Seconds of the two collectives: a broadcast down a tree, then a minimum that goes around a ring twice."""
    return hop * (math.ceil(math.log2(workers)) + 2 * (workers - 1))


def worker_rows() -> Iterator[Row]:
    single = 0.0
    for workers in WORKERS:
        try:
            found = _counted_in_a_namespace("worker_bytes", 10, workers, EXCHANGES)
            yield point("workers", "bytes of an exchange", "MB", workers, *counted(found, 2))
        except Unavailable:
            found = of_workers(10, workers, EXCHANGES)
        meetings, held = found["meetings"], found["held"]
        single = single or statistics.median(held)
        if workers > 1:
            expected = expected_meeting(statistics.median(found["hops"]), workers)
            more = {"µs an update, interval 500": _digits(1e6 * statistics.median(meetings) / 500)}
            yield point("workers", "time of a meeting", "ms", workers, meetings, [expected] * len(meetings), **more)
        expected = single + statistics.median(meetings)
        yield point("workers", "held at an exchange", "ms", workers, held, [expected] * len(held))

"""How fast do two workers train together when the links between them are slow?

The workers, one thread each, and an S3 server (moto) are network namespaces joined by a bridge; each has a link of its
own, shaped both ways (tbf). A method's workers are started once and go through all speeds. Bytes are those of their
interfaces, with the headers of Ethernet, IP and TCP. What happens once a period is timed over whole periods: post-local
SGD and DiLoCo average as often as ours publishes. Ours is measured from the middle of an interval on, when the other's
weights are in use and a whole interval at this speed is over. Both peers start together, and so share the store's link.
Bounds: two workers and the store share the cores of one machine; links have no delay and lose nothing; batches are
random and ready. Where two methods are set beside each other, the spread is that of all pairs of their windows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Optional

from benchmarks.links import Host, hosts
from benchmarks.record import Row
from benchmarks.s3_server import Bucket, serving
from benchmarks.slow_links_worker import Job, Phase

TOLERANCE = 0.25
SPEEDS: tuple[Optional[float], ...] = (None, 1000.0, 300.0, 100.0, 30.0)
FEW: tuple[Optional[float], ...] = (None, 100.0, 30.0)
COMPARED = 100.0  # Mbit/s
PERIODS = {"resnet18, 64 px": 100, "resnet18, 224 px": 30, "Transformer": 50}
MAIN = "resnet18, 64 px"
UPDATES = 16  # timed one by one
UPDATES_IN_FULL = {100.0: 5, 30.0: 3}  # of those that take seconds: resnet18's gradients need 12 at 30 Mbit/s
START_SECONDS, PHASE_SECONDS = 180.0, 600.0


@dataclasses.dataclass(frozen=True)
class Method:
    """A contender as it is measured.

    Attributes:
        name: of `contenders.METHODS`.
        options: beside the period.
        full: sends all gradients at every update.
        periodic: sends what it sends once a period.
        everywhere: with all workloads.
    """

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    full: bool = False
    periodic: bool = False
    everywhere: bool = True

    @property
    def ours(self) -> bool:
        """Goes on while its snapshots travel."""
        return self.name == "checkpoint"

    def phase(self, mbit: Optional[float], period: int) -> Phase:
        """What is measured at a speed."""
        if self.ours:
            return Phase(settle=period, windows=3, updates=period)
        if self.periodic:
            return Phase(settle=3, windows=3 if mbit is None else 2, updates=period)
        return Phase(settle=3, windows=UPDATES_IN_FULL.get(mbit or 0, UPDATES) if self.full else UPDATES, updates=1)


METHODS = {
    "alone": Method("alone"),
    "DDP": Method("ddp", full=True),
    "DDP, float16": Method("ddp-fp16", full=True, everywhere=False),
    "PowerSGD, rank 2": Method("powersgd", {"warm_up": 2, "powersgd_rank": 2}),
    "post-local SGD": Method("post-local-sgd", {"warm_up": 2}, periodic=True, everywhere=False),
    "DiLoCo": Method("diloco", periodic=True),
    "prediction": Method("prediction"),
    "checkpoint": Method("checkpoint", periodic=True),
    "checkpoint, bfloat16": Method("checkpoint", {"dtype": "bfloat16"}, periodic=True, everywhere=False),
}


class Failed(RuntimeError):
    """A method could not be measured; `str()` says why."""


@dataclasses.dataclass
class Cell:
    """What a method did at one speed, as a mean of the two workers.

    Attributes:
        seconds: of an update, in each window.
        sent: bytes an update.
        received: bytes an update.
        told: what else the workers said, each.
    """

    seconds: list[float]
    sent: float
    received: float
    told: list[dict[str, Any]]

    @property
    def middle(self) -> float:
        return statistics.median(self.seconds)

    @property
    def bytes(self) -> float:
        """The busier direction's."""
        return max(self.sent, self.received)

    def most(self, name: str) -> float:
        return max(each[name] for each in self.told)


Cells = dict[Optional[float], Cell]


def measure(device: str) -> Iterator[Row]:
    for workload, period in PERIODS.items():
        found: dict[str, Cells] = {}
        for name, method in METHODS.items():
            if workload != MAIN and not method.everywhere:
                continue
            try:
                found[name] = cells(workload, method, period)
            except RuntimeError as why:
                print(f"  {workload}: {name} was not measured: {why}", flush=True)
                continue
            yield from alike(workload, name, method, found, period)
        yield from side_by_side(workload, found)


def cells(workload: str, method: Method, period: int) -> Cells:
    """A method at its speeds, as far as it gets.

    Raises:
        Failed: when it does not get far enough to compare.
    """
    found: Cells = {}
    with pair(workload, method, period) as go:
        for mbit in speeds(workload, method):
            try:
                cell = go(mbit, method.phase(mbit, period))
            except Failed as why:
                if not found:
                    raise
                print(f"  {workload}: {method.name} ends at {mbit} Mbit/s: {why}", flush=True)
                break
            found.setdefault(mbit, dataclasses.replace(cell, seconds=[])).seconds.extend(cell.seconds)
    return found


def speeds(workload: str, method: Method) -> Sequence[Optional[float]]:
    """Ours takes minutes, in which a machine may change: it comes back to where it began."""
    if method.name == "alone":
        return [None]
    all_or_few = SPEEDS if workload == MAIN else FEW
    return [*all_or_few, None] if method.ours else all_or_few


@contextlib.contextmanager
def pair(workload: str, method: Method, period: int) -> Iterator[Callable[[Optional[float], Phase], Cell]]:
    """Two connected workers; what is given measures them at a speed."""
    with contextlib.ExitStack() as ends:
        *places, store = network = ends.enter_context(hosts(3))
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        bucket = ends.enter_context(serving(store)) if method.ours else Bucket("", {})
        # The workers are killed in the end: what they keep for themselves goes with the folder.
        environment = {**os.environ, **bucket.environment, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        workers: list[subprocess.Popen[str]] = []
        for rank, place in enumerate(places):
            job = Job(
                workload=workload,
                method=method.name,
                rank=rank,
                rendezvous=f"tcp://{places[0].address}:29500",
                store_url=f"{bucket.url}/run",
                folder=str(folder / str(rank)),
                options={**method.options, "period": period},
            )
            log = ends.enter_context(open(folder / f"{rank}.log", "w", encoding="utf-8"))
            workers.append(ends.enter_context(worker(place, job, environment, log)))
        answers(workers, folder, START_SECONDS)

        def go(mbit: Optional[float], phase: Phase) -> Cell:
            for host in network:
                host.throttle(mbit)
            for each in workers:
                with contextlib.suppress(BrokenPipeError):  # it has ended; `answers` says why
                    print(json.dumps(dataclasses.asdict(phase)), file=each.stdin, flush=True)
            told = answers(workers, folder, PHASE_SECONDS)
            seconds = [statistics.fmean(both) for both in zip(*(one["seconds"] for one in told), strict=True)]
            sent, received = (statistics.fmean(one[way] for one in told) for way in ("sent", "received"))
            return Cell(seconds, sent, received, told)

        yield go


@contextlib.contextmanager
def worker(place: Host, job: Job, environment: Mapping[str, str], log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    told, pipe = json.dumps(dataclasses.asdict(job)), subprocess.PIPE
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.slow_links_worker", told]
    with place.start(command, environment, stdin=pipe, stdout=pipe, stderr=log, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def answers(workers: Sequence[subprocess.Popen[str]], folder: Path, limit: float) -> list[dict[str, Any]]:
    """A line of each.

    Raises:
        Failed: when one has ended, or has not answered for so many seconds.
    """
    timer = threading.Timer(limit, lambda: [each.kill() for each in workers])
    timer.start()
    lines = [each.stdout.readline() for each in workers]
    late = not timer.is_alive()
    timer.cancel()
    if all(lines):
        return [json.loads(line) for line in lines]
    if late:
        raise Failed(f"no answer within {limit:.0f} s")
    logs = [path.read_text(encoding="utf-8").strip().splitlines() for path in sorted(folder.glob("*.log"))]
    raise Failed("; ".join(log[-1] for log in logs if log) or "a worker ended without a word")


def alike(workload: str, name: str, method: Method, found: Mapping[str, Cells], period: int) -> Iterator[Row]:
    """A method beside itself on faster links."""
    free = found[name][None]
    for mbit, cell in found[name].items():
        pace, sent, received = digits(1 / cell.middle), round(cell.sent), round(cell.received)
        foretold = digits(1 / predicted(method, free, mbit))
        details: dict[str, Any] = {
            "updates_per_second": pace,
            "sent_per_update": sent,
            "received_per_update": received,
            "curve": {"workload": workload, "method": name, "mbit": mbit, "measured": pace, "predicted": foretold},
        }
        if method.periodic:
            details["period"] = period
        if method.ours:
            details["exchanges"] = min(each["exchanges"] for each in cell.told)
            details |= {key: cell.most(key) for key in ("skipped", "incidents")}
            details["staleness_in_intervals"] = digits(cell.most("staleness") / period)
        if mbit is not None:
            ratios = [free.middle / seconds for seconds in cell.seconds]
            goal = 0.95 if method.ours and mbit == COMPARED and workload == MAIN else None
            title = f"{workload}: {name}, {mbit:g} Mbit/s / unthrottled"
            yield Row.of(title, ratios, goal=goal, more=True, details=details)
        elif "alone" in found:
            ratios = [found["alone"][None].middle / seconds for seconds in cell.seconds]
            yield Row.of(f"{workload}: {name} / alone, unthrottled", ratios, more=True, details=details)
        if method.ours and mbit == COMPARED:
            stale = [cell.most("staleness") / period]
            yield Row.of(f"{workload}: {name}, staleness in intervals, {mbit:g} Mbit/s", stale, goal=2.0)


def side_by_side(workload: str, found: Mapping[str, Cells]) -> Iterator[Row]:
    """Ours beside the others."""
    if "checkpoint" not in found:
        return
    ours = found["checkpoint"]
    for name, theirs in found.items():
        if METHODS[name].ours or not {COMPARED} <= theirs.keys() & ours.keys():
            continue
        ratios = [slow / fast for slow in theirs[COMPARED].seconds for fast in ours[COMPARED].seconds]
        goal = 5.0 if (name, workload) == ("DDP", MAIN) else None
        details = {"break_even_mbit": break_even(theirs[None], ours[None])}
        title = f"{workload}: checkpoint / {name}, throughput, {COMPARED:g} Mbit/s"
        yield Row.of(title, ratios, goal=goal, more=True, details=details)
    for name, goal in (("checkpoint", 95.0), ("checkpoint, bfloat16", 190.0)):
        if name in found and "DDP" in found:
            both = [found["DDP"][None], found[name][None]]
            details = {key: round(cell.sent) for key, cell in zip(("DDP", name), both, strict=True)}
            title = f"{workload}: bytes sent, DDP / {name}"
            ratio = both[0].sent / both[1].sent  # what is received may come from before the measured part
            yield Row.of(title, [ratio], goal=goal if workload == MAIN else None, more=True, details=details)


def predicted(method: Method, free: Cell, mbit: Optional[float]) -> float:
    """Seconds of an update: without the link, then its bytes one after the other; ours does not wait for them."""
    return free.middle + (0.0 if method.ours or mbit is None else 8 * free.bytes / (1e6 * mbit))


def break_even(theirs: Cell, ours: Cell) -> float | str:
    """Mbit/s above which they are faster, by `predicted`."""
    gained = ours.middle - theirs.middle
    return digits(8 * theirs.bytes / gained / 1e6) if gained > 0 else "none, ours is faster on any link"


def digits(value: float) -> float:
    return float(f"{value:.4g}")


def draw(rows: Sequence[Row], folder: Path) -> None:
    from benchmarks.slow_links_plot import curves

    curves(rows, folder / "links-throughput.png")

"""How much slower is training while an exchange goes on in the background? Part of the question `exchange`.

A Transformer of 100 MB is trained on two cores, an update of some 0.1 s. An interval is 100 updates, in which a
snapshot is copied, hashed and stored, another is fetched and verified, and one is taken up. Intervals with and without
an exchange take turns: the same model, the same memory, and in both two looks a second at the store. That is the row
with the goal.

While the background works: the same training on one thread, so that the other core is free for the background. All CPU
time that is not the training thread's is then the background's: an update during which it took at least a quarter as
much as the training thread is a busy one, at most a twentieth a quiet one. The bound: the same training beside another
process that does such work, and shares nothing with it but the machine.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor, nn

from benchmarks import drawing
from benchmarks.exchange_setting import INTERVAL, SHAPES, WAIT_SECONDS, Scene, scene, seconds
from benchmarks.record import Row

MEGABYTES = 100
WORDS = 64
THREADS = 2
PAIRS = 6
ROUNDS = 10
BUSY, QUIET = 0.25, 0.05  # of the training thread's CPU time
AFTER = 4  # quiet updates after an exchange
GOAL = 1.03
# Read, hash and write as many bytes again and again, at the pace of our own background work.
BESIDE = """
import hashlib, os, pathlib, sys
parent, (source, target) = os.getppid(), map(pathlib.Path, sys.argv[1:])
source.write_bytes(bytes(100_000_000))
print(flush=True)
while os.getppid() == parent:
    data = source.read_bytes()
    hashlib.sha256(data)
    target.write_bytes(data)
"""


class Update:
    """One update of a model on a batch that stays the same."""

    def __init__(self, model: nn.Module, width: int) -> None:
        self._model, self._device = model, next(model.parameters()).device
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
        self._batch: Tensor = torch.randn(4, WORDS // 4, width, device=self._device)

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()
        self._optimizer.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def measure(device: str) -> Iterator[Row]:
    """The rows; the number of threads is put back."""
    threads = torch.get_num_threads()
    with scene(SHAPES[MEGABYTES], device) as here:
        update = Update(here.model, SHAPES[MEGABYTES].width)
        try:
            torch.set_num_threads(THREADS)
            yield over_intervals(here, update)
            torch.set_num_threads(1)
            yield from while_busy(here, update)
            yield beside_another(update)
        finally:
            torch.set_num_threads(threads)


def over_intervals(here: Scene, update: Update) -> Row:
    """Whole intervals with an exchange and without, in turns."""
    here.elsewhere.prepare(PAIRS + 2)
    here.fetched(here.elsewhere.announce)  # for the first boundary
    ours: list[list[float]] = []
    plain: list[list[float]] = []
    cpu = [0.0, 0.0]
    for number in range(-1, PAIRS):
        for exchanging in (True, False) if number % 2 else (False, True):
            here.rest()
            began = time.process_time()
            times = interval(here, update, exchanging)
            if number >= 0:
                cpu[exchanging] += time.process_time() - began
                (ours if exchanging else plain).append(times)
    curves = {name: _medians(times) for name, times in (("exchanging", ours), ("alone", plain))}
    return Row.of(
        f"{MEGABYTES} MB: training with an exchange every {INTERVAL} updates, of training without",
        [sum(a) / sum(b) for a, b in zip(ours, plain, strict=True)],
        goal=GOAL,
        details={
            "update_ms": round(1000 * fmean(map(fmean, plain)), 1),
            "cpu_ratio": round(cpu[True] / cpu[False], 4),
            "boundary_ms": round(curves["exchanging"][0] - curves["alone"][0], 1),
            "curves_ms": curves,
        },
    )


def interval(here: Scene, update: Update, exchanging: bool) -> list[float]:
    """Seconds of each update from one boundary to the next."""
    if exchanging:
        here.elsewhere.announce()
    times = []
    for number in range(INTERVAL):
        began = time.perf_counter()
        if exchanging:
            (here.go_on if number else here.exchange)()
        update()
        times.append(time.perf_counter() - began)
        if exchanging and not number:
            here.require_uptake()
    return times


def _medians(intervals: Sequence[Sequence[float]]) -> list[float]:
    """Of each update of the interval, in ms."""
    return [round(1000 * median(times), 1) for times in zip(*intervals, strict=True)]


def while_busy(here: Scene, update: Update) -> Iterator[Row]:
    """Updates during which the background works, and others."""
    here.elsewhere.prepare(ROUNDS)
    ratios, lost, shares = [], [], []
    for _ in range(ROUNDS):
        updates = around_an_exchange(here, update)
        quiet = fmean(each.seconds for each in updates if each.share < QUIET)
        busy = [each.seconds for each in updates if each.share >= BUSY]
        lost.append(sum(each.seconds - quiet for each in updates if each.share >= QUIET))
        shares += [each.share for each in updates if each.share < QUIET]
        if busy:  # else so slow a machine that the background's work is spread thin
            ratios.append(fmean(busy) / quiet)
    name = f"{MEGABYTES} MB: an update while the background works, of a quiet one"
    if not ratios:
        print(f"  {name}: in {ROUNDS} exchanges there was no update with that much work beside it", flush=True)
        return
    details = {"lost_ms_per_exchange": round(1000 * fmean(lost), 1), "cpu_share_of_waiting": round(fmean(shares), 4)}
    yield Row.of(name, ratios, details=details)


@dataclasses.dataclass(frozen=True)
class _Timed:
    """An update on one thread: seconds, and CPU seconds of the other threads per CPU second of its own."""

    seconds: float
    share: float


def around_an_exchange(here: Scene, update: Update) -> list[_Timed]:
    """The updates from a boundary, and from another peer's word, until some quiet ones after all that is done."""
    here.rest()
    before = here.codistiller.metrics()
    here.exchange()
    here.elsewhere.announce()
    found, after, deadline = [], 0, time.monotonic() + WAIT_SECONDS
    while after < AFTER:
        if time.monotonic() > deadline:
            raise RuntimeError(f"this takes longer than {WAIT_SECONDS:.0f} s: {here.codistiller.metrics()}")
        whole, own, began = time.process_time(), time.thread_time(), time.perf_counter()
        update()
        took, own = time.perf_counter() - began, time.thread_time() - own
        found.append(_Timed(took, (time.process_time() - whole) / own - 1))
        now = here.codistiller.metrics()
        done = now["sent"] > before["sent"] and now["received"] > before["received"] and found[-1].share < QUIET
        after += done
    return found


def beside_another(update: Update) -> Row:
    """The bound: updates beside a process that works all the time, and alone."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", BESIDE, f"{folder}/source", f"{folder}/target"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as another:
            assert another.stdout is not None
            another.stdout.readline()
            try:
                ratios = []
                for _ in range(ROUNDS):
                    beside = seconds(lambda: [update() for _ in range(AFTER)])
                    another.send_signal(signal.SIGSTOP)
                    alone = seconds(lambda: [update() for _ in range(AFTER)])
                    another.send_signal(signal.SIGCONT)
                    ratios.append(beside / alone)
            finally:
                another.kill()
    return Row.of(f"{MEGABYTES} MB: an update beside another process that hashes and copies, of one alone", ratios)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """The updates of an interval, with an exchange and without."""
    pyplot = drawing.pyplot()
    for row in rows:
        curves = row.details.get("curves_ms")
        if not curves:
            continue
        figure, axis = pyplot.subplots(figsize=(9, 3), layout="constrained")
        for (name, times), style in zip(curves.items(), ("-", ":"), strict=True):
            axis.plot(times, style, color="black", label=name)
        axis.set(xlabel="updates since the boundary", ylabel="ms", ylim=(0, None), title=row.name)
        axis.title.set_fontsize(9)
        axis.grid(color="0.9")
        axis.legend(fontsize=8)
        figure.savefig(folder / "exchange-interval.png", dpi=120)
        pyplot.close(figure)

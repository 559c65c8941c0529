"""How long does an update with exchange by prediction take beside a plain one?

resnet18 on 32 images of 64 × 64, two peers as two processes with one thread each; both kinds of update in turn.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.bytes_measured import together
from benchmarks.record import Row
from benchmarks.workloads import Training, Vision
from codistill import CodistillConfig, Codistiller, Position, fingerprint

ROUNDS = 24
UPDATES = 5  # of a kind in a round: the other kind must not take so long that the group is given up
GOAL = 1.10
TOLERANCE = 0.05


class Exchanging:
    """resnet18 with SGD on one batch, plainly or with the penalty."""

    def __init__(self, rank: int, folder: Path) -> None:
        workload = Vision()
        self.training = Training(workload, seed=rank)
        self.codistiller = Codistiller(
            CodistillConfig(dir=f"{folder}/exchange", exchange="prediction", peer=rank, interval=10**6),
            model=self.training.model,
            build_peer=lambda: self.training.model,
            fingerprint=fingerprint(workload.classes),
            save_dir=folder / str(rank),
        )
        self.done, self.exchanged = 0, 0
        self.position = Position(1, 0)

    def plain(self) -> None:
        self.training.update()

    def codistilled(self) -> None:
        self.codistiller.begin_update(self.done, epoch=1)
        further = self.codistiller.begin_batch(self.position)
        found = self.training.update(self.codistiller)
        self.exchanged += found is not None and bool(found.peers)
        self.done += 1
        self.position = further or Position(1, self.position.batch + 1)


def worker(rank: str, place: str) -> None:
    """One of two peers; prints every round's seconds, plain and codistilled, then those of the CPU, and exchanges."""
    torch.set_num_threads(1)
    folder = Path(place)
    training = Exchanging(int(rank), folder)
    while training.exchanged < UPDATES:
        training.codistilled()
    exchanged = training.exchanged
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "codistilled": []}
    for number in range(ROUNDS):
        for kind in sorted(times, reverse=bool(number % 2)):
            together(folder, f"{number}{kind}-", rank)
            times[kind].append(_seconds(getattr(training, kind)))
    together(folder, "end", rank)
    training.codistiller.close()
    print(json.dumps([times["plain"], times["codistilled"], training.exchanged - exchanged]))


def _seconds(update: Callable[[], None]) -> tuple[float, float]:
    """Of an update, by the wall clock and of this process's CPU time."""
    began, spent = time.perf_counter(), time.process_time()
    for _ in range(UPDATES):
        update()
    return (time.perf_counter() - began) / UPDATES, (time.process_time() - spent) / UPDATES


def measure(device: str) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.prediction_cost"]
        workers = [
            subprocess.Popen([*command, str(rank), folder], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
        ]
        try:
            found = [json.loads(one.communicate(timeout=1800)[0].splitlines()[-1]) for one in workers]
        finally:
            for one in workers:
                one.kill()
                one.wait()
    exchanged = min(each[2] for each in found)
    for clock, name in enumerate(("wall clock", "CPU time")):
        plain, codistilled = (
            [
                statistics.fmean(pair[clock] for pair in pairs)
                for pairs in zip(*(each[kind] for each in found), strict=True)
            ]
            for kind in (0, 1)
        )
        details = {
            "plain ms": round(1000 * statistics.median(plain)),
            "codistilled ms": round(1000 * statistics.median(codistilled)),
            "exchanged": f"{exchanged} of {ROUNDS * UPDATES}",
        }
        ratios = [b / a for a, b in zip(plain, codistilled, strict=True)]
        yield Row.of(name, ratios, goal=GOAL, details=details)


if __name__ == "__main__":
    worker(*sys.argv[1:])

"""How long does an update with exchange by prediction take beside a plain one? (goal: at most 1.10 times, resnet18)"""

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
from torch import nn

from benchmarks.bytes_measured import Vision, logits_of, together
from codistill import CodistillConfig, Codistiller, Position, fingerprint

ROUNDS = 24
IMAGES = "32 images of 64 × 64"
UPDATES = 5  # of a kind in a round: the other kind must not take so long that the group is given up


class Training:
    """resnet18 with SGD on one batch, plainly or with the penalty."""

    def __init__(self, rank: int, folder: Path) -> None:
        vision = Vision(seed=rank)
        self.model, self.inputs = vision.model, vision.inputs
        self.labels = torch.arange(len(self.inputs[0]))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.codistiller = Codistiller(
            CodistillConfig(dir=f"{folder}/exchange", exchange="prediction", peer=rank, interval=10**6),
            model=self.model,
            build_peer=lambda: self.model,
            fingerprint=fingerprint(1000),
            save_dir=folder / str(rank),
        )
        self.update, self.exchanged = 0, 0
        self.position = Position(1, 0)

    def plain(self) -> None:
        logits = logits_of(self.model, self.inputs)
        self._learn(nn.functional.cross_entropy(logits, self.labels))

    def codistilled(self) -> None:
        self.codistiller.begin_update(self.update, epoch=1)
        further = self.codistiller.begin_batch(self.position)
        logits = logits_of(self.model, self.inputs)
        loss = nn.functional.cross_entropy(logits, self.labels)
        if self.codistiller.active:
            found = self.codistiller.penalty(logits, lambda peer: peer(*self.inputs), inputs=self.inputs)
            self.exchanged += bool(found.peers)
            loss = loss + self.codistiller.alpha * found.loss / len(self.labels)
        self._learn(loss)
        self.update += 1
        self.position = further or Position(1, self.position.batch + 1)

    def _learn(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def worker(rank: str, place: str) -> None:
    """One of two peers; prints every round's seconds, plain and codistilled, then those of the CPU, and exchanges."""
    torch.set_num_threads(1)
    folder = Path(place)
    training = Training(int(rank), folder)
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


def measure() -> Iterator[str]:
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
    yield f"resnet18, {IMAGES}; each of two processes with one thread, {ROUNDS} rounds of {UPDATES} updates"
    for clock, name in enumerate(("wall clock", "CPU time")):
        plain, codistilled = (
            [
                statistics.fmean(pair[clock] for pair in pairs)
                for pairs in zip(*(each[kind] for each in found), strict=True)
            ]
            for kind in (0, 1)
        )
        low, middle, high = statistics.quantiles([b / a for a, b in zip(plain, codistilled, strict=True)], n=4)
        yield (
            f"{name}: {1000 * statistics.median(plain):.0f} ms plain, {1000 * statistics.median(codistilled):.0f} ms "
            f"codistilled; ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f})"
        )
    yield f"{min(each[2] for each in found)} of {ROUNDS * UPDATES} updates exchanged"


if __name__ == "__main__":
    worker(*sys.argv[1:])

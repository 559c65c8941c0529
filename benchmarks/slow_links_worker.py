"""One of two workers that train by some method, each on a host of its own: as a program, told what to do line by line.

It does the updates of each line it reads, and says in one line how long they took and what its interface carried. It
ends when its input does; what fails in a method ends it with a traceback.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Contender, Options, make
from benchmarks.links import carried
from benchmarks.workloads import Batch, Translation, Vision, Workload, loss_of

BATCHES = 8
WORKLOADS: dict[str, Workload] = {
    "resnet18, 64 px": Vision(images=8),
    "resnet18, 224 px": Vision(images=4, pixels=224),
    "Transformer": Translation(),
}
LONGEST_SETTLING = 5  # periods


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker trains.

    Attributes:
        workload: one of `WORKLOADS`.
        method: one of `METHODS`.
        rank: its number, 0 or 1.
        rendezvous: see `make`.
        store_url: see `make`.
        folder: see `make`.
        options: for `Options`.
    """

    workload: str
    method: str
    rank: int
    rendezvous: str
    store_url: str
    folder: str
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Phase:
    """What is done at one speed of the links.

    Attributes:
        settle: updates that are not measured, at the start.
        windows: parts that are timed one by one.
        updates: in each of them.
    """

    settle: int
    windows: int
    updates: int


class Training:
    """A contender on random batches."""

    def __init__(self, job: Job) -> None:
        workload, rank = WORKLOADS[job.workload], job.rank
        model = workload.build(seed=1 + rank)
        self.period = job.options["period"]
        self.contender: Contender = make(
            job.method,
            model=model,
            optimizer=workload.optimizer(model),
            build=lambda: workload.build(seed=0),
            rank=rank,
            world=2,
            rendezvous=job.rendezvous,
            store_url=job.store_url,
            folder=Path(job.folder),
            options=Options(**job.options),
        )
        own = 0 if self.contender.same_batch else rank
        self._batches = [workload.batch(seed=BATCHES * own + number) for number in range(BATCHES)]
        self._waits = job.method == "checkpoint"
        self._done, self.staleness = 0, 0.0

    def update(self) -> None:
        batch: Batch = self._batches[self._done % BATCHES]
        self.contender.update(batch, loss_of)
        self._done += 1
        self.staleness = max(self.staleness, self.contender.metrics().get("staleness", 0.0))

    def settle(self, updates: int) -> None:
        """Get to where things go on as they are; with exchange by checkpoint to the middle of an interval."""
        for _ in range(updates):
            self.update()
        while self._waits and not (self._exchanged and self._done % self.period == self.period // 2):
            if self._done > updates + LONGEST_SETTLING * self.period and not self._exchanged:
                raise TimeoutError(f"no snapshot has come within {self._done} updates")
            self.update()

    @property
    def _exchanged(self) -> bool:
        return self.contender.metrics()["exchanges"] > 0

    def go_through(self, phase: Phase) -> dict[str, Any]:
        """Do it; what there is to say."""
        self.settle(phase.settle)
        before, bytes_before, self.staleness = self.contender.metrics(), carried(), 0.0
        seconds = []
        for _ in range(phase.windows):
            began = time.perf_counter()
            for _ in range(phase.updates):
                self.update()
            seconds.append((time.perf_counter() - began) / phase.updates)
        updates = phase.windows * phase.updates
        sent, received = ((now - then) / updates for now, then in zip(carried(), bytes_before, strict=True))
        after = self.contender.metrics()
        grown = {name: after[name] - before[name] for name in ("exchanges", "incidents", "skipped") if name in after}
        return {"seconds": seconds, "sent": sent, "received": received, "staleness": self.staleness, **grown}


def phases() -> Iterator[Phase]:
    for line in sys.stdin:
        yield Phase(**json.loads(line))


def main(job: str) -> None:
    torch.set_num_threads(1)
    training = Training(Job(**json.loads(job)))
    print("{}", flush=True)  # connected
    for phase in phases():
        print(json.dumps(training.go_through(phase)), flush=True)
    training.contender.close(finish=False)


if __name__ == "__main__":
    main(sys.argv[1])

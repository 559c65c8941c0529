"""What two workers really send each other, for models that train here: run inside a namespace by `loopback.alone`.

All that crosses `lo` is counted, TCP, IP and HTTP headers, polls and heartbeats too. A byte that one worker sends and
the other receives crosses it once; a snapshot crosses it twice, on its way to the store (S3, served here) and back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.loopback import carried, switch_on
from benchmarks.workloads import Training, Translation, Vision, Workload, logits_of
from codistill import CodistillConfig, Codistiller, Position, fingerprint
from codistill.exchange.prediction.group import Group, Header
from codistill.exchange.prediction.wire import payload_bytes
from codistill.exchange.snapshot import HostBuffer

UPDATES = 4
SNAPSHOTS = 4
PATIENCE = 300.0  # seconds, for whatever the other does
MEMBERS = (4, 8, 16)
Found = tuple[str, str, float, float]


TRAININGS: dict[str, Workload] = {"resnet18": Vision(), "small Transformer": Translation()}
WIRES = (("float32", 0), ("bfloat16", 0), ("bfloat16", 32))


def all_reduce(training: Training, rank: int, folder: Path) -> Iterator[None]:
    """An update per step, with torch's own data parallelism; buffers stay where they are."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = DistributedDataParallel(training.model, broadcast_buffers=False)
    while True:
        logits_of(model, training.batch.inputs).logsumexp(-1).sum().backward()
        yield


def prediction(training: Training, rank: int, folder: Path, dtype: str, topk: int) -> Iterator[None]:
    """An update per step, once the two have met."""
    config = CodistillConfig(
        dir=f"{folder}/exchange", exchange="prediction", peer=rank, dtype=dtype, topk=topk, interval=10**6
    )
    codistiller = Codistiller(
        config,
        model=training.model,
        build_peer=lambda: training.model,
        fingerprint=fingerprint(1),
        save_dir=folder / str(rank),
    )
    position, met = Position(1, 0), 0
    for update in range(10**6):
        codistiller.begin_update(update, epoch=1)
        further = codistiller.begin_batch(position)
        if codistiller.active:
            found = training.update(codistiller)
            met += found is not None and bool(found.peers)
        else:
            time.sleep(0.02)
        position = further or Position(1, position.batch + 1)
        if met:
            yield


def worker(name: str, kind: str, rank: str, folder: str, *more: str) -> None:
    """One of two that step together; worker 0 prints what `lo` carried in `UPDATES` steps."""
    torch.manual_seed(0)
    training = Training(TRAININGS[name], seed=1 if kind == "all_reduce" else int(rank))
    place, wire = Path(folder), (more[0], int(more[1])) if more else ()
    steps = {"all_reduce": all_reduce, "prediction": prediction}[kind](training, int(rank), place, *wire)
    next(steps)
    together(place, "ready", rank)
    before = carried()
    for _ in range(UPDATES):
        next(steps)
    together(place, "done", rank)
    print(carried() - before, flush=True)
    together(place, "end", rank)
    os._exit(0)


def together(folder: Path, what: str, rank: str) -> None:
    """Wait for the other worker, without the network."""
    (folder / f"{what}{rank}").touch()
    _wait(lambda: all((folder / f"{what}{each}").exists() for each in (0, 1)), 0.001)


def _wait(done: Callable[[], bool], pause: float) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"what was waited for did not happen within {PATIENCE:.0f} s")
        time.sleep(pause)


def on_the_wire(name: str, kind: str, *more: Any) -> float:
    """Bytes that each of two workers sends per update."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bytes_measured", name, kind]
        workers = [
            subprocess.Popen([*command, str(rank), folder, *map(str, more)], stdout=subprocess.PIPE, text=True)
            for rank in (0, 1)
        ]
        try:
            out = [one.communicate(timeout=PATIENCE)[0] for one in workers]
        finally:
            for one in workers:
                one.kill()
    return int(out[0].split()[-1]) / UPDATES / 2


def checkpoints(workload: Workload, url: str, dtype: str) -> tuple[float, float]:
    """Bytes of a snapshot, computed and measured, each on its way to the store and back."""
    trainings, run = [Training(workload, seed) for seed in (0, 1)], f"{type(workload).__name__}-{dtype}"
    computed = HostBuffer(trainings[0].model.state_dict(), dtype).nbytes
    with tempfile.TemporaryDirectory() as folder:
        codistillers = [
            Codistiller(
                CodistillConfig(dir=url, run_id=run, peer=peer, interval=1, dtype=dtype),
                model=training.model,
                build_peer=lambda: workload.build(2),
                fingerprint=fingerprint(1),
                save_dir=Path(folder) / str(peer),
            )
            for peer, training in enumerate(trainings)
        ]
        try:
            for number in range(1 + SNAPSHOTS):
                if number == 1:
                    before = carried()
                for training, codistiller in zip(trainings, codistillers, strict=True):
                    with torch.no_grad():
                        next(training.model.parameters()).mul_(0.999)
                    codistiller.begin_update(number, epoch=1)
                until_fetched(codistillers, number * computed)
            measured = (carried() - before) / SNAPSHOTS / 2 / 2
        finally:
            for codistiller in codistillers:
                codistiller.close()
    return computed, measured


def until_fetched(codistillers: list[Codistiller], size: int) -> None:
    """Wait until every peer has sent, and brought here, so many bytes."""
    _wait(lambda: all(each.metrics()[way] >= size for each in codistillers for way in ("sent", "received")), 0.05)


def in_a_group(members: int) -> tuple[float, float]:
    """Bytes that each of so many workers sends with the logits of 32 images, computed and measured."""
    logits = Vision().logits
    size = payload_bytes(logits, "float32", 0)
    store, barrier, found = dist.HashStore(), threading.Barrier(members), []

    def member(me: int) -> None:
        group = Group(store, range(members), me, 1, 60.0)
        barrier.wait()
        if me == 0:
            found.append(carried())
        barrier.wait()
        for number in range(UPDATES):
            group.exchange(Header(1, number, logits, "float32", 0, 0, size), torch.zeros(size, dtype=torch.uint8), 60)
        barrier.wait()
        if me == 0:
            found.append(carried())
        barrier.wait()
        group.close()

    threads = [threading.Thread(target=member, args=(me,)) for me in range(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (members - 1) * size, (found[1] - found[0]) / UPDATES / members


def everything() -> Iterator[Found]:
    from tests.fixtures_store import S3Server

    for name, workload in TRAININGS.items():
        gradient = sum(p.numel() * p.element_size() for p in workload.build(0).parameters())
        yield name, "all_reduce", gradient, on_the_wire(name, "all_reduce")
        for dtype, topk in WIRES:
            kind = f"prediction, {dtype}" + (f", top {topk}" if topk else "")
            yield name, kind, payload_bytes(workload.logits, dtype, topk), on_the_wire(name, "prediction", dtype, topk)
    for members in MEMBERS:
        yield "resnet18", f"prediction, float32, {members} peers", *in_a_group(members)
    server = S3Server()
    os.environ.update(server.environment())
    url = f"s3://{server.bucket()}/exchange"
    for name, workload in TRAININGS.items():
        for dtype in ("float32", "bfloat16"):
            yield name, f"a snapshot, {dtype}", *checkpoints(workload, url, dtype)
    server.stop()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(*sys.argv[1:])
    else:
        switch_on()
        print(json.dumps(list(everything())))

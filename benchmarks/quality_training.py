"""One training of the question `quality`: two workers (alone: one) with a clock, weights looked at afterwards.

`train` is resumable: what a finished training found is kept in a folder whose name holds the digest of its settings.
Weights are copied in memory at every look and judged when the training is over, so the clock shows training alone. It
starts when all workers are connected and have their batches, and no method is given time to exchange while it stands.
A worker that fails ends the training with an error that names its log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from benchmarks import quality_tasks
from benchmarks.contenders import Options, make
from benchmarks.links import carried, hosts
from benchmarks.quality_tasks import TASKS, Task, quiet
from benchmarks.s3_server import serving
from recipes.embedded.processes import Command, ProcessFailed, free_port, loopback_interface, run_all
from recipes.embedded.steps import digest, step

PEERS = ("checkpoint", "prediction", "alone")  # each worker has a model of its own; of the others the mean is judged
START_SECONDS = 120.0
LIMIT_SECONDS = 1200.0
PORT = 29500  # on rank 0's own host
LOOKS = "looks-{}.pt"  # a worker's weights, until they are judged


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a training depends on.

    Attributes:
        part: of the data that its models are judged on.
        options: of its method, where they are not the task's.
        mbit: of each worker's link; None: over loopback, exchanging through a folder.
        updates: fewer than the task's.
    """

    task: str
    method: str
    seed: int
    lr: float
    part: str
    dropout: float = 0.0
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    mbit: Optional[float] = None
    updates: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "regime": TASKS[self.task].settings}

    @property
    def folder(self) -> Path:
        links = "loopback" if self.mbit is None else f"{self.mbit:g}mbit"
        name = f"{self.task}-{links}-{self.method}-lr-{self.lr:g}-seed-{self.seed}-{digest(self.settings)}"
        return quality_tasks.DATA / "quality" / name

    @property
    def world(self) -> int:
        return 1 if self.method == "alone" else 2

    @property
    def steps(self) -> int:
        return self.updates or TASKS[self.task].updates


def train(trial: Trial) -> dict[str, Any]:
    """Train, or remember: `models`, with update, seconds and qualities at every look, and each worker's `metrics`."""
    TASKS[trial.task].prepare()

    def build(folder: Path) -> Mapping[str, Any]:
        (folder / "trial.json").write_text(json.dumps(dataclasses.asdict(trial)), encoding="utf-8")
        if trial.mbit is None:
            _on_loopback(trial, folder)
        else:
            _on_hosts(trial, trial.mbit, folder)
        try:
            return judge(trial, folder)
        finally:
            for rank in range(trial.world):
                (folder / LOOKS.format(rank)).unlink(missing_ok=True)

    return step(trial.folder, trial.settings, build)


def _on_loopback(trial: Trial, folder: Path) -> None:
    env = _environment("127.0.0.1", free_port(), str(folder.resolve() / "exchange"))
    env["GLOO_SOCKET_IFNAME"] = loopback_interface()
    run_all(
        [Command(f"worker {rank}", _command(folder, rank), _log(folder, rank), env) for rank in range(trial.world)],
        limit=LIMIT_SECONDS,
    )


def _on_hosts(trial: Trial, mbit: float, folder: Path) -> None:
    """A worker a host, the store on one more; all behind links of the same speed."""
    with hosts(1 + trial.world, mbit) as (*places, store), serving(store) as bucket, contextlib.ExitStack() as ends:
        own = _environment(places[0].address, PORT, f"{bucket.url}/run")
        workers = []
        for rank, place in enumerate(places):
            log = ends.enter_context(open(_log(folder, rank), "wb"))
            workers.append(
                place.start(
                    _command(folder, rank),
                    {**os.environ, **bucket.environment, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
            ends.callback(workers[-1].wait)
            ends.callback(workers[-1].kill)
        _wait(workers, folder)


def _wait(workers: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    """Until all have ended well.

    Raises:
        ProcessFailed: one has not, or not in time.
    """
    end = time.monotonic() + LIMIT_SECONDS
    while any(worker.poll() is None for worker in workers) and time.monotonic() < end:
        if any(worker.returncode for worker in workers):
            break
        time.sleep(0.1)
    for rank, worker in enumerate(workers):
        if worker.poll() != 0:
            raise ProcessFailed(f"worker {rank} failed or took more than {LIMIT_SECONDS:.0f} s: {_log(folder, rank)}")


def _environment(address: str, port: int, store: str) -> dict[str, str]:
    return {"RENDEZVOUS": f"tcp://{address}:{port}", "STORE_URL": store, "OMP_NUM_THREADS": "1"}


def _command(folder: Path, rank: int) -> list[str]:
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.quality_training"]
    return [*program, str(quality_tasks.DATA.resolve()), str(folder.resolve()), str(rank)]


def _log(folder: Path, rank: int) -> Path:
    return folder / f"worker-{rank}.log"


def judge(trial: Trial, folder: Path) -> dict[str, Any]:
    """What the workers' weights are worth, look by look."""
    task = TASKS[trial.task]
    workers = [torch.load(folder / LOOKS.format(rank), weights_only=True) for rank in range(trial.world)]
    model = task.build(trial.seed, trial.dropout)
    own = [[worker] for worker in workers] if trial.method in PEERS else [workers]
    return {
        "models": [_judged(trial, task, model, those) for those in own],
        "metrics": [worker["metrics"] for worker in workers],
    }


def _judged(trial: Trial, task: Task, model: nn.Module, workers: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """One model: the mean of its workers' weights, when the last of them was there."""
    found: dict[str, list[float]] = {"update": [look["update"] for look in workers[0]["looks"]]}
    for looks in zip(*(worker["looks"] for worker in workers), strict=True):
        found.setdefault("seconds", []).append(max(look["seconds"] for look in looks))
        model.load_state_dict(mean([look["state"] for look in looks]))
        for name, value in task.judge(model, trial.seed, trial.part).items():
            found.setdefault(name, []).append(value if math.isfinite(value) else task.guessing)
    return found


def mean(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Of several workers' weights and statistics; counters are the first one's."""
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in states[0].items()
    }


def work(trial: Trial, folder: Path, rank: int) -> None:
    """Be one worker: train, and leave the looks in the folder."""
    task, own = TASKS[trial.task], trial.method in PEERS
    order = rank if own and trial.method != "prediction" else 0
    shard, shards = (0, 1) if own else (rank, trial.world)
    batches = task.batches(trial.seed, order, shard, shards)[: trial.steps]
    model = task.build(trial.seed + 1000 * rank * own, trial.dropout)
    optimizer = task.optimizer(model)
    contender = make(
        trial.method,
        model=model,
        optimizer=optimizer,
        build=lambda: task.build(0, trial.dropout),
        rank=rank,
        world=trial.world,
        rendezvous=os.environ["RENDEZVOUS"],
        store_url=os.environ["STORE_URL"],
        folder=folder / f"worker-{rank}",
        options=options(trial),
    )
    torch.manual_seed(trial.seed + 1000 * rank)  # dropout
    _meet(folder, rank, trial.world)
    looks = [{"update": 0, "seconds": 0.0, "state": _copy(model)}]
    sent, began = _sent(trial), time.perf_counter()
    for update, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = task.rate(update, trial.lr)
        contender.update(batch, task.loss)
        if (update + 1) % task.every == 0 or update + 1 == len(batches):
            looks.append({"update": update + 1, "seconds": time.perf_counter() - began, "state": _copy(model)})
    metrics = {"sent": _sent(trial) - sent, **contender.metrics()}
    torch.save({"looks": looks, "metrics": metrics}, folder / LOOKS.format(rank))
    contender.close()


def options(trial: Trial) -> Options:
    """The task's, but for what the trial says; averages of post-local-sgd fall on updates that are looked at."""
    task = TASKS[trial.task]
    given = {"period": task.interval, "burn_in": task.burn_in, **trial.options}
    if trial.method == "post-local-sgd":
        given["warm_up"] = given["period"] - 1
    return Options(**given)


def _meet(folder: Path, rank: int, world: int) -> None:
    """Wait until every worker is here."""
    (folder / f"here-{rank}").touch()
    end = time.monotonic() + START_SECONDS
    while not all((folder / f"here-{other}").exists() for other in range(world)):
        if time.monotonic() > end:
            raise TimeoutError(f"the other workers did not come within {START_SECONDS:.0f} s")
        time.sleep(0.005)


def _sent(trial: Trial) -> int:
    """Bytes that this worker's host has sent so far; 0 over loopback, which others use too."""
    return 0 if trial.mbit is None else carried()[0]


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def main(data: str, folder: str, rank: str) -> None:
    quiet()
    quality_tasks.DATA = Path(data)
    trial = Trial(**json.loads((Path(folder) / "trial.json").read_text(encoding="utf-8")))
    work(trial, Path(folder), int(rank))


if __name__ == "__main__":
    main(*sys.argv[1:])

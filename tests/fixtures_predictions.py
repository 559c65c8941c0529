"""Real processes that train a tiny model in step with others, exchanging predictions: what they do lies in a plan.

A process that is started again with the same plan goes on from its checkpoint. Every micro-batch leaves a record.
`TrainingProcesses` forks them from one process that has imported torch already, and ends them all when it is left.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimisers import it at their first step: here, once for all processes
import torch.distributed as dist
from torch import nn

from codistill import CodistillConfig, Codistiller
from codistill.exchange import heartbeat, membership
from codistill.exchange.prediction import board, forming, predictions, rendezvous
from codistill.exchange.protocol import Position
from tests.faults.tiny_peer import ForkServer, Process, lines
from tests.fixtures_peers import CLASSES, FINGERPRINT, RUN, Tiny

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "FATAL"}
SAMPLES = 6
SAVE_EVERY = 5


@dataclass
class Plan:
    """What a peer does.

    Attributes:
        folder: of this peer.
        options: of `CodistillConfig`; without any it trains alone, without a codistiller.
        seed: of its initial weights.
        data_seed: of the batches that it sees.
        updates: train so many, or until the file `stop` is in the folder.
        accumulate: micro-batches in an update.
        per_epoch: micro-batches in an epoch.
        workers: data-parallel workers.
        pause: seconds between micro-batches.
        skips: micro-batches, from 1, that this peer goes through without asking for a penalty.
        lead: seconds between a proposal and its start.
    """

    folder: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    data_seed: int = 1
    updates: int = 100_000
    accumulate: int = 1
    per_epoch: int = 100_000
    workers: int = 1
    pause: float = 0.01
    skips: list[int] = field(default_factory=list)
    lead: float = 0.5

    def file(self, name: str, rank: int = 0) -> Path:
        return Path(self.folder) / f"{name}-{rank}"


class Training:
    """One worker's training, from its checkpoint to its end."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.rank = plan, rank
        torch.manual_seed(plan.seed)
        self.model = Tiny()
        self.trained: nn.Module = nn.parallel.DistributedDataParallel(self.model) if plan.workers > 1 else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.update, self.epoch, self.batch, self.seen = 0, 1, 0, 0
        self.codistiller = self._codistiller() if plan.options else None
        self._resume()
        torch.manual_seed(1000 * plan.seed + 10 * rank + self.update)

    def run(self) -> None:
        with open(self.plan.file("records", self.rank), "a", encoding="utf-8") as records:
            records.write(json.dumps({"start": self.update}) + "\n")
            while self._goes_on():
                for record in self._update():
                    records.write(json.dumps(record) + "\n")
                records.flush()
        if self.codistiller is not None:
            self.codistiller.finish(self.update)
        if self.rank == 0:
            torch.save(self.model.state_dict(), Path(self.plan.folder) / "final")
        self.plan.file("end", self.rank).write_text(json.dumps(self._told()))

    def _codistiller(self) -> Codistiller:
        return Codistiller(
            CodistillConfig(**self.plan.options),
            model=self.model,
            build_peer=Tiny,
            fingerprint=FINGERPRINT,
            save_dir=Path(self.plan.folder) / "save",
        )

    def _goes_on(self) -> bool:
        goes_on = self.update < self.plan.updates and not (Path(self.plan.folder) / "stop").exists()
        if self.plan.workers > 1:
            word = torch.tensor([goes_on])
            dist.broadcast(word, src=0)
            goes_on = bool(word.item())
        return goes_on

    def _update(self) -> list[dict[str, Any]]:
        records, target = [], None
        if self.codistiller is not None:
            self.codistiller.begin_update(self.update, self.epoch)
        self.optimizer.zero_grad()
        for _ in range(min(self.plan.accumulate, self.plan.per_epoch - self.batch)):
            position = Position(self.epoch, self.batch)
            if self.codistiller is not None:
                target = self.codistiller.begin_batch(position) or target
            records.append(self._micro_batch(position))
            self.batch += 1
            time.sleep(self.plan.pause)
        self.optimizer.step()
        self.update += 1
        if target is not None and target > Position(self.epoch, self.batch):
            records[-1]["skip"] = [target.epoch, target.batch]
            self.batch = self.plan.per_epoch if target.epoch > self.epoch else min(target.batch, self.plan.per_epoch)
        if self.batch >= self.plan.per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        if self.update % SAVE_EVERY == 0 and self.rank == 0:
            self._save()
        return records

    def _micro_batch(self, position: Position) -> dict[str, Any]:
        seed = 10**8 * self.plan.data_seed + 10**6 * position.epoch + 10 * position.batch + self.rank
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(SAMPLES, 4, generator=generator)
        target = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        began = time.monotonic()
        logits = self.trained(inputs)
        loss = nn.functional.cross_entropy(logits, target)
        total, penalty, used = loss, None, 0.0
        self.seen += 1
        if self.codistiller is not None and self.codistiller.active and self.seen not in self.plan.skips:
            found = self.codistiller.penalty(logits, lambda peer: peer(inputs), inputs=(inputs, target))
            penalty, used = found.loss.item(), found.peers.item()
            total = loss + self.codistiller.alpha * found.loss / SAMPLES
        (total / self.plan.accumulate).backward()
        return {
            "update": self.update,
            "epoch": position.epoch,
            "batch": position.batch,
            "loss": loss.item(),
            "penalty": penalty,
            "used": used,
            "logits": logits.tolist(),
            "seconds": time.monotonic() - began,
            "causes": self._causes(),
        }

    def _causes(self) -> dict[str, int]:
        return {} if self.codistiller is None else dict(self.codistiller._incidents.counts)

    def _told(self) -> dict[str, Any]:
        metrics = self.codistiller.metrics() if self.codistiller else {}
        left = [thread.name for thread in threading.enumerate() if thread.name.startswith("codistill")]
        return {"update": self.update, "causes": self._causes(), "metrics": metrics, "left": left}

    def _save(self) -> None:
        path = Path(self.plan.folder) / "checkpoint"
        unfinished = path.with_name(f"unfinished-{os.getpid()}")  # a process that was replaced may save, too
        state = {"place": [self.update, self.epoch, self.batch], "model": self.model.state_dict()}
        if self.codistiller is not None:
            state["codistill"] = self.codistiller.state_dict()
            self.codistiller.checkpoint_saved(self.update)
        torch.save(state, unfinished)
        unfinished.replace(path)

    def _resume(self) -> None:
        path = Path(self.plan.folder) / "checkpoint"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.update, self.epoch, self.batch = state["place"]
            self.model.load_state_dict(state["model"])
            if self.codistiller is not None:
                self.codistiller.load_state_dict(state["codistill"])


def hasten(lead: float) -> None:
    """Shorten the pauses of the background threads."""
    rendezvous.BEAT_SECONDS, rendezvous.SLOW_BEAT_SECONDS, rendezvous.LEAD_SECONDS = 0.1, 0.2, lead
    rendezvous.SETTLE_SECONDS, rendezvous.PRESENT_SECONDS, rendezvous.CLAIM_SECONDS = 0.5, 3.0, 0.5
    heartbeat.HEARTBEAT_SECONDS = 0.2
    predictions.BACK_OFF, predictions.BACK_OFF_DIFFERENT = 0.5, 1.0
    board.BIND_SECONDS = 3.0
    forming.LOOK_SECONDS = 0.02
    membership.Membership.join.__defaults__ = (0.5,)


def _train(plan: Plan, rank: int, start: int) -> None:
    hasten(plan.lead)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    if plan.workers > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{plan.folder}/rendezvous-{start}",
            rank=rank,
            world_size=plan.workers,
            timeout=timedelta(seconds=60),
        )
    Training(plan, rank).run()


def _serve() -> None:
    """Fork a process for every line of standard input (plan, rank, number of the start) and print its number."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        path, rank, start = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(Plan(**json.loads(Path(path).read_text())), rank, start)
        print(child, flush=True)


def _become(plan: Plan, rank: int, start: int) -> None:
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        output = os.open(plan.file("output", rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        _train(plan, rank, start)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Job:
    """One peer's processes."""

    def __init__(self, starter: TrainingProcesses, plan: Plan) -> None:
        self.plan, self._starter, self._starts = plan, starter, 0
        self.processes: list[Process] = []
        Path(plan.folder).mkdir(parents=True)
        (Path(plan.folder) / "plan.json").write_text(json.dumps(dataclasses.asdict(plan)))

    def start(self) -> Job:
        self._starts += 1
        path = str(Path(self.plan.folder) / "plan.json")
        self.processes = [self._starter.fork(path, rank, self._starts) for rank in range(self.plan.workers)]
        return self

    def signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def stop(self) -> None:
        (Path(self.plan.folder) / "stop").touch()

    def end(self, rank: int = 0, seconds: float = 40.0) -> dict[str, Any]:
        """How it ended, by itself."""
        assert self.processes[rank].wait(seconds), f"still running: {self.output(rank)}"
        assert self.plan.file("end", rank).exists(), self.output(rank)
        return json.loads(self.plan.file("end", rank).read_text())

    def records(self, rank: int = 0) -> list[dict[str, Any]]:
        """Every micro-batch."""
        return [line for line in lines(self.plan.file("records", rank)) if "batch" in line]

    def exchanged(self, rank: int = 0) -> list[dict[str, Any]]:
        """The micro-batches with a peer's logits."""
        return [record for record in self.records(rank) if record["used"] > 0]

    def output(self, rank: int = 0) -> str:
        return self.plan.file("output", rank).read_text()[-4000:]

    def until(self, condition: Callable[[Job], Any], seconds: float = 30.0) -> Any:
        """What `condition` gives once it is true."""
        end = time.monotonic() + seconds
        while not (found := condition(self)):
            assert time.monotonic() < end, f"what was waited for did not happen: {self.output()}"
            time.sleep(0.05)
        return found


class TrainingProcesses(ForkServer):
    """Starts jobs, quickly, and ends those that still run when it is left."""

    def __init__(self) -> None:
        super().__init__("tests.fixtures_predictions", ENVIRONMENT)

    def job(self, folder: Path, peer: int, *, options: dict[str, Any] | None = None, **plan: Any) -> Job:
        """A peer of a run over `folder`."""
        chosen = {
            "dir": str(folder / "store"),
            "run_id": RUN,
            "exchange": "prediction",
            "peer": peer,
            "interval": 10,
            "timeout": 3.0,
            **(options or {}),
        }
        name = plan.pop("name", f"peer{peer}")
        return Job(self, Plan(str(folder / name), chosen, **{"seed": peer, **plan})).start()


if __name__ == "__main__":
    _serve()

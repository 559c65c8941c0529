"""A real process that trains a tiny model with a real codistiller, told by a plan what to do and which faults to meet.

`Starter` forks such processes from one that has imported torch already. A process that is started again with the same
plan goes on from its checkpoint, and a fault that has fired does not fire again. What it did lies in its folder:
records (every update), faults (those that fired), the end (how it ended), the final parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch._dynamo  # optimisers import it at their first step: here, once for all processes
import torch.distributed as dist
from torch import Tensor, nn

from codistill import CodistillConfig, Codistiller
from codistill.exchange import heartbeat, membership, publisher
from codistill.exchange.checkpoint import fetcher
from tests.faults.faults import KINDS, Fault, Faults, read_log
from tests.fixtures_peers import CLASSES, FINGERPRINT, Tiny

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "MALLOC_ARENA_MAX": "1",  # a new thread's own arena would look like a leak of some megabytes
}
BATCH = 8
SAVE_EVERY = 10
TELL_EVERY = 100
MORE = 6  # updates after all is well again


@dataclass
class Plan:
    """What a peer is to do; JSON in a file, so that a restart is told exactly the same.

    Attributes:
        folder: of this peer; its save dir, and everything it tells.
        together: of all peers of a case; where they tell each other how far they are.
        options: of `CodistillConfig`; without any, the peer trains alone, without a codistiller.
        seed: of the initial weights and the data.
        faults: to arm, as the fields of `Fault`.
        fault_rank: the worker that meets them.
        random_faults: a seed for many more, of all kinds but kill and at all points; None: none.
        begin: when faults begin to count: at the "start", or once all peers are in "use" and have saved a checkpoint.
        logs: of fired faults, by all workers of the peer that meets them; what "recovered" waits for.
        until: train until so many "updates", or until all have "recovered" from the fault, or it is told to "stop".
        updates: see `until`; after a fault without recovery, how many more.
        recovers: whether the exchange is expected to go on after the fault.
        fires: how many faults must have fired before recovery is looked for.
        seconds: longest time until it ends by itself.
        workers: data-parallel workers.
        apart: every worker has a machine of its own, as far as it can tell.
        pause: seconds between updates.
        poll: seconds between two looks at the store.
        heartbeat: seconds between two heartbeats.
        env: additional environment.
    """

    folder: str
    together: str
    options: dict[str, Any]
    seed: int
    faults: list[dict[str, Any]] = field(default_factory=list)
    fault_rank: int = 0
    random_faults: str | None = None
    begin: str = "use"
    logs: list[str] = field(default_factory=list)
    until: str = "updates"
    updates: int = 40
    recovers: bool = True
    fires: int = 1
    seconds: float = 20.0
    workers: int = 1
    apart: bool = False
    pause: float = 0.005
    poll: float = 0.02
    heartbeat: float = 0.05
    env: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return Path(self.folder) / "plan.json"

    def file(self, name: str, rank: int = 0) -> Path:
        """What worker `rank` tells, by name: records, faults, end, resources, output."""
        return Path(self.folder) / f"{name}-{rank}"

    def write(self) -> Plan:
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        return self

    @classmethod
    def read(cls, path: Path) -> Plan:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Training:
    """One worker's training, from its checkpoint to its end."""

    def __init__(self, plan: Plan, rank: int, faults: Faults) -> None:
        self.plan, self.rank, self.faults = plan, rank, faults
        self.folder = Path(plan.folder)
        self.update = 0
        torch.manual_seed(plan.seed)
        self.model = Tiny()
        torch.manual_seed(1000 * plan.seed + rank)
        self.trained: nn.Module = nn.parallel.DistributedDataParallel(self.model) if plan.workers > 1 else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.codistiller = self._codistiller() if plan.options else None
        self.course = Course(plan)
        self.taken = 0  # snapshots taken up
        self.used: dict[str, list[int]] = {}  # by peer, incarnation and update of what is in use
        self.joined = False
        self.slowest = 0.0  # seconds of the longest update but the first, which joins the run
        self._resume()

    def run(self) -> None:
        """Train to the end."""
        with open(self.plan.file("records", self.rank), "a", encoding="utf-8") as records:
            records.write(json.dumps({"start": self.update}) + "\n")
            while self._goes_on():
                joined, began = self.joined, time.perf_counter()
                record = self._step()
                self.slowest = max(self.slowest, time.perf_counter() - began if joined else 0.0)
                records.write(json.dumps(record) + "\n")
                records.flush()
                if self.update % SAVE_EVERY == 0:
                    self._save()
                if self.update % TELL_EVERY == 0:
                    self._tell_resources()
                time.sleep(self.plan.pause)
        began = time.perf_counter()
        if self.codistiller is not None:
            self.codistiller.finish(self.update)
        self._tell_end(time.perf_counter() - began)

    def _codistiller(self) -> Codistiller:
        options = CodistillConfig(**self.plan.options)
        return Codistiller(
            options, model=self.model, build_peer=Tiny, fingerprint=FINGERPRINT, save_dir=self.folder / "save"
        )

    def _goes_on(self) -> bool:
        """Worker 0 decides, for all workers, whether there is another update, and from when on faults count."""
        goes_on, begins = self.course.look(self.update, self.used) if self.rank == 0 else (True, False)
        if self.plan.workers > 1:
            word = torch.tensor([goes_on, begins], dtype=torch.int64)
            dist.broadcast(word, src=0)
            goes_on, begins = (bool(value) for value in word.tolist())
        if begins:
            self.faults.begin()
        return goes_on and os.getppid() == _parent

    def _step(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(10**6 * self.plan.seed + 10**5 * self.rank + self.update)
        inputs = torch.randn(BATCH, 4, generator=generator)
        target = torch.randint(CLASSES, (BATCH,), generator=generator)
        self.faults.update = self.update
        if self.codistiller is not None:
            self.codistiller.begin_update(self.update, epoch=1)
        self.joined = True
        logits = self.trained(inputs)
        loss = nn.functional.cross_entropy(logits, target)
        penalty = self._penalty(inputs, logits)
        total = loss if penalty is None else loss + penalty / BATCH
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.update += 1
        return {
            "update": self.update,
            "time": time.time(),
            "loss": loss.item(),
            "penalty": None if penalty is None else penalty.item(),
            "used": self._used(),
            "causes": self._causes(),
        }

    def _penalty(self, inputs: Tensor, logits: Tensor) -> Tensor | None:
        if self.codistiller is None or not self.codistiller.active:
            return None
        return self.codistiller.alpha * self.codistiller.penalty(logits, lambda peer: peer(inputs)).loss

    def _used(self) -> dict[str, list[int]]:
        if self.codistiller is None:
            return {}
        in_use = self.codistiller.state_dict()["in_use"]
        found = {peer: [used["incarnation"], used["update"]] for peer, used in in_use.items()}
        self.taken += sum(self.used.get(peer) != used for peer, used in found.items())
        self.used = found
        return found

    def _causes(self) -> dict[str, int]:
        return {} if self.codistiller is None else dict(self.codistiller._incidents.counts)

    def _save(self) -> None:
        if self.rank == 0:
            path = self.folder / "checkpoint"
            state = {
                "update": self.update,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "codistill": self.codistiller.state_dict() if self.codistiller else None,
            }
            torch.save(state, path.with_name("unfinished"))
            path.with_name("unfinished").replace(path)
        if self.codistiller is not None:
            self.codistiller.checkpoint_saved(self.update)

    def _resume(self) -> None:
        path = self.folder / "checkpoint"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.update = state["update"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if self.codistiller is not None:
            self.codistiller.load_state_dict(state["codistill"])

    def _tell_resources(self) -> None:
        with open(self.plan.file("resources", self.rank), "a", encoding="utf-8") as file:
            file.write(json.dumps({"taken": self.taken, **resources()}) + "\n")

    def _tell_end(self, closing: float) -> None:
        told = {
            "update": self.update,
            "finite": all(bool(value.isfinite().all()) for value in self.model.state_dict().values()),
            "reached": self.course.reached,
            "taken": self.taken,
            "causes": self._causes(),
            "metrics": self.codistiller.metrics() if self.codistiller else {},
            "slowest": self.slowest,
            "closing": closing,
            "left": sorted(t.name for t in threading.enumerate() if t.name.startswith("codistill")),
            **resources(),
        }
        if self.rank == 0:
            torch.save(self.model.state_dict(), self.folder / "final")
        unfinished = self.plan.file("unfinished-end", self.rank)
        unfinished.write_text(json.dumps(told), encoding="utf-8")
        unfinished.replace(self.plan.file("end", self.rank))


class Course:
    """When faults begin to count, and when training ends."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._together = plan, Path(plan.together)
        self._end = time.monotonic() + plan.seconds
        self._begun = False
        self._mark: tuple[int, int] | None = None  # what must be surpassed to have recovered
        self._last: int | None = None  # update to end at
        self.reached = False

    def look(self, update: int, used: Mapping[str, list[int]]) -> tuple[bool, bool]:
        """Whether there is another update, and whether faults count from now on."""
        ready = bool(used) and (Path(self._plan.folder) / "checkpoint").exists()
        self._begun = self._begun or self._plan.begin == "start" or self._all("ready", ready)
        self.reached = self._is_reached(update, used)
        return not self.reached and time.monotonic() < self._end, self._begun

    def _is_reached(self, update: int, used: Mapping[str, list[int]]) -> bool:
        if self._plan.until == "updates":
            return update >= self._plan.updates
        if self._plan.until == "stop":
            return (self._together / "stop").exists()
        if self._last is None and self._recovered(used):
            self._last = update + (MORE if self._plan.recovers else self._plan.updates)
        return self._last is not None and update >= self._last

    def _recovered(self, used: Mapping[str, list[int]]) -> bool:
        """The faults fired, and every peer has taken up what was published since."""
        fired = [line for log in self._plan.logs for line in read_log(Path(log))]
        if len(fired) < self._plan.fires:
            return False
        if not self._plan.recovers:
            return True
        newest = max(((i, u) for i, u in used.values()), default=(0, 0))
        if self._mark is None:
            self._mark = newest
            if self._plan.faults == []:  # the fault is the other's: what it published before does not count
                self._mark = (newest[0], max(newest[1], fired[-1]["update"]))
        return self._all("recovered", newest > self._mark)

    def _all(self, milestone: str, mine: bool) -> bool:
        """Whether all peers have come to a milestone; tells of `mine`."""
        peer, peers = self._plan.options.get("peer", 0), self._plan.options.get("peers", 2)
        if mine:
            (self._together / f"{milestone}-{peer}").touch()
        return all((self._together / f"{milestone}-{other}").exists() for other in range(peers))


def resources() -> dict[str, int]:
    """What this process holds right now: resident bytes, threads, open files."""
    gc.collect()
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return {
        "rss": resident * os.sysconf("SC_PAGE_SIZE"),
        "anonymous": (resident - shared) * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
    }


def random_faults(seed: str, calls: int = 100_000) -> list[Fault]:
    """Faults at all points, one in 40 calls on average, of every kind but kill; the same for the same seed."""
    draw, found = random.Random(seed), []
    for point, kinds in KINDS.items():
        nth = 0
        while nth < calls:
            nth += draw.randint(1, 80)
            kind = draw.choice([kind for kind in kinds if kind != "kill"])
            found.append(Fault(point, kind, nth, seconds=draw.uniform(0.01, 0.2)))
    return found


def train(plan: Plan, rank: int, start: int) -> None:
    """What a started process does."""
    os.environ.update(plan.env)
    machine = Path(plan.folder) / f"machine-{rank if plan.apart else 0}"
    machine.mkdir(exist_ok=True)
    tempfile.tempdir = str(machine)
    fetcher.POLL_SECONDS, heartbeat.HEARTBEAT_SECONDS, publisher.RETRY_SECONDS = plan.poll, plan.heartbeat, 0.1
    membership.Membership.join.__defaults__ = (0.5,)
    if plan.workers > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{plan.folder}/rendezvous-{start}",
            rank=rank,
            world_size=plan.workers,
            timeout=timedelta(seconds=60),
        )
    log = plan.file("faults", rank)
    past = Counter((line["point"], line["kind"]) for line in read_log(log))
    faults = [Fault(**one) for one in plan.faults] if rank == plan.fault_rank else []
    faults = [fault for fault in faults if past[fault.point, fault.kind] < fault.times]
    if plan.random_faults is not None:
        faults += random_faults(f"{plan.random_faults} {start}")
    with Faults(log, peer=plan.options.get("peer", 0), faults=faults, counting=False) as armed:
        Training(plan, rank, armed).run()


_parent = 0


def _serve() -> None:
    """Fork a process for every line of standard input (plan, rank, number of the start) and print its number."""
    global _parent
    _parent = os.getpid()
    torch.set_num_threads(1)
    gc.freeze()  # what is here already is nobody's leak, and need not be looked at again
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the dead
    for line in sys.stdin:
        path, rank, start = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(Plan.read(Path(path)), rank, start)
        print(child, flush=True)


def _become(plan: Plan, rank: int, start: int) -> None:
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        output = os.open(plan.file("output", rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        train(plan, rank, start)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Process:
    """A started worker, known by a handle that no other process will ever have."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._handle = os.pidfd_open(pid)
        except ProcessLookupError:  # ended already
            self._handle = -1

    def running(self) -> bool:
        if self._handle >= 0 and select.select([self._handle], [], [], 0)[0]:
            os.close(self._handle)
            self._handle = -1
        return self._handle >= 0

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so many seconds."""
        if self._handle >= 0:
            select.select([self._handle], [], [], seconds)
        return not self.running()

    def send(self, number: signal.Signals) -> None:
        if self.running():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.send(signal.SIGKILL)
        self.wait(10)


Served = TypeVar("Served", bound="ForkServer")


class ForkServer:
    """Forks processes from one that has imported what they need, and ends those that still run when it is left.

    Args:
        module: run as a script, it forks one for every line of JSON that it reads, and writes its process id.
        environment: what its environment has in addition.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._module, self._environment = module, environment
        self._lock = threading.Lock()
        self._started: list[Process] = []

    def __enter__(self: Served) -> Served:
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **self._environment},
        )
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._started:
            process.kill()
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def fork(self, path: str, rank: int, start: int) -> Process:
        """Worker `rank` of the plan at `path`, for the `start`th time."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with self._lock:
            print(json.dumps([path, rank, start]), file=self._server.stdin, flush=True)
            process = Process(int(self._server.stdout.readline()))
            self._started.append(process)
        return process


class Starter(ForkServer):
    """Starts workers of tiny peers."""

    def __init__(self) -> None:
        super().__init__("tests.faults.tiny_peer", ENVIRONMENT)

    def start(self, plan: Plan, rank: int, start: int) -> Process:
        """Worker `rank` of a plan that was written, for the `start`th time."""
        return self.fork(str(plan.path), rank, start)


class PeerProcesses:
    """One peer's workers, started together and, as by a launcher, ended together when one of them dies."""

    def __init__(self, starter: Starter, plan: Plan) -> None:
        self.plan = plan.write()
        self.starts = 0
        self._starter = starter
        self._processes: list[Process] = []

    def start(self) -> None:
        self.starts += 1
        self._processes = [self._starter.start(self.plan, rank, self.starts) for rank in range(self.plan.workers)]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def send(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send(number)

    def running(self) -> bool:
        return any(process.running() for process in self._processes)

    def tend(self) -> None:
        """If a worker has died without an end, kill the others."""
        for rank, process in enumerate(self._processes):
            if not process.running() and not self.plan.file("end", rank).exists():
                self.kill()

    def ended(self) -> bool:
        """Whether every worker has come to its end."""
        return not self.running() and all(self.plan.file("end", rank).exists() for rank in range(self.plan.workers))

    def end(self, rank: int = 0) -> dict[str, Any]:
        return json.loads(self.plan.file("end", rank).read_text(encoding="utf-8"))

    def records(self, rank: int = 0) -> list[dict[str, Any]]:
        """Every update, and a line {"start": update} for every start; the last may be missing its end."""
        return lines(self.plan.file("records", rank))

    def fired(self) -> list[dict[str, Any]]:
        return [line for rank in range(self.plan.workers) for line in read_log(self.plan.file("faults", rank))]

    def causes(self) -> dict[str, int]:
        """Incidents by cause, of all workers and starts."""
        total: Counter[str] = Counter()
        for rank in range(self.plan.workers):
            counts: dict[str, int] = {}
            end = [self.end(rank)] if self.plan.file("end", rank).exists() else []
            for line in [*self.records(rank), *end, {"start": 0}]:
                if "start" in line:
                    total.update(counts)
                counts = line.get("causes", {})
        return dict(total)

    def output(self) -> str:
        """The ends of what the workers wrote."""
        files = [self.plan.file("output", rank) for rank in range(self.plan.workers)]
        return "\n".join(file.read_text(encoding="utf-8")[-1500:] for file in files if file.exists())

    def final(self) -> dict[str, Tensor]:
        return torch.load(Path(self.plan.folder) / "final", weights_only=True)


def lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of JSON; a killed writer may have left half a one."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            found.append(json.loads(line) if line.endswith("\n") else None)
    return [line for line in found if line is not None]


def wait_for(condition: Callable[[], Any], seconds: float, pause: float = 0.02) -> bool:
    """Whether `condition` came true within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


if __name__ == "__main__":
    _serve()

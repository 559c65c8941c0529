"""Ways for n workers to train together, each behind the same few calls: torch's own, torchft's, ours, and none.

`make(method, ...)` gives a `Contender`, whose `update(batch, loss)` does one optimiser step on this worker's own batch,
with all that the method does at a step. What goes wrong is raised; only ours go on without their peers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from benchmarks.workloads import Batch, logits_of
from codistill import CodistillConfig, Codistiller, Position, fingerprint

LONGEST = timedelta(minutes=10)  # for one collective, over the slowest link
MEETING_SECONDS = 120.0
Loss = Callable[[Tensor, Batch], Tensor]


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be tuned; a method looks at its own.

    Attributes:
        period: updates between two averages (post-local-sgd, diloco) or two snapshots (checkpoint).
        warm_up: updates that average plain gradients first (powersgd, at least 2; post-local-sgd).
        powersgd_rank: of the matrices that powersgd sends.
        outer_lr: of diloco's outer Nesterov SGD.
        outer_momentum: of the same.
        alpha: weight of the penalty (checkpoint, prediction).
        temperature: of the same.
        burn_in: updates without the penalty at the start (checkpoint).
        dtype: of the weights or logits that travel (checkpoint, prediction).
    """

    period: int = 100
    warm_up: int = 10
    powersgd_rank: int = 2
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    alpha: float = 1.0
    temperature: float = 1.0
    burn_in: int = 0
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Worker:
    """One of those that train together.

    Attributes:
        model: trained in place. All but ours, and alone, start from rank 0's parameters.
        optimizer: of the model's parameters; its learning rate may be changed between updates.
        build: gives another module like the model (checkpoint).
        rank: number of this worker.
        world: how many there are.
        rendezvous: tcp://HOST:PORT, HOST being rank 0's address and PORT free there.
        store_url: of a folder or bucket of this run alone (checkpoint).
        folder: of this worker alone.
        options: what may be tuned.
    """

    model: nn.Module
    optimizer: Optimizer
    build: Callable[[], nn.Module]
    rank: int
    world: int
    rendezvous: str
    store_url: str
    folder: Path
    options: Options


class Contender(Protocol):
    """What the questions know of a method.

    Attributes:
        model: what is evaluated; with post-local-sgd and diloco the workers' differ between two averages.
        same_batch: every worker must be given the same batches, not its own.
    """

    model: nn.Module
    same_batch: bool

    def update(self, batch: Batch, loss: Loss) -> None:
        """One optimiser step."""

    def metrics(self) -> dict[str, float]:
        """What there is to tell; of ours: peers, staleness in updates, incidents, skipped, exchanges."""

    def close(self, finish: bool = True) -> None:
        """The end, for all workers at the same update: a normal one, or a hasty one."""


class Alone:
    """A plain loop, and what others make of it."""

    same_batch = False

    def __init__(self, worker: Worker) -> None:
        self.model, self._optimizer = worker.model, worker.optimizer
        self._trained: nn.Module = worker.model

    def update(self, batch: Batch, loss: Loss) -> None:
        self._optimizer.zero_grad()
        loss(logits_of(self._trained, batch.inputs), batch).backward()
        self._optimizer.step()

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self, finish: bool = True) -> None:
        pass


class DataParallel(Alone):
    """torch's DistributedDataParallel over gloo; buffers stay each worker's own."""

    bucket_mb: Optional[int] = None

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        join(worker)
        self._trained = self._wrapped = DistributedDataParallel(
            worker.model, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=self.bucket_mb
        )

    def close(self, finish: bool = True) -> None:
        dist.destroy_process_group()


class HalfGradients(DataParallel):
    """Gradients travel in float16."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)


class PowerSGD(DataParallel):
    """Gradients travel as low-rank matrices, with error feedback and warm start (Vogels et al. 2019, 1905.13727)."""

    bucket_mb = 1 << 20  # all in one: the follow-up all_reduces of two buckets meet in another order on each worker

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=worker.options.powersgd_rank,
            start_powerSGD_iter=worker.options.warm_up,
        )
        self._wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


class PostLocalSGD(DataParallel):
    """After the warm-up workers train on their own, averaging parameters now and then (Lin et al. 2018, 1808.07217)."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        options = worker.options
        state = post_localSGD_hook.PostLocalSGDState(
            process_group=None,
            subgroup=None,
            start_localSGD_iter=options.warm_up,
            post_local_gradient_allreduce=False,
        )
        self._wrapped.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
        averager = PeriodicModelAverager(period=options.period, warmup_steps=options.warm_up)
        self._optimizer = PostLocalSGDOptimizer(worker.optimizer, averager)


class DiLoCo(Alone):
    """torchft's DiLoCo (Douillard et al. 2023, 2311.08105); each worker is a replica group, rank 0 the lighthouse."""

    def __init__(self, worker: Worker) -> None:
        from torchft import Manager, ProcessGroupGloo
        from torchft.coordination import LighthouseServer
        from torchft.local_sgd import DiLoCo as TorchftDiLoCo

        super().__init__(worker)
        join(worker)
        for tensor in worker.model.state_dict().values():
            dist.broadcast(tensor, src=0)
        address = own_address(worker.rendezvous)
        self._lighthouse = LighthouseServer(bind="[::]:0", min_replicas=worker.world) if worker.rank == 0 else None
        port = [urlsplit(self._lighthouse.address()).port if self._lighthouse else 0]
        dist.broadcast_object_list(port, src=0)
        self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        self._manager = Manager(
            pg=ProcessGroupGloo(timeout=LONGEST),
            load_state_dict=worker.model.load_state_dict,
            state_dict=worker.model.state_dict,
            min_replica_size=worker.world,
            use_async_quorum=False,
            timeout=LONGEST,
            quorum_timeout=LONGEST,
            rank=0,
            world_size=1,
            store_addr=address,
            store_port=self._store.port,
            lighthouse_addr=f"http://{urlsplit(worker.rendezvous).hostname}:{port[0]}",
            replica_id=f"worker{worker.rank}",
            hostname=address,
            init_sync=False,
        )
        options = worker.options
        outer = torch.optim.SGD(
            worker.model.parameters(), lr=options.outer_lr, momentum=options.outer_momentum, nesterov=True
        )
        self._diloco = TorchftDiLoCo(
            self._manager, [worker.model], worker.optimizer, outer, sync_every=options.period, use_bucketization=True
        )
        self._diloco.__enter__()

    def metrics(self) -> dict[str, float]:
        return {"exchanges": self._manager.current_step()}

    def close(self, finish: bool = True) -> None:
        self._diloco.__exit__(None, None, None)
        if finish:
            dist.barrier()
        self._manager.shutdown(wait=finish)
        if self._lighthouse is not None:
            self._lighthouse.shutdown()
        dist.destroy_process_group()


class Codistilled(Alone):
    """Ours; exchange by checkpoint: each peer has its own batches."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._codistiller = Codistiller(
            self._config(worker),
            model=worker.model,
            build_peer=worker.build,
            fingerprint=fingerprint(1),  # in a benchmark all peers have the same classes
            save_dir=worker.folder,
        )
        self._updates = self._exchanges = 0
        self._peers = self._staleness = 0.0

    def update(self, batch: Batch, loss: Loss) -> None:
        self._begin()
        self._optimizer.zero_grad()
        self._codistiller.predict_early(lambda peer: logits_of(peer, batch.inputs))
        logits = logits_of(self.model, batch.inputs)
        total = loss(logits, batch)
        if self._codistiller.active:
            mask = batch.mask
            found = self._codistiller.penalty(logits, lambda peer: logits_of(peer, batch.inputs), mask, batch.inputs)
            total = total + self._codistiller.alpha * found.loss / mask.sum()
        total.backward()
        self._optimizer.step()
        self._updates += 1

    def metrics(self) -> dict[str, float]:
        now = self._codistiller.metrics()
        names = ("peers", "staleness", "incidents", "skipped")
        return {**{name: now[name] for name in names}, "exchanges": self._exchanges}

    def close(self, finish: bool = True) -> None:
        if finish:
            self._codistiller.finish(self._updates)
        else:
            self._codistiller.close()

    def _config(self, worker: Worker) -> CodistillConfig:
        return CodistillConfig(dir=worker.store_url, burn_in=worker.options.burn_in, **shared_config(worker))

    def _begin(self) -> None:
        """Between two updates; something new was taken up where the staleness does not grow."""
        self._codistiller.begin_update(self._updates, epoch=1)
        now = self._codistiller.metrics()
        self._exchanges += now["peers"] > 0 and (self._peers == 0 or now["staleness"] <= self._staleness)
        self._peers, self._staleness = now["peers"], now["staleness"]


class Predicting(Codistilled):
    """Ours; exchange by prediction: all peers go through the same batches in step, from the first update on."""

    same_batch = True

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._position = Position(1, 0)
        self._meet()

    def _config(self, worker: Worker) -> CodistillConfig:
        return CodistillConfig(exchange="prediction", rendezvous=worker.rendezvous, **shared_config(worker))

    def _begin(self) -> None:
        if not self._waiting:
            self._advance()
        self._waiting = False
        self._exchanges += self._codistiller.active

    def _meet(self) -> None:
        """Go through batches that are none until the peers are together; the first update follows right there."""
        end = time.monotonic() + MEETING_SECONDS
        while not self._codistiller.active:
            if time.monotonic() > end:
                raise TimeoutError(f"the peers did not meet within {MEETING_SECONDS:.0f} s")
            self._advance()
            time.sleep(0.02)
            self._updates += 1
        self._waiting = True

    def _advance(self) -> None:
        self._codistiller.begin_update(self._updates, epoch=1)
        further = self._codistiller.begin_batch(self._position)
        self._position = further or Position(1, self._position.batch + 1)


def shared_config(worker: Worker) -> dict[str, Any]:
    """What both kinds of exchange are told."""
    options = worker.options
    return {
        "peer": worker.rank,
        "peers": worker.world,
        "interval": options.period,
        "alpha": options.alpha,
        "temperature": options.temperature,
        "dtype": options.dtype,
    }


def join(worker: Worker) -> None:
    """Open torch's process group."""
    dist.init_process_group(
        "gloo", init_method=worker.rendezvous, rank=worker.rank, world_size=worker.world, timeout=LONGEST
    )


def own_address(rendezvous: str) -> str:
    """By which others reach us: that of the interface that leads to the meeting place."""
    place = urlsplit(rendezvous)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((place.hostname, place.port))  # sends nothing
        return str(probe.getsockname()[0])


def has_torchft() -> bool:
    """Whether `diloco` can be had: torchft is an extra that few need."""
    return importlib.util.find_spec("torchft") is not None


METHODS: Mapping[str, Callable[[Worker], Contender]] = {
    "ddp": DataParallel,
    "ddp-fp16": HalfGradients,
    "powersgd": PowerSGD,
    "post-local-sgd": PostLocalSGD,
    "diloco": DiLoCo,
    "checkpoint": Codistilled,
    "prediction": Predicting,
    "alone": Alone,
}


def make(
    method: str,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    build: Callable[[], nn.Module],
    rank: int,
    world: int,
    rendezvous: str,
    store_url: str,
    folder: Path,
    options: Optional[Options] = None,
) -> Contender:
    """A worker of `method`, one of `METHODS`; returns once all are connected. See `Worker` for the rest."""
    return METHODS[method](
        Worker(model, optimizer, build, rank, world, rendezvous, store_url, folder, options or Options())
    )

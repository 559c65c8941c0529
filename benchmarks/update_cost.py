"""How long does an update with codistillation take beside a plain one?

A plain update, a codistilled one and, with one peer, timm's `LogitDistillationTask` with the same network as teacher
take turns on one batch; who goes first rotates. Ratios are of the same round, the spread is that of the rounds. The
networks are trained by the plug-in's own task, the Transformers by the core in a plain loop; snapshots are exchanged
before, as an update between two boundaries is what is measured. A network's own forward pass without autograd takes its
turn too ("forward", as a share of the plain update): were the peers run just as they are, a codistilled update could
not cost less than 1 + peers × forward. A GPU gets batches 16 times as large, so that it has something to do.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch
from timm.task import ClassificationTask, LogitDistillationTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.record import Row
from benchmarks.workloads import Training, Translation, Vision, Workload, exchanging, logits_of, side_by_side
from timm_codistill import CodistillationTask, add_arguments

TOLERANCE = 0.08
ROUNDS = 24
INTERVAL = 20
BATCHES = {"cpu": 1, "cuda": 16}
PLAIN, CODISTILLED, DISTILLED, FORWARD = "plain", "codistilled", "LogitDistillationTask", "forward"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    workload: Workload
    peers: int = 1  # others than oneself
    bfloat16: bool = False
    compiled: bool = False
    goal: Optional[float] = None

    @property
    def name(self) -> str:
        how = f"{', bfloat16' if self.bfloat16 else ''}{', compiled' if self.compiled else ''}"
        return f"{self.workload.name}{how}, {self.peers} peer{'s' if self.peers > 1 else ''}"

    def times(self, factor: int) -> Case:
        """The same with a batch so many times as large."""
        return dataclasses.replace(self, workload=self.workload.times(factor))

    @property
    def beside_timm(self) -> bool:
        """Whether timm's own distillation does the same thing."""
        return isinstance(self.workload, Vision) and self.peers == 1


RESNET18, RESNET50 = Vision("resnet18", 16, 128), Vision("resnet50", 8, 128)
RESNEXT50, VIT = Vision("resnext50_32x4d", 8, 128), Vision("vit_tiny_patch16_224", 8, 224)
SMALL, LARGE = Translation(classes=4000), Translation(classes=32000)
CASES = (
    Case(RESNET18, goal=1.30),
    Case(RESNET50, goal=1.30),
    Case(RESNEXT50, goal=1.30),
    Case(VIT),
    Case(SMALL, goal=1.33),
    Case(LARGE, goal=1.40),
    Case(RESNET18, peers=2),
    Case(RESNET18, peers=3),
    Case(SMALL, peers=2),
    Case(SMALL, peers=3),
    Case(RESNET18, bfloat16=True),
    Case(VIT, bfloat16=True),
    Case(LARGE, bfloat16=True),
    Case(RESNET18, compiled=True),
    Case(VIT, compiled=True),
)

Actions = dict[str, Callable[[], object]]


def measure(device: str) -> Iterator[Row]:
    """For each case the ratio to a plain update and, where timm has one, to its own distillation."""
    for case in (one.times(BATCHES[device]) for one in CASES):
        with actions(case, device) as taking_turns:
            seconds = side_by_side({name: _settled(one, device) for name, one in taking_turns.items()}, ROUNDS)
        yield from rows(case, seconds)


def rows(case: Case, seconds: dict[str, list[float]]) -> Iterator[Row]:
    """What the seconds of the rounds say."""
    details: dict[str, Any] = {
        f"{name} ms": round(1000 * statistics.median(found), 1) for name, found in seconds.items() if name != FORWARD
    }
    details[FORWARD] = round(statistics.median(_ratios(seconds[FORWARD], seconds[PLAIN])), 3)
    ours = seconds[CODISTILLED]
    yield Row.of(case.name, _ratios(ours, seconds[PLAIN]), goal=case.goal, details=details)
    if DISTILLED in seconds:
        yield Row.of(f"{case.name}, beside {DISTILLED}", _ratios(ours, seconds[DISTILLED]))


def _ratios(ones: list[float], others: list[float]) -> list[float]:
    return [one / other for one, other in zip(ones, others, strict=True)]


def _settled(action: Callable[[], object], device: str) -> Callable[[], None]:
    """Ends when the device has done it."""

    def run() -> None:
        action()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def actions(case: Case, device: str) -> contextlib.AbstractContextManager[Actions]:
    """What takes turns."""
    if isinstance(case.workload, Vision):
        return _vision(case, case.workload, device)
    return _translation(case, case.workload, device)


@contextlib.contextmanager
def _translation(case: Case, workload: Translation, device: str) -> Iterator[Actions]:
    plain, bare = Training(workload, 1, device), _frozen(workload, device)
    with exchanging(workload, INTERVAL, 1 + case.peers, device) as pairs:
        training, codistiller = pairs[0]

        def codistilled() -> None:
            found = training.update(codistiller)
            assert found is not None, "the peers' snapshots are too stale by now"

        made: Actions = {PLAIN: plain.update, CODISTILLED: codistilled}
        made[FORWARD] = torch.no_grad()(lambda: logits_of(bare, plain.batch.inputs))
        yield {name: _in_precision(case, action, device) for name, action in made.items()}


@contextlib.contextmanager
def _vision(case: Case, workload: Vision, device: str) -> Iterator[Actions]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        peers = Tasks(workload, device, folder, 1 + case.peers)
        codistilled = peers.codistilling(compiled=case.compiled)
        stack.callback(codistilled.close)
        plain = ClassificationTask(peers.network(1), nn.CrossEntropyLoss(), verbose=False)
        tasks: dict[str, nn.Module] = {PLAIN: plain, CODISTILLED: codistilled}
        if case.beside_timm:
            tasks[DISTILLED] = LogitDistillationTask(
                peers.network(1), peers.network(2), nn.CrossEntropyLoss(), distill_loss_weight=1.0, verbose=False
            )
        made: Actions = {}
        for name, one in tasks.items():
            if case.compiled and one is not codistilled:
                one.compile()
            made[name] = _updating(case, workload, one.train(), device)
        bare, images = _frozen(workload, device), workload.batch().to(device).inputs
        if case.compiled:
            bare.compile()
        made[FORWARD] = _in_precision(case, torch.no_grad()(lambda: bare(*images)), device)
        yield made


class Tasks:
    """timm's tasks for one network, and the peers of a run in `folder`."""

    def __init__(self, workload: Vision, device: str, folder: str, peers: int) -> None:
        self._workload, self._device, self._folder, self._peers = workload, device, folder, peers
        batch = workload.batch()
        self._images, self._labels = batch.inputs[0], batch.target
        self._loader = DataLoader(TensorDataset(self._images, self._labels), batch_size=len(self._labels))

    def network(self, seed: int) -> nn.Module:
        return self._workload.build(seed).to(self._device)

    def codistilling(self, *, compiled: bool) -> CodistillationTask:
        """A task that has taken up the weights of all its peers, which have ended since."""
        for peer in range(1, self._peers):
            self._task(peer).finish()
        task = self._task(0)
        if compiled:
            task.compile()
        images, labels, update = self._images.to(self._device), self._labels.to(self._device), 0
        while task.metrics().get("codistill_peers", 0) < self._peers - 1:
            with torch.no_grad():
                task(images, labels)
            time.sleep(0.5)
            update += INTERVAL
            task.update_ema(update)
        task.update_ema(update + 1)  # past the boundary, whose work is not an update's
        return task

    def _task(self, peer: int) -> CodistillationTask:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        flags = f"--codistill --codistill-dir {self._folder}/exchange --codistill-interval {INTERVAL}"
        flags += f" --codistill-peers {self._peers} --codistill-peer {peer}"
        network = self.network(1 + peer)
        options = parser.parse_args(flags.split())
        task = CodistillationTask(network, nn.CrossEntropyLoss(), options=options, verbose=False)
        optimizer = self._workload.optimizer(network)
        task.begin_epoch(0, self._loader, optimizer, save_dir=f"{self._folder}/{peer}")
        task._begin_update()
        return task


def _updating(case: Case, workload: Vision, task: nn.Module, device: str) -> Callable[[], None]:
    optimizer = workload.optimizer(task)
    batch = workload.batch().to(device)
    predicting = _in_precision(case, lambda: task(*batch.inputs, batch.target)["loss"], device)

    def update() -> None:
        optimizer.zero_grad()
        predicting().backward()
        optimizer.step()

    return update


def _in_precision(case: Case, action: Callable[[], Any], device: str) -> Callable[[], Any]:
    return torch.autocast(device, dtype=torch.bfloat16)(action) if case.bfloat16 else action


def _frozen(workload: Workload, device: str) -> nn.Module:
    return workload.build(2).to(device).eval().requires_grad_(False)

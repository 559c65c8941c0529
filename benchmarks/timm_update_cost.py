"""How long does a codistilled update of resnet18 take? (goals: at most 1.35 plain, at most 1.00 timm's distillation)"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from timm.models import create_model
from timm.task import ClassificationTask, LogitDistillationTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.update_cost import seconds
from timm_codistill import CodistillationTask, add_arguments

MODEL = "resnet18"
IMAGES, SIZE = 16, 128
ROUNDS = 30
INTERVAL = 20


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(MODEL)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator), torch.arange(IMAGES)


@contextlib.contextmanager
def codistilling(model: nn.Module, other: nn.Module) -> Iterator[CodistillationTask]:
    """A task for `model` that has taken up `other`'s weights as those of its only peer."""
    loader = DataLoader(TensorDataset(*batch()), batch_size=IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        tasks = []
        for peer, module in enumerate((model, other)):
            parser = argparse.ArgumentParser()
            add_arguments(parser)
            given = (
                f"--codistill --codistill-dir {folder}/exchange --codistill-interval {INTERVAL} --codistill-peer {peer}"
            )
            tasks.append(CodistillationTask(module, nn.CrossEntropyLoss(), options=parser.parse_args(given.split())))
            tasks[peer].begin_epoch(
                0, loader, torch.optim.SGD(module.parameters(), lr=0.1), save_dir=f"{folder}/{peer}"
            )
        try:
            update = 0
            while tasks[0].metrics().get("codistill_peers", 0) == 0:
                for task in tasks:
                    task.update_ema(update)
                    task(*batch())
                time.sleep(0.5)
                update += INTERVAL
            tasks[0].update_ema(update + 1)  # no boundary falls into what is timed
            yield tasks[0]
        finally:
            for task in tasks:
                task.close()


def updating(task: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.01, momentum=0.9)
    images, labels = batch()

    def update() -> None:
        optimizer.zero_grad()
        task(images, labels)["loss"].backward()
        optimizer.step()

    return update


def in_turn(updates: list[Callable[[], None]], first: int) -> list[float]:
    """Seconds of each, in the order given; `first` goes first, since what ran before leaves its mark on the caches."""
    found = {i % len(updates): seconds(updates[i % len(updates)]) for i in range(first, first + len(updates))}
    return [found[i] for i in range(len(updates))]


def measure() -> Iterator[str]:
    torch.set_num_threads(2)
    plain = ClassificationTask(network(1), nn.CrossEntropyLoss())
    distilling = LogitDistillationTask(network(1), network(2), nn.CrossEntropyLoss(), distill_loss_weight=1.0)
    with codistilling(network(1), network(2)) as codistilled:
        updates = [updating(task.train()) for task in (plain, codistilled, distilling)]
        times = [in_turn(updates, first=number % len(updates)) for number in range(3 + ROUNDS)][3:]
    medians = [1000 * statistics.median(column) for column in zip(*times, strict=True)]
    to_plain = statistics.quantiles([ours / host for host, ours, _ in times], n=4)
    to_distilling = statistics.quantiles([ours / theirs for _, ours, theirs in times], n=4)
    yield (
        f"{medians[0]:.0f} ms plain, {medians[1]:.0f} ms codistilled, {medians[2]:.0f} ms LogitDistillationTask; "
        f"ratio to plain {to_plain[1]:.2f} (quartiles {to_plain[0]:.2f} to {to_plain[2]:.2f}), "
        f"to LogitDistillationTask {to_distilling[1]:.2f} ({to_distilling[0]:.2f} to {to_distilling[2]:.2f}), "
        f"{ROUNDS} rounds"
    )

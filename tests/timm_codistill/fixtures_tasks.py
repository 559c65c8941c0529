"""Tasks on a few random images, several peers of a run in one process.

Import what a test file needs by name, the fixture `peers` too.
"""

import argparse
import time

import pytest
import torch
from timm.models import create_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_codistill import CodistillationTask, add_arguments

torch.manual_seed(0)
IMAGES, LABELS = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
SECONDS = 60.0

MODELS = {
    "resnet": lambda: create_model("test_resnet", num_classes=5),
    "resnext": lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, cardinality=4, base_width=4, stem_width=8),
    "vit": lambda: create_model("test_vit", num_classes=5, img_size=32),
    "distillation head": lambda: create_model(
        "deit_tiny_distilled_patch16_224", num_classes=5, img_size=32, embed_dim=24, depth=1, num_heads=3
    ),
}


def options(*flags):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(flags)


def loader():
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)


class Peers:
    """Makes tasks that share a folder, and closes them."""

    def __init__(self, folder):
        self.folder, self.tasks = folder, []

    def task(self, number, model, *flags, criterion=None, peers=2, **how):
        given = ["--codistill", "--codistill-dir", self.folder / "exchange", "--codistill-interval", "1"]
        given += ["--codistill-peer", number, "--codistill-peers", peers, "--codistill-timeout", "30", *flags]
        parsed = options(*map(str, given))
        made = CodistillationTask(model, criterion or nn.CrossEntropyLoss(), options=parsed, **how)
        self.tasks.append(made)
        return made

    def publish(self, model, number=1, updates=3, **how):
        """Train `model` as peer `number`, to the end."""
        task = self.task(number, model, **how)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in task.epochs(range(1), loader(), optimizer, save_dir=self.folder / str(number)):
            for step in range(updates):
                update(task, optimizer, step + 1)
        return model.eval()

    def until_it_has_a_peer(self, task, model):
        """Batch after batch, without changing a parameter, until a peer's snapshot is in use."""
        task.begin_epoch(
            0, loader(), torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=1e-3), save_dir=self.folder / "0"
        )
        end = time.monotonic() + SECONDS
        step = 0
        while task.metrics()["codistill_peers"] == 0:
            assert time.monotonic() < end, "no snapshot came"
            task(IMAGES, LABELS)
            step += 1
            task.update_ema(step)
            time.sleep(0.02)


@pytest.fixture
def peers(tmp_path):
    made = Peers(tmp_path)
    yield made
    for task in made.tasks:
        task.close()


def update(task, optimizer, step):
    result = task(IMAGES, LABELS)
    result["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    task.update_ema(step=step)
    return result


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)

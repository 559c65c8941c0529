"""Models that timm has converted for `--sync-bn`: what they publish is ordinary, and peers need no collective."""

import argparse

import torch
from timm.layers import convert_sync_batchnorm
from timm.models import create_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.fixtures_peers import data_parallel
from timm_codistill import CodistillationTask, add_arguments


def build(seed, converted):
    torch.manual_seed(seed)
    model = create_model("test_efficientnet", num_classes=5)
    return convert_sync_batchnorm(model) if converted else model


def begin(model, folder, number, distributed=False):
    """A task of peer `number` with 2 images, and their loader."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = ["--codistill", "--codistill-dir", folder / "exchange", "--codistill-peer", number]
    flags += ["--codistill-interval", 1, "--codistill-timeout", 30]
    task = CodistillationTask(model, nn.CrossEntropyLoss(), options=parser.parse_args(list(map(str, flags))))
    if distributed:
        task.prepare_distributed()
    torch.manual_seed(7)
    images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
    return task, images, labels, DataLoader(TensorDataset(images, labels), batch_size=2)


def publish(model, folder, number):
    """Train for two updates, to the end; what it then predicts."""
    task, images, labels, loader = begin(model, folder, number)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in task.epochs(range(1), loader, optimizer, save_dir=folder / str(number)):
        for step in (1, 2):
            task(images, labels)["loss"].backward()
            optimizer.step()
            task.update_ema(step)
    with torch.no_grad():
        return model.eval()(images)


TWO_WORKERS = """
import time
from pathlib import Path
import torch
from tests.integration import sync_batchnorm_on_cpu
from tests.timm_codistill.test_sync_batchnorm import begin, build

sync_batchnorm_on_cpu.enable()
folder = Path(FOLDER)
model = build(0, converted=True)
task, images, labels, loader = begin(model, folder, 0, distributed=True)
task.begin_epoch(0, loader, torch.optim.SGD(model.parameters(), lr=0.0), save_dir=folder / "0")
end, step = time.monotonic() + 60, 0
while not task.metrics()["codistill_peers"]:  # of both workers, at the same update
    assert time.monotonic() < end, "no snapshot came"
    output = task(images, labels)["output"]
    step += 1
    task.update_ema(step)
    time.sleep(0.02)
task(images, labels)["loss"].backward()
answer["gradient"] = sum(p.grad.abs().sum().item() for p in model.parameters())
answer["training"] = model.training
if rank == 0:  # alone: with a collective in it, it would wait for the other one
    seen = []
    task._codistiller.penalty(output, lambda peer: seen.append(peer(images)) or seen[-1].clone())
    answer["predicted"] = seen[0].tolist()
    answer["kinds"] = [type(module).__name__ for module in task._codistiller._exchange._modules._modules[1].modules()]
dist.barrier()
answer["incidents"] = task.metrics()["codistill_incidents"]
task.close()
"""


def test_one_worker_alone_can_ask_a_peer_that_trains_without_sync_bn(tmp_path):
    published = publish(build(1, converted=False), tmp_path, 1)
    first, second = data_parallel(tmp_path, TWO_WORKERS.replace("FOLDER", repr(str(tmp_path))))
    assert torch.equal(torch.tensor(first["predicted"]), published)
    assert "SyncBatchNormAct" in first["kinds"]
    for worker in (first, second):
        assert worker["training"]
        assert worker["gradient"] == first["gradient"] > 0
        assert worker["incidents"] == 0

"""Two real processes train by every method over loopback; what they end with tells whether it does what it says."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from benchmarks.contenders import METHODS, Contender, Options, has_torchft, make
from benchmarks.workloads import Batch, loss_of
from codistill.exchange.snapshot import HostBuffer
from recipes.embedded.processes import free_port

UPDATES = 16
PERIOD = 4
OPTIONS = Options(period=PERIOD, warm_up=2, powersgd_rank=1)
TRIED = [name for name in METHODS if name != "alone" and (name != "diloco" or has_torchft())]


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 10))


def batch(update: int, part: slice) -> Batch:
    generator = torch.Generator().manual_seed(update)
    inputs, target = torch.randn(8, 16, generator=generator), torch.randint(10, (8,), generator=generator)
    return Batch((inputs[part],), target[part])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def worker(rank: int, folder: Path, ports: dict[str, int]) -> None:
    """Train by every method in turn, and leave each one's parameters after every update, and its metrics."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    for method in TRIED:
        model = build(rank)
        contender = make(
            method,
            model=model,
            optimizer=sgd(model),
            build=lambda: build(7),
            rank=rank,
            world=2,
            rendezvous=f"tcp://127.0.0.1:{ports[method]}",
            store_url=str(folder / "store"),
            folder=folder / f"{method}{rank}",
            options=OPTIONS,
        )
        found = {"parameters": train(contender, rank, folder), "metrics": contender.metrics()}
        contender.close()
        torch.save(found, folder / f"{method}{rank}.pt")


def train(contender: Contender, rank: int, folder: Path) -> list[torch.Tensor]:
    part, parameters = slice(None) if contender.same_batch else slice(4 * rank, 4 * rank + 4), []
    for update in range(UPDATES):
        contender.update(batch(update, part), loss_of)
        parameters.append(flat(contender.model))
        if contender.metrics().get("staleness") is not None and not contender.same_batch:
            wait_for_snapshot(contender, rank, folder, update)
    return parameters


def wait_for_snapshot(contender: Contender, rank: int, folder: Path, update: int) -> None:
    """These updates take no time, snapshots do: let both workers meet, and what was published come over."""
    (folder / f"at{update}-{rank}").touch()
    until((folder / f"at{update}-{1 - rank}").exists)
    if update and update % PERIOD == 0:
        due = update // PERIOD * HostBuffer(contender.model.state_dict(), OPTIONS.dtype).nbytes
        until(lambda: contender._codistiller.metrics()["received"] >= due)
        time.sleep(0.2)  # until it is verified, too


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.01)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("contenders")
    mp.spawn(worker, (folder, {method: free_port() for method in TRIED}), nprocs=2)
    return {method: [torch.load(folder / f"{method}{rank}.pt") for rank in (0, 1)] for method in TRIED}


def after(found: list[dict[str, Any]], update: int) -> list[torch.Tensor]:
    """Both workers' parameters after so many updates."""
    return [worker["parameters"][update - 1] for worker in found]


def alone(seed: int, part: slice) -> torch.Tensor:
    """The parameters of a model that trains on its own."""
    model = build(seed)
    optimizer = sgd(model)
    for update in range(UPDATES):
        examples = batch(update, part)
        optimizer.zero_grad()
        loss_of(model(*examples.inputs), examples).backward()
        optimizer.step()
    return flat(model)


def test_ddp_on_two_halves_is_one_worker_on_the_whole_batch(found):
    whole = alone(0, slice(None))
    for parameters in after(found["ddp"], UPDATES):
        assert torch.allclose(parameters, whole, atol=1e-5)


@pytest.mark.parametrize("method", ["ddp-fp16", "powersgd"])
def test_compressed_gradients_keep_the_workers_equal_and_differ_from_plain_ones(found, method):
    first, second = after(found[method], UPDATES)
    assert torch.equal(first, second)
    assert not torch.equal(first, after(found["ddp"], UPDATES)[0])


def test_post_local_sgd_makes_workers_equal_at_its_averages_only(found):
    together = [torch.equal(*after(found["post-local-sgd"], update)) for update in range(1, 1 + UPDATES)]
    averages = [update % PERIOD == 3 for update in range(1, 1 + UPDATES)]  # the first after two updates of warm-up
    assert together == [True, True, *averages[2:]]


@pytest.mark.skipif(not has_torchft(), reason="torchft is not installed")
def test_diloco_makes_workers_equal_at_its_averages_only(found):
    together = [torch.equal(*after(found["diloco"], update)) for update in range(1, 1 + UPDATES)]
    assert together == [update % PERIOD == 0 for update in range(1, 1 + UPDATES)]
    assert [worker["metrics"]["exchanges"] for worker in found["diloco"]] == [UPDATES / PERIOD] * 2


def test_checkpoints_are_taken_up_and_change_what_is_learnt(found):
    for rank, worker in enumerate(found["checkpoint"]):
        assert worker["metrics"]["exchanges"] >= 1
        assert worker["metrics"]["incidents"] == 0
        assert not torch.equal(worker["parameters"][-1], alone(rank, slice(4 * rank, 4 * rank + 4)))


def test_predictions_are_exchanged_from_the_first_update_on(found):
    for worker in found["prediction"]:
        assert worker["metrics"]["exchanges"] == UPDATES
        assert worker["metrics"]["incidents"] == 0

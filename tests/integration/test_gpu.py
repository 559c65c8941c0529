"""On a GPU, where there is one: weight 0 is nothing, mixed precision, and both exchanges; peers share the one GPU."""

import math
import time

import pytest
import torch

from codistill import CodistillConfig, Codistiller, fingerprint
from codistill.config import LOSSES
from codistill.losses import distill
from tests.integration import timm_trainings
from tests.integration.peers import FOREVER, until

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
script, runs = timm_trainings.script, timm_trainings.runs

SYNC = "--codistill-sync"
PREDICTION = ("--codistill-exchange", "prediction")
UNITS = 32


def learning(peer):
    """What it tells of intervals in which it learnt from the other."""
    return [line for line in peer.metrics() if line["peers"] == 1 and line["loss"]]


def assert_learns(*peers):
    """From the other, as long as it is there, and without trouble."""
    for peer in peers:
        assert peer.metrics()[-1]["incidents"] == 0, peer.errors()[-3000:]
        found = learning(peer)
        assert len(found) >= 2, peer.errors()[-3000:]
        assert all(line["received"] > 0 and math.isfinite(line["loss"]) for line in found)


def assert_meet_and_learn(*peers):
    """Who exchanges predictions meets the other after some seconds, in which a GPU does many an update."""
    until(lambda: all(len(learning(peer)) >= 3 for peer in peers), *peers)
    assert_learns(*peers)


def assert_same(found, wanted, *names):
    assert len(wanted.records()) >= 20
    assert found.records() == wanted.records()
    for name in names:
        torch.testing.assert_close(found.checkpoint()[name], wanted.checkpoint()[name], rtol=0, atol=0)


# Two workers share the GPU, too, and therefore meet through gloo.
@pytest.mark.parametrize(("workers", "precision"), [(1, ()), (1, ("--fp16",)), (1, ("--amp",)), (2, ())])
def test_alpha_0_is_fairseqs_plain_training_to_the_last_bit(trainings, workers, precision):
    how = {"gpu": True, "workers": workers}
    plain = trainings.stock("plain", *precision, **how)
    flags = (SYNC, *precision, "--codistill-alpha", "0")
    off, other = (trainings.peer(number, *flags, **how) for number in (0, 1))
    for training in (plain, off, other):
        training.wait()
    assert off.metrics()[-1]["received"] > 0
    assert_same(off, plain, "model", "last_optimizer_state")


# Not --bf16: on a command line fairseq takes it for a wish for a TPU.
@pytest.mark.parametrize("precision", [(), ("--fp16",), ("--memory-efficient-fp16",), ("--amp",)])
def test_fairseqs_peers_learn_from_each_other_in_every_precision(trainings, precision):
    peers = [trainings.peer(number, SYNC, *precision, gpu=True) for number in (0, 1)]
    for peer in peers:
        peer.wait()
    assert_learns(*peers)


@pytest.mark.parametrize("ddp_backend", ["legacy_ddp", "pytorch_ddp"])
def test_fairseqs_peers_of_two_workers_learn_from_each_other(trainings, ddp_backend):
    how = {"gpu": True, "workers": 2, "ddp_backend": ddp_backend}
    peers = [trainings.peer(number, SYNC, **how) for number in (0, 1)]
    for peer in peers:
        peer.wait()
    assert_learns(*peers)


@pytest.mark.parametrize("precision", [(), ("--fp16",)], ids=["float32", "fp16"])
def test_fairseqs_peers_swap_predictions(trainings, precision):
    peers = [trainings.peer(number, *PREDICTION, *precision, gpu=True, updates=FOREVER) for number in (0, 1)]
    assert_meet_and_learn(*peers)


ON_GPU = ("--device", "cuda")
PRECISIONS = [(), ("--amp",), ("--amp", "--amp-dtype", "bfloat16", "--channels-last")]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_alpha_0_is_timms_plain_training_to_the_last_bit(runs, precision):
    plain = runs.stock("plain", *ON_GPU, *precision)
    flags = (*ON_GPU, *precision, SYNC, "--codistill-alpha", "0")
    off, other = (runs.peer(number, *flags) for number in (0, 1))
    for training in (plain, off, other):
        training.wait()
    assert off.metrics()[-1]["received"] > 0
    assert_same(off, plain, "state_dict", "optimizer")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_timms_peers_learn_from_each_other_in_every_precision(runs, precision):
    peers = [runs.peer(number, *ON_GPU, *precision, SYNC) for number in (0, 1)]
    for peer in peers:
        peer.wait()
    assert_learns(*peers)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_timms_peers_swap_predictions(runs, precision):
    peers = [runs.peer(number, *ON_GPU, *precision, *PREDICTION, "--epochs", str(FOREVER)) for number in (0, 1)]
    assert_meet_and_learn(*peers)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_penalty_and_its_gradient_are_those_of_the_cpu(loss, dtype):
    generator = torch.Generator().manual_seed(0)
    own, peer = (torch.randn(6, 5, 1000, generator=generator).to(dtype) for _ in range(2))
    found = {}
    for device in ("cpu", "cuda"):
        logits = own.detach().to(device).clone().requires_grad_()
        penalty = distill(logits, [peer.to(device)], loss=loss).loss
        penalty.backward()
        found[device] = penalty.detach().cpu().float(), logits.grad.cpu().float()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=tolerance, atol=tolerance)


def codistil(folder, number, model):
    return Codistiller(
        CodistillConfig(dir=str(folder / "exchange"), interval=2, peer=number),
        model=model,
        build_peer=lambda: torch.nn.Linear(8, UNITS).cuda(),
        fingerprint=fingerprint(UNITS),
        save_dir=folder / str(number),
    )


def test_an_exchange_leaves_the_gpus_generator_alone_and_the_peers_weights_arrive(tmp_path):
    models = [torch.nn.Linear(8, UNITS).cuda() for _ in range(2)]
    codistillers = [codistil(tmp_path, number, model) for number, model in enumerate(models)]
    before = torch.cuda.get_rng_state()
    inputs = torch.ones(4, 8, device="cuda")
    try:
        update = 0
        while not codistillers[0].active:
            assert update < 200, codistillers[0].metrics()
            for codistiller in codistillers:
                codistiller.begin_update(update, epoch=1)
            update += 1
            time.sleep(0.1)
        found = codistillers[0].penalty(models[0](inputs), lambda peer: peer(inputs), None, (inputs,))
    finally:
        for codistiller in codistillers:
            codistiller.close()
    assert torch.equal(torch.cuda.get_rng_state(), before)
    resumed = codistil(tmp_path, 0, models[0])
    resumed.load_state_dict(codistillers[0].state_dict())
    try:
        resumed.begin_update(update + 1 - update % 2, epoch=1)  # within an interval
        resumed.penalty(models[0](inputs), lambda peer: peer(inputs))
        assert resumed.state_dict()["sums"][2] == 2 * len(inputs)  # with what the checkpoint had
    finally:
        resumed.close()
    wanted = distill(models[0](inputs), [models[1](inputs).detach()], loss="kl")
    torch.testing.assert_close(found.loss, wanted.loss)

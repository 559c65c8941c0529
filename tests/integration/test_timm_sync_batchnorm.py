"""Peers of two workers that share their BatchNorm statistics: `--sync-bn`, on a CPU that has been taught it."""

import pytest
import torch
from safetensors.torch import load_file
from timm.models import create_model

from tests.integration import timm_trainings
from tests.integration.timm_trainings import SYNC, UPDATES

script, runs = timm_trainings.script, timm_trainings.runs

EPOCH = UPDATES // 2  # updates of one
BURN_IN = ("--codistill-burn-in", str(EPOCH))


HALF = (
    *("--amp", "--amp-dtype", "bfloat16", "--model-ema"),
    # On one pixel a CPU's half precision leaves the gradient of some weights of a 3 x 3 convolution to chance.
    *("--input-size", "3", "32", "32"),
)


@pytest.mark.parametrize("flags", [(), HALF], ids=["plain", "half precision, ema"])
def test_with_sync_bn_burn_in_is_the_plain_training_and_then_every_worker_takes_the_other_peer_up(runs, flags):
    flags = ("--sync-bn", *flags)
    how = {"workers": 2, "sync_batchnorm": True}
    plain = runs.stock("plain", *flags, **how)
    apart = runs.stock("apart", *flags[1:], "--epochs", "1", workers=2)
    peers = [runs.peer(number, *flags, *SYNC, "--codistill-interval", "2", *BURN_IN, **how) for number in (0, 1)]
    for training in (plain, apart, *peers):
        training.wait()
    assert plain.records() != apart.records()  # it makes a difference
    for rank in (0, 1):
        assert peers[0].records(rank)[:EPOCH] == plain.records(rank)[:EPOCH]
    first = [training.checkpoint("checkpoint-0.pth.tar") for training in (peers[0], plain)]
    for name in ("state_dict", "state_dict_ema", "optimizer"):
        torch.testing.assert_close(first[0].get(name), first[1].get(name), rtol=0, atol=0)

    for number, peer in enumerate(peers):
        for rank in (0, 1):
            assert [batch["penalised"] for batch in peer.records(rank)] == [False] * EPOCH + [True] * EPOCH
        assert [(line["update"], line["peers"]) for line in peer.metrics()] == [
            (u, 1) for u in range(2, UPDATES + 1, 2)
        ]
        assert peer.metrics()[-2]["loss"] > 0
        assert {line["incidents"] for line in peer.metrics()} == {0}
        assert_the_last_snapshot_is_the_last_checkpoint(runs, number, peer.checkpoint()["state_dict"])


def assert_the_last_snapshot_is_the_last_checkpoint(runs, number, state):
    """Statistics and all, under the names that a model has without `--sync-bn` and without workers."""
    [payload] = (runs.exchange / f"run/peers/{number}").glob(f"*/{UPDATES}-*.safetensors")
    torch.testing.assert_close(load_file(payload), dict(state), rtol=0, atol=0)
    assert state.keys() == create_model("test_resnet", num_classes=10).state_dict().keys()
    assert state["bn1.running_mean"].abs().sum() > 0

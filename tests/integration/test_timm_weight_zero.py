"""Weight 0 is nothing: as long as alpha is 0 a codistilled training is the plain one with that seed, bit for bit.

Dropout and augmentation are on, so that a random number drawn for a peer would show.
"""

import pytest
import torch

from tests.integration import timm_trainings
from tests.integration.timm_trainings import SYNC, UPDATES
from timm_codistill.data import SEED_STRIDE

script, runs = timm_trainings.script, timm_trainings.runs

EMA = ("--model-ema", "--model-ema-decay", "0.9", "--grad-accum-steps", "3")


def assert_same_training(found, wanted):
    """Every batch of every worker, the final weights, moving average and optimiser."""
    for rank in range(len(wanted.processes)):
        assert len(wanted.records(rank)) == 2 * (UPDATES // len(wanted.processes))
        assert found.records(rank) == wanted.records(rank)
    for name in ("state_dict", "state_dict_ema", "optimizer"):
        torch.testing.assert_close(found.checkpoint().get(name), wanted.checkpoint().get(name), rtol=0, atol=0)
    columns = [name for name in wanted.summary()[0] if "codistill" not in name]
    rows = [[{name: row[name] for name in columns} for row in training.summary()] for training in (found, wanted)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(("workers", "flags"), [(1, ()), (1, EMA), (2, EMA)], ids=["plain", "ema", "two workers, ema"])
def test_alpha_0_burn_in_and_one_peer_are_the_plain_training_to_the_last_bit(runs, workers, flags):
    interval = ("--codistill-interval", "2")
    seeds = [{"seed": 1 + offset, "sampler_seed": offset} for offset in (0, SEED_STRIDE)]
    plain = [runs.stock(f"plain-{number}", *flags, workers=workers, **seed) for number, seed in enumerate(seeds)]
    off = runs.peer(0, *flags, *SYNC, *interval, "--codistill-alpha", "0", workers=workers)
    burning_in = runs.peer(1, *flags, *SYNC, *interval, "--codistill-burn-in", "1000", workers=workers)
    alone = runs.peer(0, *flags, *interval, run_id="alone", peers=1, workers=workers)
    for training in (*plain, off, burning_in, alone):
        training.wait()
    for found, wanted in ((off, plain[0]), (burning_in, plain[1]), (alone, plain[0])):
        assert_same_training(found, wanted)
    for found in (off, burning_in):
        assert found.metrics()[-1]["peers"] == 1
        assert found.metrics()[-1]["received"] > 0
        assert {line["incidents"] for line in found.metrics()} == {0}
    assert plain[0].records() != plain[1].records()
    assert not (runs.exchange / "alone").exists()


PREDICTION = ("--codistill-exchange", "prediction", "--codistill-interval", "2")


def test_without_weight_exchange_by_prediction_leaves_the_data_alone_too(runs):
    plain = runs.stock("plain", *EMA)
    off = runs.peer(0, *EMA, *PREDICTION, "--codistill-alpha", "0")
    alone = runs.peer(0, *EMA, *PREDICTION, run_id="alone", peers=1)
    for training in (plain, off, alone):
        training.wait()
    for found in (off, alone):
        assert_same_training(found, plain)
    assert not runs.exchange.exists()


def test_burn_in_of_exchange_by_prediction_is_the_training_without_others(runs):
    flags = (*EMA, *PREDICTION, "--mixup", "0.2")
    burning_in = [runs.peer(number, *flags, "--codistill-burn-in", "1000", run_id="burn-in") for number in (0, 1)]
    nobody_there = runs.peer(0, *flags, run_id="nobody")
    for training in (*burning_in, nobody_there):
        training.wait()
    assert_same_training(burning_in[0], nobody_there)
    ours, theirs = (training.records() for training in burning_in)
    assert [record["inputs"] for record in ours] == [record["inputs"] for record in theirs]
    assert {line["incidents"] for line in burning_in[0].metrics()} == {0}
    assert burning_in[0].metrics()[-1]["sent"] == 0

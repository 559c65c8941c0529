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
    columns = wanted.summary()[0].keys()
    assert [{name: row[name] for name in columns} for row in found.summary()] == wanted.summary()


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

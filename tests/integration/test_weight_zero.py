"""Weight 0 is nothing: as long as alpha is 0 a codistilled training is the plain one, to the last bit.

Dropout is on, so that a random number drawn for a peer would show.
"""

import pytest
import torch

SYNC = "--codistill-sync"  # with it every interval brings a new snapshot, however few updates there are


def assert_same_training(found, wanted):
    """Every batch of every worker, the final weights and the optimiser's state."""
    for rank in range(len(wanted.processes)):
        for step in ("train", "valid"):
            assert len(wanted.records(rank, step)) >= 4
            assert found.records(rank, step) == wanted.records(rank, step)
    for name in ("model", "last_optimizer_state"):
        torch.testing.assert_close(found.checkpoint()[name], wanted.checkpoint()[name], rtol=0, atol=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_alpha_0_and_burn_in_are_the_plain_training_to_the_last_bit_while_snapshots_are_swapped(trainings, workers):
    plain = [trainings.stock(f"plain-{seed}", seed=seed, workers=workers) for seed in (1, 2)]
    plain = [training.wait() for training in plain]
    off = trainings.peer(0, SYNC, "--codistill-alpha", "0", workers=workers)
    burning_in = trainings.peer(1, SYNC, "--codistill-burn-in", "1000", workers=workers)
    for found, wanted in zip((off.wait(), burning_in.wait()), plain, strict=True):
        assert_same_training(found, wanted)
        assert [line["peers"] for line in found.metrics()] == [1, 1, 1, 1]  # after updates 5, 10, 15 and at the end
        assert [line["staleness"] for line in found.metrics()] == [0, 0, 0, 5]
        assert found.metrics()[-1]["received"] > 0
    assert plain[0].records() != plain[1].records()


@pytest.mark.parametrize("workers", [1, 2])
def test_one_peer_is_the_plain_training_to_the_last_bit(trainings, workers):
    plain = trainings.stock("plain", seed=3, workers=workers)
    alone = trainings.peer(0, peers=1, seed=3, workers=workers)
    assert_same_training(alone.wait(), plain.wait())
    assert [line["update"] for line in alone.metrics()] == [5, 10, 15, 20]
    assert all(line["distance"] > 0 for line in alone.metrics())
    assert not trainings.exchange.exists()


def test_a_burn_in_that_ends_changes_nothing_before_its_end(trainings):
    plain = trainings.stock("plain")
    peers = [trainings.peer(number, SYNC, "--codistill-burn-in", "12") for number in (0, 1)]
    found, wanted = peers[0].wait(), plain.wait()
    peers[1].wait()
    assert found.records()[:12] == wanted.records()[:12]
    assert [update for update, added in found.penalties().items() if added] == list(range(12, 20))
    assert all(added >= 0 for added in found.penalties().values())

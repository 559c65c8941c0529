"""Synchronous runs of real fairseq processes: the same bits every time, kills and restarts included."""

import random

import pytest

from tests.integration.fairseq_trainings import Trainings
from tests.integration.peers import penalised, refused, same_parameters

UPDATES = 40
INTERVAL = 2  # much shorter than the checkpoint cadence
CADENCE = 12
SYNC = ("--codistill-sync", "--codistill-interval", str(INTERVAL), "--codistill-timeout", "60", "--disable-validation")


def start(started, number, run_id, *, cadence=CADENCE, updates=UPDATES, pause=0.0, flags=()):
    saving = ("--save-interval-updates", str(cadence), "--save-interval", "1000")
    return started.peer(number, *SYNC, *saving, *flags, run_id=run_id, updates=updates, pause=pause)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, toy):
    """A run of two peers that nothing happened to."""
    with Trainings(tmp_path_factory.mktemp("whole"), toy) as started:
        peers = [start(started, number, "whole") for number in (0, 1)]
        yield started, [peer.wait() for peer in peers]


def assert_as_whole(whole, peers):
    for peer, wanted in zip(peers, whole[1], strict=True):
        peer.wait()
        assert peer.metrics()[-1]["incidents"] == 0, peer.output() + peer.errors()
        assert penalised(peer)[0] == INTERVAL
        assert same_parameters(peer, wanted)


def test_two_whole_runs_give_the_same_bits(whole, trainings):
    assert penalised(whole[1][0]) == list(range(INTERVAL, UPDATES))
    assert not same_parameters(*whole[1])  # peers stay apart
    peers = [start(trainings, number, "again") for number in (0, 1)]
    assert_as_whole(whole, peers)
    for peer, wanted in zip(peers, whole[1], strict=True):
        assert peer.records() == wanted.records()


def test_one_peer_killed_at_a_random_update_and_restarted_gives_the_same_bits(whole, trainings):
    update = random.SystemRandom().randrange(1, UPDATES - 2)
    print(f"killed at update {update}")
    peers = [start(trainings, number, "killed", pause=0.02) for number in (0, 1)]
    peers[1].reach(update).kill()
    peers[1] = start(trainings, 1, "killed")
    assert_as_whole(whole, peers)


def test_all_peers_killed_at_unequal_updates_before_a_checkpoint_give_the_same_bits(whole, trainings):
    cadences = (CADENCE, 7)  # so that they also restart from unequal updates
    peers = [start(trainings, n, "killed", cadence=cadences[n], pause=0.2) for n in (0, 1)]
    peers[0].reach(2 * CADENCE - 2).kill()
    peers[1].reach(2 * CADENCE - 1).kill()  # then it needs what peer 0 did not publish any more
    reached = [peer.records()[-1]["update"] for peer in peers]
    saved = [peer.checkpoint()["optimizer_history"][-1]["num_updates"] for peer in peers]
    assert reached[0] != reached[1]
    assert saved == [CADENCE, 21]
    peers = [start(trainings, n, "killed", cadence=cadences[n]) for n in (0, 1)]
    assert_as_whole(whole, peers)


def test_a_restore_below_the_floor_is_one_clear_line(whole):
    started, peers = whole
    [early] = peers[0].save_dir.glob(f"checkpoint_*_{CADENCE}.pt")
    again = start(started, 0, "whole", flags=("--restore-file", str(early)), updates=UPDATES + 10)
    assert refused(again) == (
        f"--codistill-sync: cannot resume from update {CADENCE}: the snapshot of peer 1 at update "
        f"{CADENCE - INTERVAL} is gone; resume from the newest checkpoint, or start again with a new --codistill-run-id"
    )

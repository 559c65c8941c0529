"""timm trainings that exchange predictions: peers go through the same batches in step, each with its own dropout."""

import contextlib
import os
import signal
import time

from tests.integration import timm_trainings
from tests.integration.timm_trainings import SECONDS

script, runs = timm_trainings.script, timm_trainings.runs

PER_EPOCH = 59  # batches
FOREVER = ("--epochs", "1000")  # of a training that a test ends when it has seen enough
PREDICTION = (
    *("--codistill-exchange", "prediction", "--codistill-interval", "10", "--codistill-timeout", "6"),
    *("-b", "24", "--mixup", "0.2"),
)


def by_position(training, since=0, rank=0):
    """A worker's records from number `since` on, by epoch and micro-batch."""
    return {tuple(record["position"]): record for record in training.records(rank)[since:]}


def common(peers, since=(0, 0), rank=0):
    """The micro-batches that both have gone through, from number `since` of their records on."""
    left, right = (by_position(peer, start, rank) for peer, start in zip(peers, since, strict=True))
    return {position: (left[position], right[position]) for position in sorted(left.keys() & right.keys())}


def in_step(peers, since=(0, 0), rank=0):
    """Those of them in which both were given a penalty."""
    return [p for p, records in common(peers, since, rank).items() if all(record["penalised"] for record in records)]


def until_in_step(peers, batches=10, since=(0, 0)):
    end = time.monotonic() + SECONDS
    while len(found := in_step(peers, since)) < batches:
        for peer in peers:
            assert peer.running, peer.errors()[-3000:]
        assert time.monotonic() < end, "\n".join(peer.errors()[-3000:] for peer in peers)
        time.sleep(0.1)
    return found


def goes_on_alone(peer, batches=20):
    peer.reach(len(peer.records()) + batches)
    assert not any(record["penalised"] for record in peer.records()[-batches // 2 :])


def test_two_peers_of_two_workers_go_through_the_same_batches_in_step_and_most_are_penalised(runs):
    flags = (*PREDICTION, "--epochs", "3", "--grad-accum-steps", "3")
    peers = [runs.peer(number, *flags, workers=2, pause=0.1) for number in (0, 1)]
    for peer in peers:
        peer.wait()
    for rank in (0, 1):
        assert len(in_step(peers, rank=rank)) > PER_EPOCH // 2
        for ours, theirs in common(peers, rank=rank).values():
            assert ours["inputs"] == theirs["inputs"]
            assert ours["generators"] != theirs["generators"]
    assert by_position(peers[0])[1, 0]["inputs"] != by_position(peers[0], rank=1)[1, 0]["inputs"]
    for peer in peers:
        assert list(by_position(peer)) == sorted(by_position(peer))
        lines = peer.metrics()
        assert {line["incidents"] for line in lines} == {0}
        assert max((line["peers"], line["staleness"]) for line in lines) == (1, 0)
        assert lines[-1]["sent"] == lines[-1]["received"] > 0
        assert [row["epoch"] for row in peer.summary()] == ["0", "1", "2"]


def test_a_killed_peer_costs_the_penalty_and_comes_in_again_where_the_others_are(runs):
    peers = [runs.peer(number, *PREDICTION, *FOREVER, pause=0.03) for number in (0, 1)]
    peers[1].reach(PER_EPOCH + 5)  # there is a checkpoint
    until_in_step(peers)
    peers[1].kill()
    goes_on_alone(peers[0], 2 * PER_EPOCH)
    since = [len(peer.records()) for peer in peers]
    peers[1] = runs.peer(1, *PREDICTION, *FOREVER, "--resume", peers[1].save_dir / "last.pth.tar", pause=0.03)
    again = until_in_step(peers, since=since)
    resumed = list(by_position(peers[1], since[1]))
    assert resumed[0] == (2, 0)
    assert f"micro-batches to meet the other peers; going on at epoch {again[0][0]}, batch" in peers[1].errors()
    assert all(ours["inputs"] == theirs["inputs"] for ours, theirs in common(peers, since).values())
    assert peers[0].metrics()[-1]["incidents"] >= 1


def test_a_stopped_peer_costs_a_bounded_wait_and_the_penalty_until_it_goes_on(runs):
    peers = [runs.peer(number, *PREDICTION, *FOREVER, pause=0.03) for number in (0, 1)]
    until_in_step(peers)
    stopped = peers[1].processes[0].pid
    os.kill(stopped, signal.SIGSTOP)
    try:
        goes_on_alone(peers[0])
        since = [len(peer.records()) for peer in peers]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGCONT)
    until_in_step(peers, since=since)
    assert all(ours["inputs"] == theirs["inputs"] for ours, theirs in common(peers).values())

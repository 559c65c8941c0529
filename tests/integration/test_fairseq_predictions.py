"""Real fairseq peers that exchange their predictions of every batch, over a folder and over one address."""

import os
import signal
import socket

from tests.integration.peers import FOREVER, penalised, until

BY_PREDICTION = ("--codistill-exchange", "prediction", "--codistill-timeout", "5")
SAVING = ("--save-interval-updates", "10", "--keep-interval-updates", "1", "--disable-validation")
GO_ON = {"updates": FOREVER, "pause": 0.02}
ENOUGH = 30  # updates with a penalty


def peer(trainings, number, *flags, **how):
    return trainings.peer(number, *BY_PREDICTION, *SAVING, *flags, **{**GO_ON, **how})


def met(*peers, since=None):
    """Wait until each has had a penalty in `ENOUGH` updates (of those from `since` on)."""
    since = since or [0] * len(peers)
    for one, first in zip(peers, since, strict=True):
        until(lambda one=one, first=first: len(penalised(one, since=first)) >= ENOUGH, *peers)


def last_update(one):
    return one.records()[-1]["update"]


def batches_with_a_penalty(one):
    return [entry["batch"] for entry in one.records() if entry["loss"] != entry["host_loss"]]


def test_without_a_weight_it_is_the_plain_training_in_the_order_of_the_data_seed(trainings):
    task = ("--task", "codistill_translation", "--source-lang", "src", "--target-lang", "tgt")
    plain = trainings.stock("plain", seed=2)
    off = trainings.peer(0, *BY_PREDICTION, "--codistill-alpha", "0", seed=2)
    burning_in = trainings.peer(
        1, *BY_PREDICTION, "--codistill-burn-in", "1000", "--codistill-data-seed", "2", seed=2, task=task
    )
    wanted = plain.wait().records()
    assert off.wait().records() == wanted
    assert burning_in.wait().records() == wanted


def test_peers_get_a_penalty_for_each_batch_all_of_them_see_although_their_seeds_differ(trainings):
    peers = [peer(trainings, number, "--update-freq", "2") for number in (0, 1)]
    met(*peers)
    for one in peers:
        one.kill()
    first, second = (penalised(one) for one in peers)
    seen = [batches_with_a_penalty(one) for one in peers]
    both = min(len(batches) for batches in seen)
    assert seen[0][:both] == seen[1][:both]
    for updates in (first, second):
        assert updates == list(range(updates[0], updates[-1] + 1))
    for one in peers:
        assert all(added >= 0 for added in one.penalties().values())
        assert {line["incidents"] for line in one.metrics()} == {0}, one.output() + one.errors()
        assert one.metrics()[-1]["peers"] == 1
        assert one.metrics()[-1]["sent"] > 0
    assert peers[0].records()[0]["host_loss"] != peers[1].records()[0]["host_loss"]  # of initial weights of their own


def test_whatever_happens_to_a_peer_the_other_goes_on_and_they_meet_again(trainings):
    peers = [peer(trainings, number) for number in (0, 1)]
    met(*peers)

    peers[1].kill()
    at = last_update(peers[0])
    peers[0].reach(at + 2 * ENOUGH)
    assert len(penalised(peers[0], since=at)) <= 2
    peers[1] = peer(trainings, 1, pause=0.0)
    until(lambda: "Loaded checkpoint" in peers[1].output(), *peers)
    met(*peers, since=[last_update(one) for one in peers])
    assert "micro-batches, to meet the other peers" in peers[1].output(), peers[1].output()[-3000:]

    os.kill(peers[1].processes[0].pid, signal.SIGSTOP)
    at = last_update(peers[0])
    peers[0].reach(at + 2 * ENOUGH)
    os.kill(peers[1].processes[0].pid, signal.SIGCONT)
    met(*peers, since=[last_update(one) for one in peers])


def test_peers_of_two_workers_meet_at_an_address_without_any_folder_and_one_that_ends_is_no_trouble(trainings):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    place = ("--codistill-rendezvous", address, "--codistill-topk", "4", "--codistill-dtype", "float16")
    peers = [peer(trainings, number, *place, workers=2) for number in (0, 1)]
    met(*peers)
    for one in peers:
        assert len(penalised(one, rank=1)) >= ENOUGH - 2
        assert {line["incidents"] for line in one.metrics()} <= {0}, one.output() + one.errors()
    assert not trainings.exchange.exists()

    peers[1].end()
    peers[0].reach(last_update(peers[0]) + ENOUGH)
    for rank in (0, 1):  # of whom only the first tells metrics.jsonl
        assert "; counted" not in peers[0].output(rank), peers[0].output(rank)[-3000:]

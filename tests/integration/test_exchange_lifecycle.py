"""Real fairseq peers that come, go, are killed and come back; nobody ever harms another."""

import os
import re
import time

import pytest

from tests.integration.fairseq_trainings import Trainings
from tests.integration.peers import (
    FOREVER,
    elsewhere,
    in_use,
    latest,
    left_behind,
    other_dictionary,
    penalised,
    refused,
    temporary,
    until,
    used,
)

GO_ON = {"updates": FOREVER, "pause": 0.02}
SAVING = ("--save-interval-updates", "10", "--keep-interval-updates", "1", "--disable-validation")


@pytest.fixture(scope="module")
def ended(tmp_path_factory, toy):
    """A run whose peer 0 trained alone to its normal end, since peer 1 never started."""
    with Trainings(tmp_path_factory.mktemp("ended"), toy) as started:
        training = started.peer(0, env=temporary(started.folder, "machine")).wait()
        yield started, training


def test_a_peer_that_never_starts_costs_only_the_penalty(ended):
    _, training = ended
    assert penalised(training) == []
    assert {line["incidents"] for line in training.metrics()} == {0}
    assert "codistill:" not in training.output() + training.errors()
    assert training.metrics()[-1]["update"] == 20


def test_a_normal_end_is_told_to_the_others_and_leaves_nothing_on_the_machine(ended):
    started, training = ended
    found = latest(started, 0)
    assert (found.closed, found.manifest.final, found.manifest.update) == (True, True, 20)
    assert [reference.update for reference in found.retained] == [10, 15, 20]
    payloads = sorted(path.name.split("-")[0] for path in started.exchange.rglob("*.safetensors"))
    assert payloads == ["10", "15", "20"]
    assert left_behind(started.folder / "machine") == []
    with pytest.raises(ProcessLookupError):  # no process of its group is left, not even a zombie
        os.killpg(training.processes[0].pid, 0)


def test_peers_with_equal_seeds_are_told_so_by_name_and_train_on(ended):
    started, _ = ended
    equal = elsewhere(started, "equal", 1, seed=1, pause=0.1).wait()
    assert penalised(equal) == []
    assert equal.metrics()[-1]["incidents"] == 1
    assert (
        "peer 0: it started from the same initial weights as this peer; give each peer its own seed"
        in equal.output() + equal.errors()
    )


def test_a_run_id_that_was_used_with_other_options_is_refused_by_name(ended):
    started, _ = ended
    assert refused(elsewhere(started, "other", 1, "--codistill-interval", "7")) == (
        "run run was started with interval=5, not 7; "
        "give all peers of a run the same options, or a new --codistill-run-id"
    )


def test_a_peer_with_another_dictionary_is_refused(ended):
    started, _ = ended
    data = other_dictionary(started.toy.translation, started.folder / "swapped")
    message = refused(elsewhere(started, "swapped-peer", 1, data=data))
    assert message.startswith("run run was started with output=")
    assert message.endswith("; give all peers of a run the same options, or a new --codistill-run-id")


def test_a_late_peer_is_taken_up_and_what_it_leaves_at_its_end_stays_in_use(trainings, tmp_path):
    first = trainings.peer(0, "--codistill-max-staleness", "10", **GO_ON, env=temporary(tmp_path, "one")).reach(20)
    assert penalised(first) == []
    late = trainings.peer(1, updates=30, pause=0.05, env=temporary(tmp_path, "two")).wait()
    assert penalised(late)
    until(lambda: latest(trainings, 1).closed, first)
    after = until(lambda: first.metrics(), first)[-1]["update"] + 60
    until(lambda: used(first) == 1 and first.metrics()[-1]["update"] > after, first)
    assert len(penalised(first, since=after - 20)) >= 20  # a staleness of 10 is long over: it is the final one
    assert first.metrics()[-1]["staleness"] == 0
    assert first.metrics()[-1]["incidents"] == 0
    assert left_behind(tmp_path / "two") == []


def test_two_peers_of_two_workers_take_each_other_up_on_all_workers_at_once(trainings):
    peers = [trainings.peer(number, workers=2, **GO_ON) for number in (0, 1)]
    for peer in peers:
        until(lambda peer=peer: len(penalised(peer, rank=0)) > 20 and len(penalised(peer, rank=1)) > 20, *peers)
    for peer in peers:
        peer.kill()
        first, second = penalised(peer, rank=0), penalised(peer, rank=1)
        both = min(first[-1], second[-1])
        assert [u for u in first if u < both] == [u for u in second if u < both]
        assert first[0] % 5 == 0  # a swap happens at a boundary
        assert peer.metrics()[-1]["incidents"] == 0


def test_trouble_with_a_peer_ends_the_run_of_a_user_who_asked_for_that_and_no_other(trainings):
    place = trainings.exchange / "run/peers/1/latest.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"\x80\x04rubbish")
    strict = trainings.peer(0, "--codistill-on-error", "fail", peers=3, **GO_ON)
    tolerant = trainings.peer(2, peers=3, **GO_ON)
    assert refused(strict).startswith("peer 1: not strict JSON: ")
    assert refused(strict).endswith("; ended by --codistill-on-error fail")
    until(lambda: tolerant.metrics() and tolerant.metrics()[-1]["incidents"] > 0, tolerant)
    tolerant.reach(tolerant.records()[-1]["update"] + 20)


def test_three_peers_all_take_each_other_up(trainings):
    peers = [trainings.peer(number, peers=3, **GO_ON) for number in range(3)]
    for peer in peers:
        until(lambda peer=peer: used(peer) == 2, *peers)
    assert all(peer.metrics()[-1]["incidents"] == 0 for peer in peers)


def test_a_killed_peer_comes_back_as_the_next_incarnation_and_is_taken_up_again(trainings):
    peers = [trainings.peer(number, *SAVING, **GO_ON) for number in (0, 1)]
    until(lambda: all(len(penalised(peer)) > 10 for peer in peers), *peers)
    until(lambda: (peers[1].save_dir / "checkpoint_last.pt").exists(), *peers)
    peers[1].kill()
    died = peers[1].records()[-1]["update"]
    saved = peers[1].checkpoint()["optimizer_history"][-1]["num_updates"]

    again = trainings.peer(1, *SAVING, **GO_ON)
    updates = until(lambda: [r["update"] for r in again.records() if r["update"] == saved][-1:], peers[0], again)
    assert updates == [saved]
    until(lambda: penalised(again, since=died), peers[0], again)
    until(lambda: latest(trainings, 1).incarnation == 2, peers[0], again)
    until(lambda: in_use(peers[0])["1"]["incarnation"] == 2, peers[0], again)
    assert penalised(peers[0], since=peers[0].records()[-1]["update"] - 5)
    assert peers[0].metrics()[-1]["incidents"] == 0

    began = time.monotonic()
    assert refused(elsewhere(trainings, "intruder", 0)) == (
        "--codistill-peer 0: a running process with another save dir has this number; "
        "give each peer of the run its own --codistill-peer"
    )
    assert time.monotonic() - began < 120
    assert latest(trainings, 0).incarnation == 1
    for peer in (peers[0], again):
        peer.reach(peer.records()[-1]["update"] + 10)
    assert peers[0].metrics()[-1]["incidents"] == 0
    # Peer 0 went on meanwhile, and may have pruned what peer 1 had in use when it was killed.
    troubles = [line for line in (again.output() + again.errors()).splitlines() if "counted, and not logged" in line]
    assert all(re.search(r"the snapshot of peer 0 at update \d+ is gone", line) for line in troubles)

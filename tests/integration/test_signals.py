"""Real fairseq peers that are asked to end, suspended and replaced: what they publish, and when they stop."""

import os
import signal

from tests.integration.peers import FOREVER, elsewhere, in_use, latest, left_behind, penalised, temporary, until
from tests.integration.test_exchange_lifecycle import SAVING

RARELY = ("--codistill-interval", "1000")
GO_ON = {"updates": FOREVER, "pause": 0.02}


def test_sigterm_publishes_the_weights_of_now_and_ends_the_process_as_without_us(trainings, tmp_path):
    peer = trainings.peer(0, *RARELY, **GO_ON, env=temporary(tmp_path, "one")).reach(5)
    peer.processes[0].send_signal(signal.SIGTERM)
    peer.processes[0].wait(60)
    assert peer.processes[0].returncode == -signal.SIGTERM
    found = latest(trainings, 0)
    last = peer.records()[-1]["update"]
    assert 5 < found.manifest.update == last + 1
    assert (found.manifest.final, found.closed) == (False, False)
    assert left_behind(tmp_path / "one") == []
    assert "Traceback" not in peer.errors()


def test_sigterm_to_the_loader_s_processes_too_as_slurm_sends_it_loses_nothing(trainings):
    peer = trainings.peer(0, *RARELY, "--num-workers", "2", **GO_ON).reach(5)
    os.killpg(peer.processes[0].pid, signal.SIGTERM)
    peer.processes[0].wait(60)
    assert peer.processes[0].returncode == -signal.SIGTERM
    assert latest(trainings, 0).manifest.update == peer.records()[-1]["update"] + 1
    assert "Traceback" not in peer.errors()


def test_sigterm_to_both_workers_of_a_peer_publishes_too_and_the_other_peer_takes_it_up(trainings):
    interval = ("--codistill-interval", "20", "--codistill-max-staleness", "100000")
    pair = trainings.peer(0, *interval, workers=2, **GO_ON)
    other = trainings.peer(1, *interval, **GO_ON)
    until(lambda: penalised(pair) and penalised(other), pair, other)
    for process in pair.processes:
        process.send_signal(signal.SIGTERM)
    for process in pair.processes:
        process.wait(60)
    found = latest(trainings, 0).manifest
    assert found.update >= pair.records()[-1]["update"]
    assert not found.final
    other.reach(other.records()[-1]["update"] + 60)
    assert other.metrics()[-1]["incidents"] == 0
    assert other.metrics()[-1]["peers"] == 1
    assert penalised(other, since=other.records()[-1]["update"] - 5)


def test_a_process_that_was_suspended_while_its_number_was_taken_over_publishes_no_more(trainings):
    tolerant = ("--codistill-max-staleness", "100000")
    old, other = trainings.peer(0, *tolerant, **GO_ON), trainings.peer(1, *SAVING, *tolerant, **GO_ON)
    until(lambda: penalised(old) and penalised(other), old, other)
    os.killpg(old.processes[0].pid, signal.SIGSTOP)

    new = elsewhere(trainings, "again", 0, *tolerant, **GO_ON)  # watches the old one's heartbeat for a while
    until(lambda: latest(trainings, 0).manifest.incarnation == 2, new, other)
    until(lambda: in_use(other)["0"]["incarnation"] == 2, new, other)
    os.killpg(old.processes[0].pid, signal.SIGCONT)
    until(lambda: "peer 0 was started again elsewhere; this process publishes no more" in said(old), old, new, other)
    published = manifests(trainings, 0, incarnation=1)
    old.reach(old.records()[-1]["update"] + 20)  # it trains on
    assert manifests(trainings, 0, incarnation=1) <= published
    assert latest(trainings, 0).manifest.incarnation == 2
    assert in_use(other)["0"]["incarnation"] == 2
    assert penalised(other, since=other.records()[-1]["update"] - 5)


def said(training):
    return training.output() + training.errors()


def manifests(trainings, peer, incarnation):
    return {path.name for path in (trainings.exchange / f"run/peers/{peer}/{incarnation}").glob("*.json")}

"""Four timm trainings of two architectures on a ring: one is killed, another stopped, and the others learn on."""

import contextlib
import os
import signal

from tests.integration import timm_trainings
from tests.integration.peers import learns_on, until

script, runs = timm_trainings.script, timm_trainings.runs

RING = (
    "--codistill-topology",
    "ring",
    "--codistill-interval",
    "5",
    "--epochs",
    "1000",
    "--input-size",
    "3",
    "32",
    "32",
)
VIT = ("--model", "test_vit", "--model-kwargs", "img_size=32")


def test_a_ring_of_unlike_peers_closes_over_a_killed_and_a_stopped_one(runs):
    models = [(), VIT, (), VIT]
    peers = [runs.peer(number, *RING, *models[number], peers=4, pause=0.1) for number in range(4)]
    for peer in peers:
        until(learns_on(peer), *peers)
    peers[2].kill()
    until(learns_on(peers[3], times=3), peers[3])
    stopped = peers[1].processes[0].pid
    os.kill(stopped, signal.SIGSTOP)
    try:
        until(learns_on(peers[3], times=3), peers[3])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGCONT)
    until(learns_on(peers[1]), peers[1])
    for peer in (peers[0], peers[1], peers[3]):
        last = peer.metrics()[-1]
        assert (last["peers"], last["incidents"]) == (1, 0), peer.errors()[-3000:]
        assert any(record["penalised"] for record in peer.records())

"""Four fairseq trainings of two architectures on a ring: one is killed, another stopped, and the others learn on."""

import contextlib
import os
import signal

from tests.integration.peers import FOREVER, learns_on, penalised, until

RING = ("--codistill-topology", "ring", "--codistill-interval", "5", "--no-save")
DEEPER = ("--encoder-layers", "2", "--decoder-ffn-embed-dim", "48")


def test_a_ring_of_unlike_peers_closes_over_a_killed_and_a_stopped_one(trainings):
    models = [(), DEEPER, (), DEEPER]
    peers = [trainings.peer(number, *RING, *models[number], peers=4, updates=FOREVER, pause=0.1) for number in range(4)]
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
        assert penalised(peer)

"""Four fairseq trainings of two architectures on a ring: one is killed, another stopped, and the others learn on."""

from tests.integration.peers import FOREVER, penalised, ring_closes_over_a_killed_and_a_stopped_peer

RING = ("--codistill-topology", "ring", "--codistill-interval", "5", "--no-save")
DEEPER = ("--encoder-layers", "2", "--decoder-ffn-embed-dim", "48")


def test_a_ring_of_unlike_peers_closes_over_a_killed_and_a_stopped_one(trainings):
    models = [(), DEEPER, (), DEEPER]
    peers = [trainings.peer(number, *RING, *models[number], peers=4, updates=FOREVER, pause=0.1) for number in range(4)]
    alive = ring_closes_over_a_killed_and_a_stopped_peer(peers)
    assert all(penalised(peer) for peer in alive)
